"""Lists of work: which row, and which part of it, each program of a kernel takes.

Rows differ in length, and a grid is fixed while a call is traced. So the parts of all rows are put into one list by
a prefix sum over rows, and program i takes part i. A list has room for as many parts as the tokens and the contexts can
hold; programs past its end find no row and do nothing. The lists depend on row lengths alone: neither the width of the
block table nor dead rows add work.

This is plain JAX on ``[rows]``, ``[parts]`` and ``[tokens]`` vectors, outside of the kernels. The layers of a model
share their metadata, so XLA computes the lists once for all of them; inside of a loop over layers they come from the
caller (``api.prepare``).
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

__all__ = [
    "Column",
    "DecodeRoom",
    "Work",
    "decode_room",
    "decode_work",
    "has_row",
    "listed_rows",
    "query_room",
    "query_work",
    "work_of",
]


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


class Work(NamedTuple):
    """All lists of a call, int32; None where it has no such kernel.

    Attributes:
        update: tiles of new tokens to write.
        parts: ranges of key blocks of rows that are decoded; ``PARTS`` is 1 where a part is its row's only one.
        merges: rows of several parts, whose partials are to be merged.
        prefill: tiles of new tokens of all longer rows.
        used: ``[tokens]``, 1 where a part or a tile has the token, and 0 where none has.
    """

    update: jax.Array | None
    parts: jax.Array
    merges: jax.Array | None
    prefill: jax.Array | None
    used: jax.Array


def work_of(request: AttentionRequest, sizes: Tiles, rows: Rows) -> Work:
    """All lists of a call."""
    decoded = sizes.decoded_tokens(request)
    update = query_work(request, rows, sizes.update_tokens) if request.writes_pages else None
    parts, merges = decode_work(request, sizes, rows)
    prefill, stored = None, rows
    if request.num_tokens > decoded:
        tokens = sizes.prefill.queries // request.group_size
        prefill = query_work(request, rows, tokens, decoded)
        listed = listed_rows(request, rows, tokens, decoded)
        stored = rows._replace(num_queries=jnp.where(rows.num_queries > decoded, listed.num_queries, rows.num_queries))
    return Work(update, parts, merges, prefill, has_row(request, stored))


def has_row(request: AttentionRequest, rows: Rows) -> jax.Array:
    """``[tokens]`` int32: 1 where any row has the token, else 0."""
    token = jnp.arange(request.num_tokens, dtype=jnp.int32)[:, None]
    within = (token >= rows.query_start[None, :]) & (token < (rows.query_start + rows.num_queries)[None, :])
    return jnp.max(within.astype(jnp.int32), axis=1)


def query_counts(rows: Rows, tokens: int, more_than: int) -> jax.Array:
    """Tiles of ``tokens`` new tokens of each row that has more than ``more_than`` of them."""
    return jnp.where(rows.num_queries > more_than, _cdiv(rows.num_queries, tokens), 0)


def query_room(request: AttentionRequest, tokens: int, more_than: int = 0) -> int:
    """Most tiles that rows of more than ``more_than`` tokens have.

    n tokens in r rows fill ``(n - r) // tokens + r`` tiles at most. A wrong start lets one row claim all tokens, and
    the good rows after it must still find their place.
    """
    rows = min(request.num_rows - 1, request.num_tokens // (more_than + 1))
    good = (request.num_tokens - rows) // tokens + rows if rows else 0
    return good + -(-request.num_tokens // tokens)


def listed_rows(request: AttentionRequest, rows: Rows, tokens: int, more_than: int) -> Rows:
    """The rows of :func:`query_work` as far as its list has room for their tiles; all others without queries."""
    counts = query_counts(rows, tokens, more_than)
    listed = jnp.clip(query_room(request, tokens, more_than) - exclusive_sum(counts), 0, counts)
    return rows._replace(num_queries=jnp.minimum(rows.num_queries, listed * tokens))


def query_work(request: AttentionRequest, rows: Rows, tokens: int, more_than: int = 0) -> jax.Array:
    """Tiles of ``tokens`` new tokens of all rows that have more than ``more_than`` of them."""
    room = query_room(request, tokens, more_than)
    row, index, live = assign_parts(query_counts(rows, tokens, more_than), room)
    return _table(rows, row, live, FIRST=index * tokens)


class DecodeRoom(NamedTuple):
    """Room for split contexts: parts, rows of several parts, and their partial results."""

    parts: int
    merges: int
    partials: int


def decode_room(request: AttentionRequest, tiles: Tiles) -> DecodeRoom:
    """What any row lengths need; no merges and no partials where no row can have several parts."""
    block = tiles.decode.keys
    most_blocks = -(-request.pages_per_row * request.page_size // block)
    for limit in (request.options.window, request.options.chunk):
        if limit is not None:
            # The tokens of a row see this many keys together, which may begin at any slot of a block.
            seen = limit + tiles.decoded_tokens(request) - 1
            most_blocks = min(most_blocks, (seen + block - 2) // block + 1)
    most_parts = -(-most_blocks // tiles.least_blocks)
    if most_parts == 1:
        return DecodeRoom(request.num_rows, 0, 0)
    rows, wanted = request.num_rows, _wanted_parts(request, tiles)
    # A row of several parts has more than half of a share in each of them on average.
    return DecodeRoom(min(rows + wanted, rows * most_parts), min(rows, wanted), min(2 * wanted, rows * most_parts))


def _wanted_parts(request: AttentionRequest, tiles: Tiles) -> int:
    return max(1, -(-tiles.programs // request.num_kv_heads))


def decode_work(request: AttentionRequest, tiles: Tiles, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
    """``parts`` and ``merges`` of :class:`Work`: ranges of key blocks of all rows with few tokens.

    The rule: ``tiles.programs`` programs should run, of ``tiles.least_blocks`` blocks each at least. All live blocks
    divided by the programs of one kv head give the blocks of a part; a row of more blocks is split evenly. One long
    row is split as finely as the chip is wide; among equal rows that fill the chip none is split.
    """
    block, room = tiles.decode.keys, decode_room(request, tiles)
    seen_begin, seen_end = visible_keys(request, rows.context - rows.num_queries, rows.context - 1)
    first = lax.div(seen_begin, jnp.int32(block))
    decoded = (rows.num_queries > 0) & (rows.num_queries <= tiles.decoded_tokens(request))
    blocks = jnp.where(decoded, _cdiv(seen_end, block) - first, 0)
    wanted = _cdiv(jnp.sum(blocks, dtype=jnp.int32), _wanted_parts(request, tiles))
    counts = _cdiv(blocks, jnp.maximum(tiles.least_blocks, wanted))
    row, index, live = assign_parts(counts, room.parts)
    each = _cdiv(blocks, jnp.maximum(counts, 1))  # the row's own share: its parts are even
    begin = first[row] + index * each[row]
    end = jnp.minimum(begin + each[row], first[row] + blocks[row])
    several = counts > 1
    partials = exclusive_sum(jnp.where(several, counts, 0))
    parts = _table(rows, row, live, FIRST=begin, END=end, PARTIAL=partials[row] + index, PARTS=counts[row])
    if not room.merges:
        return parts, None
    row, _, live = assign_parts(several.astype(jnp.int32), room.merges)
    return parts, _table(rows, row, live, PARTIAL=partials[row], PARTS=counts[row])
