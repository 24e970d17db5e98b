"""Attention kernels: decode with split contexts, and prefill.

One program of decode or prefill takes one part of one row (see ``work.py``) for one kv head. Its query tokens and the
query heads of the group are the rows of one tile, so a key is read once for all of them. It walks over blocks of keys
with the online softmax of FlashAttention (Dao et al., 2022, arXiv 2205.14135); the loop's bounds are read from the
work list, so they end at the live context and begin at the window. Blocks that every query of the tile sees whole are
not masked. Long contexts are split between programs (flash-decoding), and ``merge.py`` joins their float32 results.

Nothing is decided by a branch: a program without work has loops of no trips and stores that are masked off.

**Addresses.** Pages are indexed as ``[page, slot, element of the slot]``, each with its own int32, which none exceeds.
Their strides are applied by Pallas, in 64 bits where an array is larger than 2**32 bytes. Below that it takes 32 signed
bits for the number of *elements*, which suffices for elements of two bytes and more; 8-bit caches between the two
bounds are refused (``PallasGPU.refuses``).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.rows import first_visible, is_visible, needed_entries
from easydel_ragged_plugin.types import AttentionRequest

from .tiles import Tile, power_of_two
from .work import Column, DecodeWork

__all__ = [
    "Softmax",
    "attend_decode",
    "attend_prefill",
    "grid_of",
    "iota",
    "launch",
    "normalize",
    "row_has_pages",
]

LOG2_E = math.log2(math.e)
"""Logits are held in powers of two: a GPU has an instruction for ``exp2``."""

ENTRIES = 256
"""Entries of the block table that are looked at in one step."""


class Softmax(NamedTuple):
    """Running state of an online softmax, float32: ``[rows]``, ``[rows]`` and ``[rows, lanes]``."""

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array


def iota(size: int) -> jax.Array:
    """``[0, size)`` in int32."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def grid_of(array: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """A vector laid along ``axis`` of a tile; a scalar all over it. Every index of a tile has the tile's shape."""
    return lax.broadcast_in_dim(array, shape, (axis,) if array.ndim else ())


def row_has_pages(
    request: AttentionRequest, tables: Any, row: jax.Array, context: jax.Array, queries: jax.Array
) -> jax.Array:
    """Whether every page that a row needs is in the cache. Costs 4 bytes for each of these pages, whatever the table's
    width."""
    first, last = needed_entries(request, context, queries)
    steps = jnp.where(queries > 0, lax.div(last - first, jnp.int32(ENTRIES)) + 1, 0)

    def step(index: jax.Array, outside: jax.Array) -> jax.Array:
        entry = first + index * ENTRIES + iota(ENTRIES)
        needed = entry <= last
        page = pltriton.load(tables.at[jnp.broadcast_to(row, (ENTRIES,)), entry], mask=needed, other=0)
        return outside | jnp.where(needed & ((page < 0) | (page >= request.num_pages)), 1, 0)

    return jnp.max(lax.fori_loop(0, steps, step, jnp.zeros((ENTRIES,), jnp.int32))) == 0


class Queries(NamedTuple):
    """The query side of a tile. Row m of it is query token ``m // group`` and head ``m % group`` of the group."""

    operand: jax.Array
    """``[rows, lanes]`` in the compute dtype; zeros where there is no query."""
    position: jax.Array
    """[rows] position of each query in its context; that of the last one where there is no query."""
    first: jax.Array
    """Position of the first query."""
    last: jax.Array
    """Position of the last query."""
    token: jax.Array
    """[rows] index on the token axis."""
    offset: jax.Array
    """[rows] query token, counted from the tile's first."""
    head: jax.Array
    """[rows] query head."""
    there: jax.Array
    """[rows] whether there is a query."""


def load_queries(
    request: AttentionRequest,
    rows: int,
    queries: Any,
    kv_head: jax.Array,
    start: jax.Array,
    filled: jax.Array,
    first: jax.Array,
) -> Queries:
    """``filled`` query tokens from token ``start`` on, at positions from ``first`` on."""
    group, lanes = request.group_size, power_of_two(request.head_dim)
    row = iota(rows)
    offset = lax.div(row, jnp.int32(group))
    head = kv_head * group + lax.rem(row, jnp.int32(group))
    there = offset < filled
    # Rows without a query keep an index of their own: the interpreter writes what a masked store leaves, too.
    token = start + offset
    shape = (rows, lanes)
    lane = grid_of(iota(lanes), 1, shape)
    operand = pltriton.load(
        queries.at[grid_of(token, 0, shape), grid_of(head, 0, shape), lane],
        mask=grid_of(there, 0, shape) & (lane < request.head_dim),
        other=0.0,
    )
    last = first + filled - 1
    return Queries(
        operand.astype(request.compute_dtype),
        jnp.minimum(first + offset, last),
        first,
        last,
        token,
        offset,
        head,
        there,
    )


