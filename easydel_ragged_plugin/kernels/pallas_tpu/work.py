"""Lists of work for the kernel, and its arrays as it reads them: plain JAX, outside of it.

A list is one flat int32 array, column after column, because scalar memory holds arrays of one axis without padding.
Its last entry is of no row: a cursor that has passed all work stays there.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from easydel_ragged_plugin.rows import Rows, assign_parts, needed_entries
from easydel_ragged_plugin.types import AttentionRequest, Operands

from .blocks import TABLE_CHUNK, Block

__all__ = ["Item", "Segment", "WorkList", "chunked_tables", "query_tiles", "segments_to_write"]


class Item(enum.IntEnum):
    """Columns of a list of query tiles."""

    ROW = 0
    TOKEN = 1
    """Token of the tile's first query."""
    COUNT = 2
    """Tokens of the tile."""
    POSITION = 3
    """Position of the first query in its row."""
    PAGE = 4
    """First entry of the block table that a query of the tile needs."""
    PAGE_END = 5
    """The entry after the last one that is needed."""
    BEGIN = 6
    """First block of keys; blocks begin at multiples of their size."""
    END = 7
    """The block after the last one."""


class Segment(enum.IntEnum):
    """Columns of a list of new tokens that lie in one page."""

    TOKEN = 0
    PAGE = 1
    SLOT = 2
    COUNT = 3


class WorkList(NamedTuple):
    """Entries ``[len(columns) * capacity]`` int32, and ``[1]``: how much of the list is to be done."""

    entries: jax.Array
    total: jax.Array


def _listed(columns: list[jax.Array], live: jax.Array, total: jax.Array) -> WorkList:
    entries = jnp.where(live[None, :], jnp.stack(columns), 0)
    return WorkList(jnp.pad(entries, ((0, 0), (0, 1))).reshape(-1), total.reshape(1))


def most_tiles(request: AttentionRequest, block: Block) -> int:
    """Room in the list of tiles of rows with more than one new token."""
    return min(2 * (request.num_tokens // block.tokens) + request.num_rows, request.num_rows * request.num_tokens)


def query_tiles(
    request: AttentionRequest, block: Block, rows: Rows, first_token: jax.Array, *, decode: bool
) -> WorkList:
    """Tiles of up to ``block.tokens`` queries, of rows with one new token or of those with more. The total is that of
    their key blocks. ``first_token [rows]``: where the queries of a row begin.

    There is room for twice the tokens that there are: one wrong start lets a row claim all of them, and the good rows
    after it must still find their place.
    """
    if decode:
        counts, most = (rows.num_queries == 1).astype(jnp.int32), request.num_rows
    else:
        tiles = lax.div(rows.num_queries + (block.tokens - 1), jnp.int32(block.tokens))
        counts, most = jnp.where(rows.num_queries > 1, tiles, 0), most_tiles(request, block)
    row, index, live = assign_parts(counts, most)
    first, tokens = index * block.tokens, rows.num_queries[row]
    count = jnp.minimum(tokens - first, block.tokens)
    position = rows.context[row] - tokens + first
    page, last_page = needed_entries(request, position + count, count)
    pages = jnp.int32(block.pages(request.page_size))
    begin, end = lax.div(page, pages), lax.div(last_page, pages) + 1
    total = jnp.sum(jnp.where(live, end - begin, 0), dtype=jnp.int32)
    columns = [row, first_token[row] + first, count, position, page, last_page + 1, begin, end]
    return _listed(columns, live, total)


def segments_to_write(request: AttentionRequest, rows: Rows, operands: Operands) -> WorkList:
    """The new tokens of all rows, cut at the edges of pages. The total is that of the segments."""
    page_size = jnp.int32(request.page_size)
    start = rows.context - rows.num_queries
    first = lax.div(start, page_size)
    counts = jnp.where(rows.num_queries > 0, lax.div(rows.context - 1, page_size) - first + 1, 0)
    tokens = 2 * request.num_tokens  # as in query_tiles
    most = min(tokens, tokens // request.page_size + 2 * request.num_rows)
    row, index, live = assign_parts(counts, most)
    entry = first[row] + index
    begin = jnp.maximum(start[row], entry * page_size)
    end = jnp.minimum(rows.context[row], (entry + 1) * page_size)
    page = operands.block_tables[row, jnp.where(live, entry, 0)]
    columns = [rows.query_start[row] + begin - start[row], page, begin - entry * page_size, end - begin]
    return _listed(columns, live, jnp.minimum(jnp.sum(counts, dtype=jnp.int32), most))


def chunked_tables(tables: jax.Array) -> jax.Array:
    """The block table as ``[rows, chunks, 1, entries of a chunk]``: any chunk of it can be copied by itself."""
    rows, width = tables.shape
    chunks = -(-width // TABLE_CHUNK)
    padded = jnp.pad(tables, ((0, 0), (0, chunks * TABLE_CHUNK - width)))
    return padded.reshape(rows, chunks, 1, TABLE_CHUNK)
