"""Requests, rows and tiles that more than one test file of the GPU kernel needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel_ragged_plugin import page_shape
from easydel_ragged_plugin.kernels.pallas_gpu import work
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Tile, Tiles
from easydel_ragged_plugin.layout import PageLayout
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.rows import Rows
from easydel_ragged_plugin.testing.cases import Batch
from easydel_ragged_plugin.types import AttentionRequest

SMALL = Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), programs=24, split_tokens=16, update_tokens=4)
"""Tiles that split even the short contexts of the tests."""


def request_for(
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    rows: int = 64,
    width: int = 64,
    page_size: int = 128,
    tokens: int = 64,
    pages: int = 4096,
    platform: str = "gpu",
    **options: Any,
) -> AttentionRequest:
    dtype, cache = np.dtype(dtype), np.dtype(cache or dtype)
    shape = page_shape("v3", pages, page_size, kv_heads, head_dim, cache)
    layout = PageLayout.of("v3", shape, kv_heads, head_dim, cache)
    return AttentionRequest(
        version="v3",
        platform=platform,
        num_tokens=tokens,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_rows=rows,
        pages_per_row=width,
        num_pages=pages,
        query_dtype=dtype,
        cache_dtype=cache,
        layout=layout,
        options=Options(**{"softmax_scale": 1.0, **options}),
    )


def in_two_loops(walk: Callable[..., Any]) -> Callable[..., Any]:
    """The walk over keys in two loops that do the same, one after the other, where it has one."""

    def call(*arguments: Any) -> Any:
        loop = jax.lax.fori_loop

        def twice(begin: Any, end: Any, step: Any, state: Any) -> Any:
            middle = (begin + end) // 2
            return loop(middle, end, step, loop(begin, middle, step, state))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "fori_loop", twice)
            return walk(*arguments)

    return call


def decode_rows(*contexts: int) -> Rows:
    ones = jnp.ones(len(contexts), jnp.int32)
    return Rows(jnp.arange(len(contexts), dtype=jnp.int32), ones, jnp.array(contexts, jnp.int32))


def decode_parts(batch: Batch, sizes: Tiles) -> jax.Array:
    case = batch.case
    request = request_for(
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.np_dtype,
        rows=case.num_rows,
        width=case.pages_per_row,
        page_size=case.page_size,
        tokens=case.num_tokens,
        pages=len(batch.pages),
        sliding_window=case.window,
    )
    starts = jnp.array(batch.query_start_loc)
    rows = Rows(starts[:-1], starts[1:] - starts[:-1], jnp.array(batch.context_lens))
    return work.decode_work(request, sizes, rows)[0]
