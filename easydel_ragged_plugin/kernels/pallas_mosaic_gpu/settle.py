"""What follows the kernel of long rows, in Triton: its logsumexps to their places, and queries with NaN once more.

The Mosaic kernel stores whole tiles of logsumexps. A NaN there stands for a query whose sums hold one: a value that is
not finite, which some queries of its tile see and others do not, or which it sees itself. The queries of such a tile
are attended to one by one, over the keys that each of them sees. Without any, a program reads 128 numbers and ends.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.kernels.pallas_gpu.attend import attend_singly
from easydel_ragged_plugin.kernels.pallas_gpu.blocks import Places, Queries, iota
from easydel_ragged_plugin.kernels.pallas_gpu.call import Extras, Results, launch, store_results
from easydel_ragged_plugin.kernels.pallas_gpu.softmax import Softmax, finish
from easydel_ragged_plugin.kernels.pallas_gpu.work import Column
from easydel_ragged_plugin.types import AttentionRequest

from .sizes import COMPUTE_WARPGROUPS, QUERIES, Sizes

__all__ = ["settle"]

WARPS = 4


def ragged_settle(request: AttentionRequest, sizes: Sizes, *refs: Any) -> None:
    """Grid ``(kv_heads, parts)``: one tile of the kernel of long rows."""
    work, logsumexps, queries_ref, pages, tables, *rest = refs
    out = rest[-2:] if request.return_lse else rest[-1:]
    kv_head, part = pl.program_id(0), pl.program_id(1)
    row, start, count, context = (work[part, int(column)] for column in Column if column <= Column.CONTEXT)
    offset = work[part, int(Column.FIRST)]
    tokens = jnp.clip(count - offset, 0, sizes.tile_tokens)

    index = iota(COMPUTE_WARPGROUPS * QUERIES)
    warpgroup, query = lax.div(index, jnp.int32(QUERIES)), lax.rem(index, jnp.int32(QUERIES))
    by = jnp.int32(sizes.tokens if sizes.heads_first else request.group_size)
    head, token = lax.div(query, by), lax.rem(query, by)
    if not sizes.heads_first:
        head, token = token, head
    filled = (head < request.group_size) & (token < sizes.tokens)
    token = warpgroup * sizes.tokens + token
    filled &= token < tokens
    at = tuple(jnp.broadcast_to(each, index.shape) for each in (kv_head, part, warpgroup, query))
    found = pltriton.load(logsumexps.at[at], mask=filled, other=0.0)
    if request.return_lse:
        # What is no query has an index of its own: the interpreter writes what a masked store leaves, too.
        places = (jnp.where(filled, start + offset + token, request.num_tokens), kv_head * request.group_size + head)
        pltriton.store(out[1].at[places], found, mask=filled)

    extras = Extras.of_refs(request, rest)
    spoiled = jnp.max(jnp.where(found == found, 0, 1)) > 0
    queries = Queries(None, None, context - count + offset, None, start + offset, None, None)  # type: ignore[arg-type]

    def store(state: Softmax, places: Places) -> None:
        finished = finish(request, state, extras.sink_of(places.head), None)
        store_results(request, out, finished, places.token, places.head, jnp.ones((1,), bool))

    attend_singly(
        request, tables, pages, row, kv_head, None, queries_ref, queries, jnp.int32(0), context,
        jnp.where(spoiled, tokens * request.group_size, 0), store,
    )  # fmt: skip


def settle(
    request: AttentionRequest,
    sizes: Sizes,
    work: jax.Array,
    logsumexps: jax.Array,
    arrays: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    results: Results,
    interpret: bool,
) -> Results:
    """``results`` of the kernel of long rows, with all of its queries right and each logsumexp in its place.

    ``arrays``: queries, pages ``[pages, page_size, slot]``, block tables.
    """
    extras = Extras(sinks, None, None)
    results, _ = launch(
        functools.partial(ragged_settle, request, sizes),
        (request.num_kv_heads, work.shape[0]),
        WARPS,
        1,
        interpret,
        (work, logsumexps, *arrays, *extras.arrays()),
        results,
    )
    return results
