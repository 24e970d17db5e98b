"""Writing into a few slots of a cache on a CPU, where a scatter would go through all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from easydel_ragged_plugin.rows import Rows, write_tokens
from easydel_ragged_plugin.types import AttentionRequest, Operands

__all__ = ["select_slots", "sources_of_slots"]


def sources_of_slots(request: AttentionRequest, rows: Rows, operands: Operands) -> jax.Array:
    """Token whose key and value each slot takes, ``[pages, page_size]`` int32; the number of tokens for none."""

    def note(token: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
        return source.at[slot].set(token, mode="drop")

    source = jnp.full(request.num_pages * request.page_size, request.num_tokens, jnp.int32)
    return write_tokens(request, rows, operands, note, source).reshape(request.num_pages, request.page_size)


def select_slots(pages: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """One in-place elementwise pass that takes either the old or the new bits of each slot.

    XLA's CPU backend turns a scatter into a loop of updates, in float32 over the whole cache for the short float types,
    and copies the cache when another loop reads the result. This select is over integers and in the cache's own shape,
    so it fuses into one loop over slots in place; for a slot that keeps its bits the loop's body is a copy onto itself,
    which memmove skips.
    """
    num_tokens = new.shape[0]
    bits = jnp.dtype(f"uint{8 * pages.dtype.itemsize}")
    new = lax.bitcast_convert_type(new, bits).reshape(num_tokens, *pages.shape[2:])
    written = jnp.expand_dims(source < num_tokens, tuple(range(2, pages.ndim)))
    merged = jnp.where(written, new[jnp.minimum(source, num_tokens - 1)], lax.bitcast_convert_type(pages, bits))
    return lax.bitcast_convert_type(merged, pages.dtype)
