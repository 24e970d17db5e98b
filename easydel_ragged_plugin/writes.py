"""Writing v3's new keys and values: slots of tokens, and the cast to the cache's dtype. Shared by kernels in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .rows import Rows, assign_parts
from .types import AttentionRequest, Operands

__all__ = ["select_slots", "sources_of_slots", "to_cache_dtype", "too_many_slots", "write_tokens"]

State = TypeVar("State")


def too_many_slots(request: AttentionRequest) -> str | None:
    """Why :func:`write_tokens` can't write the pages, or None: it counts their slots in 32 bits."""
    slots = request.num_pages * request.page_size
    if not request.writes_pages or slots < 2**31:
        return None
    return f"writes to {request.num_pages} pages of {request.page_size} tokens: more than {2**31 - 1} slots"


def write_tokens(
    request: AttentionRequest,
    rows: Rows,
    operands: Operands,
    write: Callable[[jax.Array, jax.Array, State], State],
    state: State,
) -> State:
    """``state`` after ``write(token, slot, state)`` for every new token of every live row.

    ``token`` and ``slot`` are ``[tokens]``: indices of tokens, and the indices of their slots among
    ``[pages * page_size]``. Where there is no token, the slot is one past the end, for ``mode="drop"``. Valid rows
    share no token, so one step writes all. Rows that overlap have more tokens and need more steps.
    """
    page_size = jnp.int32(request.page_size)

    def step(trip: jax.Array, state: State) -> State:
        row, index, live = assign_parts(rows.num_queries, request.num_tokens, trip * request.num_tokens)
        position = jnp.where(live, rows.context[row] - rows.num_queries[row] + index, 0)
        page = operands.block_tables[row, lax.div(position, page_size)]
        slot = page * page_size + lax.rem(position, page_size)
        slot = jnp.where(live, slot, request.num_pages * request.page_size)
        return write(jnp.where(live, rows.query_start[row] + index, 0), slot, state)

    total = jnp.sum(rows.num_queries, dtype=jnp.int32)
    return lax.fori_loop(0, -(-total // request.num_tokens), step, state)


def to_cache_dtype(array: jax.Array, request: AttentionRequest) -> jax.Array:
    """Cast to the cache's dtype. 8-bit dtypes saturate: a plain cast would give NaN, infinity or a wrapped number.

    The range of integers is symmetric: -128 is never written.
    """
    if request.cache_dtype.itemsize == 1 and array.dtype != request.cache_dtype:
        if jnp.issubdtype(request.cache_dtype, jnp.integer):
            return jnp.clip(jnp.round(array), -127, 127).astype(request.cache_dtype)
        limit = float(jnp.finfo(request.cache_dtype).max)
        array = jnp.clip(array, -limit, limit)
    return array.astype(request.cache_dtype)


def sources_of_slots(request: AttentionRequest, rows: Rows, operands: Operands) -> jax.Array:
    """The token that is written to each slot, ``[pages, page_size]`` int32; the number of tokens for none."""

    def note(token: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
        return source.at[slot].set(token, mode="drop")

    source = jnp.full(request.num_pages * request.page_size, request.num_tokens, jnp.int32)
    return write_tokens(request, rows, operands, note, source).reshape(request.num_pages, request.page_size)


def select_slots(pages: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """One elementwise pass, in place, that takes either the old or the new bits of each slot.

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
