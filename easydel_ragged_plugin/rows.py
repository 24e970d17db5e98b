"""Which rows of a batch can be served, and what of their contexts and new tokens counts. Shared by all kernels in JAX.

Numbers inside arrays are not trusted. A row is malformed when its queries run backwards or outside the batch, when
its context is shorter than its queries or longer than its part of the block table, or when a page that it needs is
not in the cache. Such a row gives zeros, and nothing of it is written.

A wrong number in ``query_start_loc`` spoils the rows on both sides of it, and what is left of them may reach into the
tokens of good rows. Each row is taken at its word: a token that two rows claim is written for both, so the good ones
keep all of theirs. Its output is that of either.

The functions of single rows take scalars as well as arrays, so they serve inside of a GPU kernel, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .types import AttentionRequest, Operands

__all__ = [
    "Rows",
    "before",
    "first_position",
    "live_rows",
    "needed_entries",
    "plausible_rows",
    "spread",
    "to_cache_dtype",
    "write_tokens",
]

State = TypeVar("State")


class Rows(NamedTuple):
    """Row geometry, [rows] int32 each. Rows that are dead or malformed have no queries."""

    query_start: jax.Array
    num_queries: jax.Array
    context: jax.Array


def first_position(request: AttentionRequest, position: jax.Array) -> jax.Array:
    """First key position that a query at ``position`` sees."""
    if request.sliding_window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - (request.sliding_window - 1), 0)


def needed_entries(
    request: AttentionRequest, context: jax.Array, num_queries: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and last entry of the block table that a row's queries need."""
    first = lax.div(first_position(request, context - num_queries), jnp.int32(request.page_size))
    return first, lax.div(context - 1, jnp.int32(request.page_size))


def plausible_rows(request: AttentionRequest, operands: Operands) -> Rows:
    """Rows whose lengths make sense. Their part of the block table has not been looked at."""
    start, end = operands.query_start_loc[:-1], operands.query_start_loc[1:]
    num_queries = end - start
    context = operands.context_lens
    live = jnp.arange(request.num_rows, dtype=jnp.int32) < operands.distribution[2]
    live &= (start >= 0) & (num_queries > 0) & (end <= request.num_tokens)
    live &= (context >= num_queries) & (context <= request.pages_per_row * request.page_size)
    return Rows(start, jnp.where(live, num_queries, 0), context)


def live_rows(request: AttentionRequest, operands: Operands) -> Rows:
    """Rows that can be served; all others get zero queries, so nothing of theirs is read or written."""
    rows = plausible_rows(request, operands)
    first, last = needed_entries(request, rows.context, rows.num_queries)
    entry = jnp.arange(request.pages_per_row, dtype=jnp.int32)
    needed = (entry >= first[:, None]) & (entry <= last[:, None])
    outside = (operands.block_tables < 0) | (operands.block_tables >= request.num_pages)
    bad = jnp.any(needed & outside, axis=1)
    return rows._replace(num_queries=jnp.where(bad, 0, rows.num_queries))


def before(counts: jax.Array) -> jax.Array:
    """Sum of the counts of earlier rows, for each row."""
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(row[None, :] < row[:, None], counts[None, :], 0), axis=1, dtype=jnp.int32)


def spread(
    counts: jax.Array, num_parts: int, first_part: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(row, index within the row, whether there is such a part) of ``num_parts`` parts, ``counts[r]`` of row r.

    Comparing all pairs takes the place of ``cumsum`` and ``searchsorted``, which become a dozen small GPU kernels each;
    these become one each.
    """
    start = before(counts)
    part = first_part + jnp.arange(num_parts, dtype=jnp.int32)
    row = jnp.sum((start + counts)[None, :] <= part[:, None], axis=1, dtype=jnp.int32)
    live = row < counts.shape[0]
    row = jnp.where(live, row, 0)
    return row, jnp.where(live, part - start[row], 0), live


def write_tokens(
    request: AttentionRequest,
    rows: Rows,
    operands: Operands,
    write: Callable[[jax.Array, jax.Array, State], State],
    state: State,
) -> State:
    """``state`` after ``write(token, slot, state)`` for every new token of every live row.

    ``token`` and ``slot`` are ``[tokens]``: a token of the batch, and its slot in the cache seen as
    ``[pages * page_size]``; where there is none, the slot is one past the end, for ``mode="drop"``. Rows that make
    sense share no token, and one step takes all. Rows that overlap have more, and take more steps.
    """
    page_size = jnp.int32(request.page_size)

    def step(trip: jax.Array, state: State) -> State:
        row, index, live = spread(rows.num_queries, request.num_tokens, trip * request.num_tokens)
        position = jnp.where(live, rows.context[row] - rows.num_queries[row] + index, 0)
        page = operands.block_tables[row, lax.div(position, page_size)]
        slot = page * page_size + lax.rem(position, page_size)
        slot = jnp.where(live, slot, request.num_pages * request.page_size)
        return write(jnp.where(live, rows.query_start[row] + index, 0), slot, state)

    total = jnp.sum(rows.num_queries, dtype=jnp.int32)
    return lax.fori_loop(0, -(-total // request.num_tokens), step, state)


def to_cache_dtype(array: jax.Array, request: AttentionRequest) -> jax.Array:
    """Cast to the cache's dtype; 8-bit ones saturate, where a plain cast would give NaN, infinity or a wrapped number.

    Integers are symmetric, so that the least one, which has no opposite, is never written.
    """
    if request.cache_dtype.itemsize == 1 and array.dtype != request.cache_dtype:
        if jnp.issubdtype(request.cache_dtype, jnp.integer):
            return jnp.clip(jnp.round(array), -127, 127).astype(request.cache_dtype)
        limit = float(jnp.finfo(request.cache_dtype).max)
        array = jnp.clip(array, -limit, limit)
    return array.astype(request.cache_dtype)
