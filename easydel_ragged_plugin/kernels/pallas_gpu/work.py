"""Lists of work: which row, and which part of it, each program of a kernel takes.

Rows differ in length, and a grid is fixed while a call is traced. So the parts of all rows are put into one list by
a prefix sum over rows, and program i takes part i. The list has room for ``total / part + rows`` parts, because each
row wastes less than one; programs past its end find no row and do nothing. The lists depend on row lengths alone:
neither the width of the block table nor dead rows add work.

This is plain JAX on ``[rows]`` and ``[parts]`` vectors, outside of the kernels. The layers of a model share their
metadata, so XLA computes a list once for all of them.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from easydel_ragged_plugin.rows import Rows, assign_parts, exclusive_sum, visible_keys
from easydel_ragged_plugin.types import AttentionRequest

from .tiles import Tiles

__all__ = ["Column", "DecodeWork", "decode_work", "query_work"]


class Column(enum.IntEnum):
    """Columns of a work list, ``[parts, len(Column)]`` int32. A part of no row has zeros everywhere."""

    ROW = 0
    START = 1
    """First token of the row."""
    TOKENS = 2
    """New tokens of the row."""
    CONTEXT = 3
    """Tokens of the row's context."""
    FIRST = 4
    """The part's first token, counted from the row's (prefill, update), or its first block of keys (decode)."""
    END = 5
    """Block of keys after the part's last one (decode)."""
    PARTIAL = 6
    """Index of the part's partial (decode), or of the row's first one (merge)."""
    PARTS = 7
    """Parts of the row."""


def _cdiv(value: jax.Array, by: int | jax.Array) -> jax.Array:
    return lax.div(value + (by - 1), jnp.broadcast_to(jnp.asarray(by, jnp.int32), value.shape))


def _table(rows: Rows, row: jax.Array, live: jax.Array, **columns: jax.Array) -> jax.Array:
    found = {
        "ROW": row,
        "START": rows.query_start[row],
        "TOKENS": rows.num_queries[row],
        "CONTEXT": rows.context[row],
        **columns,
    }
    zeros = jnp.zeros_like(row)
    return jnp.where(live[:, None], jnp.stack([found.get(column.name, zeros) for column in Column], axis=1), 0)


def query_work(request: AttentionRequest, rows: Rows, tokens: int, more_than: int = 0) -> jax.Array:
    """Tiles of ``tokens`` new tokens of all rows that have more than ``more_than`` of them.

    There is room for twice the tokens that there are: one wrong start lets a row claim all of them, and the good rows
    after it must still find their place.
    """
    counts = jnp.where(rows.num_queries > more_than, _cdiv(rows.num_queries, tokens), 0)
    num_parts = 2 * (request.num_tokens // tokens) + min(request.num_rows, request.num_tokens)
    row, index, live = assign_parts(counts, num_parts)
    return _table(rows, row, live, FIRST=index * tokens)


class DecodeWork(NamedTuple):
    """Split-KV work of rows with few tokens.

    Attributes:
        parts: ranges of key blocks; ``PARTS`` is 1 where a part is its row's only one.
        merges: rows of several parts, whose partials are to be merged; None where no row can have several.
        num_partials: room for partials.
    """

    parts: jax.Array
    merges: jax.Array | None
    num_partials: int


def decode_work(request: AttentionRequest, tiles: Tiles, rows: Rows, most_tokens: int) -> DecodeWork:
    """Ranges of key blocks of all rows with up to ``most_tokens`` new tokens.

    The rule: ``tiles.programs`` programs should run, of ``tiles.least_blocks`` blocks each at least. All live blocks
    divided by the programs of one kv head give the blocks of a part; a row of more blocks is split evenly. One long
    row is split as finely as the chip is wide; among equal rows that fill the chip none is split.
    """
    block = tiles.decode.keys
    wanted = max(1, -(-tiles.programs // request.num_kv_heads))
    most_blocks = -(-request.pages_per_row * request.page_size // block)
    most_parts = -(-most_blocks // tiles.least_blocks)

    seen_begin, seen_end = visible_keys(request, rows.context - rows.num_queries, rows.context - 1)
    first = lax.div(seen_begin, jnp.int32(block))
    blocks = jnp.where((rows.num_queries > 0) & (rows.num_queries <= most_tokens), _cdiv(seen_end, block) - first, 0)
    share = jnp.maximum(tiles.least_blocks, _cdiv(jnp.sum(blocks, dtype=jnp.int32), wanted))
    counts = _cdiv(blocks, share)
    row, index, live = assign_parts(counts, min(request.num_rows + wanted, request.num_rows * most_parts))
    each = _cdiv(blocks, jnp.maximum(counts, 1))  # the row's own share: its parts are even
    begin = first[row] + index * each[row]
    end = jnp.minimum(begin + each[row], first[row] + blocks[row])

    several = counts > 1
    partials = exclusive_sum(jnp.where(several, counts, 0))
    # A row of several parts has more than half of a share in each of them on average.
    num_partials = min(2 * wanted, request.num_rows * most_parts)
    parts = _table(rows, row, live, FIRST=begin, END=end, PARTIAL=partials[row] + index, PARTS=counts[row])
    if most_parts == 1:
        return DecodeWork(parts, None, num_partials)
    row, _, live = assign_parts(several.astype(jnp.int32), min(request.num_rows, wanted))
    return DecodeWork(parts, _table(rows, row, live, PARTIAL=partials[row], PARTS=counts[row]), num_partials)
