"""Which rows of a batch are valid, and what their queries see. Shared by all kernels in JAX.

Numbers inside arrays are not trusted. A row is malformed when its queries run backwards or outside the batch, when
its context is shorter than its queries or longer than its part of the block table, or when a page that it needs is
not in the cache. Such a row gives zeros and writes nothing.

A wrong number in ``query_start_loc`` changes the rows on both sides of it, and they may then overlap good rows. A token
in two rows is written for both, so the good rows lose none. Its output is that of either row.

:func:`first_visible`, :func:`visible_keys` and :func:`is_visible` are the only definition of what a query sees. They
and the functions of single rows take scalars as well as arrays, so that a GPU kernel can use them.
"""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .types import AttentionRequest, Distribution, Operands

__all__ = [
    "CHECK_VARIABLE",
    "Rows",
    "assign_parts",
    "checking",
    "exclusive_sum",
    "first_visible",
    "is_visible",
    "lacks_page",
    "live_rows",
    "needed_entries",
    "plausible_rows",
    "report_bad_rows",
    "report_other_rows",
    "visible_keys",
]

CHECK_VARIABLE = "EASYDEL_RAGGED_CHECK"

logger = logging.getLogger("easydel_ragged_plugin")


class Rows(NamedTuple):
    """Row geometry, ``[rows]`` int32 each. Rows that are dead or malformed have no queries."""

    query_start: jax.Array
    num_queries: jax.Array
    context: jax.Array


def first_visible(request: AttentionRequest, position: Any, xp: Any = jnp) -> Any:
    """First key position that a query at ``position`` sees; ``xp`` is the array module to compute it with.

    A later query of a row never sees earlier keys, so the first position that several see is that of the first one.
    """
    first, window, chunk = xp.zeros_like(position), request.options.window, request.options.chunk
    if window is not None:
        first = xp.maximum(position - (window - 1), first)
    if chunk is not None:
        first = xp.maximum(position - position % chunk, first)
    return first


def visible_keys(request: AttentionRequest, first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key positions ``[begin, end)`` that the queries of a tile, at positions ``[first, last]``, see together."""
    return first_visible(request, first), last + 1


def is_visible(request: AttentionRequest, key: jax.Array, query: jax.Array) -> jax.Array:
    """Whether queries at positions ``query`` see keys at positions ``key``, which broadcast against them."""
    visible = key <= query
    if request.options.is_local:
        visible &= key >= first_visible(request, query)
    return visible


def needed_entries(
    request: AttentionRequest, context: jax.Array, num_queries: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and last entry of the block table that a row's queries need."""
    begin, end = visible_keys(request, context - num_queries, context - 1)
    return lax.div(begin, jnp.int32(request.page_size)), lax.div(end - 1, jnp.int32(request.page_size))


def plausible_rows(request: AttentionRequest, operands: Operands) -> Rows:
    """Rows whose lengths are valid. Their part of the block table is not checked."""
    start, end = operands.query_start_loc[:-1], operands.query_start_loc[1:]
    num_queries = end - start
    context = operands.context_lens
    live = jnp.arange(request.num_rows, dtype=jnp.int32) < operands.distribution[2]  # Distribution.total
    live &= (start >= 0) & (num_queries > 0) & (end <= request.num_tokens)
    live &= (context >= num_queries) & (context <= request.pages_per_row * request.page_size)
    return Rows(start, jnp.where(live, num_queries, 0), context)


def lacks_page(request: AttentionRequest, rows: Rows, block_tables: jax.Array) -> jax.Array:
    """``[rows]``: whether any page that a row needs is not in the cache."""
    first, last = needed_entries(request, rows.context, rows.num_queries)
    entry = jnp.arange(request.pages_per_row, dtype=jnp.int32)[None, :]
    needed = (entry >= first[:, None]) & (entry <= last[:, None])
    return jnp.any(needed & ((block_tables < 0) | (block_tables >= request.num_pages)), axis=1)


def live_rows(request: AttentionRequest, operands: Operands) -> Rows:
    """Rows that are valid; all others have zero queries, so nothing of them is read or written."""
    rows = plausible_rows(request, operands)
    lacks = lacks_page(request, rows, operands.block_tables)
    return rows._replace(num_queries=jnp.where(lacks, 0, rows.num_queries))


def exclusive_sum(counts: jax.Array) -> jax.Array:
    """Sum of the counts of earlier rows, for each row."""
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(row[None, :] < row[:, None], counts[None, :], 0), axis=1, dtype=jnp.int32)


def assign_parts(
    counts: jax.Array, num_parts: int, first_part: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assign parts to rows, ``counts[r]`` of them to row r: (row, index within the row, whether the part exists) of the
    ``num_parts`` parts from ``first_part`` on.

    This compares all pairs, which becomes one GPU kernel; ``cumsum`` and ``searchsorted`` become a dozen small ones
    each.
    """
    start = exclusive_sum(counts)
    part = first_part + jnp.arange(num_parts, dtype=jnp.int32)
    row = jnp.sum((start + counts)[None, :] <= part[:, None], axis=1, dtype=jnp.int32)
    live = row < counts.shape[0]
    row = jnp.where(live, row, 0)
    return row, jnp.where(live, part - start[row], 0), live


def checking() -> bool:
    """Whether ``EASYDEL_RAGGED_CHECK`` is set: malformed rows are reported."""
    return os.environ.get(CHECK_VARIABLE, "") not in ("", "0")


def report_bad_rows(
    request: AttentionRequest, context_lens: Any, block_tables: Any, query_start_loc: Any, distribution: Any
) -> None:
    """Log the defect of each row that a kernel skips. Takes the values of the index arrays, in NumPy."""
    lens, tables, starts = (np.asarray(array) for array in (context_lens, block_tables, query_start_loc))
    total = int(Distribution(*np.asarray(distribution)).total)
    if not 0 <= total <= request.num_rows:
        logger.error("%s: distribution says %d rows, the block table has %d", CHECK_VARIABLE, total, request.num_rows)
    for row in range(min(max(total, 0), request.num_rows)):
        start, end, context = int(starts[row]), int(starts[row + 1]), int(lens[row])
        problem = None if start == end else _problem(request, start, end, context, tables[row])
        if problem is not None:
            logger.error("%s: row %d of %s is skipped: %s", CHECK_VARIABLE, row, request.describe(), problem)


def report_other_rows(prepared: Any, given: Any) -> None:
    """Log the index arrays of a call that are not those which its ``prepared`` was made of. Takes values in NumPy."""
    for name, wanted, got in zip(("context_lens", "query_start_loc", "distribution"), prepared, given, strict=True):
        if not np.array_equal(wanted, got):
            logger.error("%s: prepared= was made of %s %s, the call has %s", CHECK_VARIABLE, name, wanted, got)


def _problem(request: AttentionRequest, start: int, end: int, context: int, table: np.ndarray) -> str | None:
    """The defect of a row that has tokens ``[start, end)``, or None."""
    capacity = request.pages_per_row * request.page_size
    if not 0 <= start < end <= request.num_tokens:
        return f"its tokens are [{start}, {end}) of {request.num_tokens}"
    if context < end - start:
        return f"its context of {context} tokens is shorter than its {end - start} new ones"
    if context > capacity:
        return f"its context of {context} tokens exceeds the {capacity} of its part of the block table"
    first = int(first_visible(request, np.int64(context - (end - start)), np))
    needed = table[first // request.page_size : -(-context // request.page_size)]
    outside = needed[(needed < 0) | (needed >= request.num_pages)]
    return f"it needs page {int(outside[0])}, the cache has {request.num_pages}" if outside.size else None