def load_block(
    request: AttentionRequest,
    size: int,
    tables: Any,
    pages: Any,
    row: jax.Array,
    kv_head: jax.Array,
    position: jax.Array,
    inside: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[size, lanes]`` at the positions of a block; zeros, unread, where ``inside`` is false."""
    layout, lanes = request.layout, power_of_two(request.head_dim)
    entry = lax.div(position, jnp.int32(layout.page_size))
    slot = lax.rem(position, jnp.int32(layout.page_size))
    page = pltriton.load(
        tables.at[jnp.broadcast_to(row, (size,)), entry], mask=inside, other=None if inside is None else 0
    )
    shape = (size, lanes)
    lane = grid_of(iota(lanes), 1, shape)
    mask = None if lanes == request.head_dim else lane < request.head_dim
    if inside is not None:
        rows = grid_of(inside, 0, shape)
        mask = rows if mask is None else mask & rows
    found = []
    for offset in (0, layout.value_offset):
        element = grid_of(kv_head * layout.head_stride + offset, 0, shape) + lane
        stored = pltriton.load(
            pages.at[grid_of(page, 0, shape), grid_of(slot, 0, shape), element],
            mask=mask,
            other=None if mask is None else 0.0,
        )
        found.append(stored.astype(request.compute_dtype))
    return found[0], found[1]


def product(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    """``left [m, k]`` by ``right`` over its axis ``contracted``, in float32. HIGHEST: float32 is not cut to TF32."""
    return lax.dot_general(
        left,
        right,
        (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def walk(
    request: AttentionRequest,
    tile: Tile,
    tables: Any,
    pages: Any,
    row: jax.Array,
    kv_head: jax.Array,
    queries: Queries,
    begin: jax.Array,
    end: jax.Array,
) -> Softmax:
    """The softmax of a tile of queries over the blocks of keys ``[begin, end)``."""
    lanes, size = power_of_two(request.head_dim), tile.keys
    first_key = first_visible(request, queries.first)
    scale = request.logits_scale
    cap = request.options.logits_soft_cap

    def step(masked: bool, block: jax.Array, state: Softmax) -> Softmax:
        position = block * size + iota(size)
        inside = (position >= first_key) & (position <= queries.last) if masked else None
        keys, values = load_block(request, size, tables, pages, row, kv_head, position, inside)
        logits = product(queries.operand, keys, 1)
        # In this order, so that a soft cap costs no further multiplication.
        logits = logits * (scale * LOG2_E) if cap is None else jnp.tanh(logits * (scale / cap)) * (cap * LOG2_E)
        if masked:
            shape = logits.shape
            key, query = grid_of(position, 1, shape), grid_of(queries.position, 0, shape)
            logits = jnp.where(is_visible(request, key, query), logits, -jnp.inf)
        maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=1))
        reference = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # -inf - -inf would be NaN
        weights = jnp.exp2(logits - reference[:, None])
        kept = jnp.exp2(state.maximum - reference)
        return Softmax(
            maximum,
            state.total * kept + jnp.sum(weights, axis=1),
            state.weighted * kept[:, None] + product(weights.astype(request.compute_dtype), values, 0),
        )

    # Blocks from `whole` to `diagonal` are seen whole by every query: none of them reaches past the first query, or
    # begins before the window of the last.
    diagonal = jnp.clip(lax.div(queries.first + 1, jnp.int32(size)), begin, end)
    whole = begin
    state = Softmax(
        jnp.full((tile.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
        jnp.zeros((tile.rows, lanes), jnp.float32),
    )
    if request.options.window is not None:
        last_first = first_visible(request, queries.last)
        whole = jnp.clip(lax.div(last_first + (size - 1), jnp.int32(size)), begin, end)
        diagonal = jnp.maximum(diagonal, whole)
        state = lax.fori_loop(begin, whole, functools.partial(step, True), state)
    state = lax.fori_loop(whole, diagonal, functools.partial(step, False), state)
    return lax.fori_loop(diagonal, end, functools.partial(step, True), state)


def normalize(request: AttentionRequest, state: Softmax, sink: jax.Array | None) -> jax.Array:
    """The output of a finished softmax. A sink is one more key, without a value. Zeros where nothing was seen."""
    total, kept = state.total, jnp.ones_like(state.total)
    if sink is not None:
        sink = sink * LOG2_E
        maximum = jnp.maximum(state.maximum, sink)
        reference = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        kept = jnp.exp2(state.maximum - reference)
        total = total * kept + jnp.exp2(sink - reference)
    factor = kept * request.v_scale / jnp.where(total == 0, 1.0, total)
    return (state.weighted * factor[:, None]).astype(request.query_dtype)


def store_output(request: AttentionRequest, out: Any, queries: Queries, result: jax.Array, mask: jax.Array) -> None:
    shape = result.shape
    lane = grid_of(iota(shape[1]), 1, shape)
    pltriton.store(
        out.at[grid_of(queries.token, 0, shape), grid_of(queries.head, 0, shape), lane],
        result,
        mask=grid_of(mask, 0, shape) & (lane < request.head_dim),
    )


def ragged_prefill(request: AttentionRequest, tile: Tile, *refs: Any) -> None:
    """Grid ``(kv_heads, tiles)``. The last tiles of a row see most keys, so the list is taken from its end."""
    work, queries_ref, pages, tables, *rest = refs
    out = rest[-1]
    kv_head = pl.program_id(0)
    part = work.shape[0] - 1 - pl.program_id(1)
    row, start, count, context = (work[part, int(column)] for column in Column if column <= Column.CONTEXT)
    offset = work[part, int(Column.FIRST)]
    there = row_has_pages(request, tables, row, context, count)
    filled = jnp.where(there, jnp.minimum(count - offset, tile.rows // request.group_size), 0)
    # The end of a row is not the tile's: another query of the row may fill what the heads of a group leave.
    queries = load_queries(request, tile.rows, queries_ref, kv_head, start + offset, filled, context - count + offset)
    first = lax.div(first_visible(request, queries.first), jnp.int32(tile.keys))
    end = jnp.where(filled > 0, lax.div(queries.last, jnp.int32(tile.keys)) + 1, first)
    state = walk(request, tile, tables, pages, row, kv_head, queries, first, end)
    sink = pltriton.load(rest[0].at[queries.head]) if request.options.sinks else None
    store_output(request, out, queries, normalize(request, state, sink), queries.there)


def ragged_decode(request: AttentionRequest, tile: Tile, *refs: Any) -> None:
    """Grid ``(kv_heads, parts)``: neighbouring programs read neighbouring heads of the same slots."""
    work, queries_ref, pages, tables, *rest = refs
    out, maxima, totals, weighted = rest[-4:]
    kv_head, part = pl.program_id(0), pl.program_id(1)
    row, start, count, context, first, end, slot, parts = (work[part, int(column)] for column in Column)
    # A row that lacks a page has no blocks in any part, so its parts sum up to zeros.
    there = row_has_pages(request, tables, row, context, count)
    queries = load_queries(request, tile.rows, queries_ref, kv_head, start, count, context - count)
    state = walk(request, tile, tables, pages, row, kv_head, queries, first, jnp.where(there, end, first))
    sink = pltriton.load(rest[0].at[queries.head]) if request.options.sinks else None
    store_output(request, out, queries, normalize(request, state, sink), queries.there & (parts == 1))

    several = queries.there & (parts > 1)
    slots = jnp.broadcast_to(slot, several.shape)
    for ref, value in ((maxima, state.maximum), (totals, state.total)):
        pltriton.store(ref.at[queries.head, queries.offset, slots], value, mask=several)
    shape = state.weighted.shape
    lane = grid_of(iota(shape[1]), 1, shape)
    at = (*(grid_of(index, 0, shape) for index in (queries.head, queries.offset, slots)), lane)
    pltriton.store(weighted.at[at], state.weighted, mask=grid_of(several, 0, shape))


def launch(
    kernel: Any, grid: tuple[int, ...], tile: tuple[int, int], interpret: bool, out_shape: Any, aliases: dict[int, int]
) -> Any:
    # Compiler parameters of Triton choose it: JAX's own default is another backend since 0.9.
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=tile[0], num_stages=tile[1]),
        interpret=interpret,
    )


def attend_prefill(
    request: AttentionRequest,
    tile: Tile,
    work: jax.Array,
    arrays: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    output: jax.Array,
    interpret: bool,
) -> jax.Array:
    """Attention of the rows in ``work``; ``arrays``: queries, pages ``[pages, page_size, slot]``, block tables."""
    operands = (work, *arrays, *(() if sinks is None else (sinks,)), output)
    kernel = functools.partial(ragged_prefill, request, tile)
    shape = jax.ShapeDtypeStruct(output.shape, output.dtype)
    call = launch(
        kernel,
        (request.num_kv_heads, work.shape[0]),
        (tile.warps, tile.num_stages),
        interpret,
        shape,
        {len(operands) - 1: 0},
    )
    return call(*operands)


def attend_decode(
    request: AttentionRequest,
    tile: Tile,
    work: DecodeWork,
    arrays: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    output: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """As :func:`attend_prefill`, for rows with few queries, whose contexts may be split.

    Also gives the partial results of rows of several parts, for :func:`~.merge.merge_parts`: maxima and totals
    ``[q_heads, query tokens, slots]``, and weighted values with lanes as a fourth axis.
    """
    aux = () if sinks is None else (sinks,)
    operands = (work.parts, *arrays, *aux, output)
    shape = jax.ShapeDtypeStruct(output.shape, output.dtype)
    slots = (request.num_q_heads, tile.rows // request.group_size, work.num_slots)
    statistics = jax.ShapeDtypeStruct(slots, jnp.float32)
    partial = jax.ShapeDtypeStruct((*slots, power_of_two(request.head_dim)), jnp.float32)
    call = launch(
        functools.partial(ragged_decode, request, tile),
        (request.num_kv_heads, work.parts.shape[0]),
        (tile.warps, tile.num_stages),
        interpret,
        (shape, statistics, statistics, partial),
        {len(operands) - 1: 0},
    )
    output, *partials = call(*operands)
    return output, tuple(partials)
