"""v3's new keys and values: as slots of the cache, and their way into the pages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.types import AttentionRequest
from easydel_ragged_plugin.writes import to_cache_dtype

from .work import Segment

__all__ = ["merged_slots", "write_segments"]

IN_FLIGHT = 32
"""Copies that are under way at once."""


def merged_slots(request: AttentionRequest, keys: jax.Array, values: jax.Array, slot: tuple[int, ...]) -> jax.Array:
    """``[tokens, *slot]`` in the cache's dtype: what the slots of the tokens will hold; ``slot`` is a slot's shape.

    Padding, of lanes past head_dim and of heads past kv_heads, is zeros.
    """
    layout = request.layout
    stored = jnp.stack([to_cache_dtype(keys, request), to_cache_dtype(values, request)], axis=2)
    stored = jnp.pad(stored, ((0, 0), (0, 0), (0, 0), (0, layout.value_offset - request.head_dim)))
    flat = stored.reshape(request.num_tokens, request.num_kv_heads * layout.head_stride)
    flat = jnp.pad(flat, ((0, 0), (0, layout.token_stride - flat.shape[1])))
    return flat.reshape(request.num_tokens, *slot)


def write_segments(segments: Any, total: Any, new: Any, pages: Any, semaphores: Any) -> None:
    """Copy the new tokens ``new [tokens, ...]`` to their slots of ``pages``; it returns when all are there.

    ``segments`` is the list of :func:`~.work.segments_to_write`, ``total`` the number of its entries.
    """
    count, capacity = total[0], segments.shape[0] // len(Segment)

    def copy(segment: jax.Array) -> Any:
        token, page, slot, tokens = (segments[int(each) * capacity + segment] for each in Segment)
        return pltpu.make_async_copy(
            new.at[pl.ds(token, tokens)], pages.at[page, pl.ds(slot, tokens)], semaphores.at[0]
        )

    def step(segment: jax.Array, carry: jax.Array) -> jax.Array:
        @pl.when(segment < count)
        def _() -> None:
            copy(segment).start()

        @pl.when(segment >= IN_FLIGHT)
        def _() -> None:
            copy(segment - IN_FLIGHT).wait()

        return carry

    lax.fori_loop(0, jnp.where(count > 0, count + IN_FLIGHT, 0), step, jnp.int32(0))
