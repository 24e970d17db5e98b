"""Attention kernels: decode with split contexts, and prefill.

One program of decode or prefill takes one part of one row (see ``work.py``) for one kv head. A query is one head of
one token here; the queries of its tokens and of the heads of the group are one tile, so a key is read once for all of
them. It walks over blocks of keys with the online softmax of FlashAttention (Dao et al., 2022, arXiv 2205.14135); the
loop's bounds are read from the work list, so they end at the live context and begin at the window. Blocks that every
query of the tile sees whole are not masked. Long contexts are split between programs (flash-decoding), and
``merge.py`` joins their float32 results.

A tile whose sums hold a NaN is not stored: its queries are taken one by one, so that a value that is not finite reaches
only the queries that see it.

Nothing is decided by a branch: a program without work has loops of no trips and stores that are masked off.

**Addresses.** Pages are indexed as ``[page, slot, element of the slot]``, each with its own int32, which none exceeds.
Their strides are applied by Pallas, in 64 bits where an array is larger than 2**32 bytes. Below that it takes 32 signed
bits for the number of *elements*, which suffices for elements of two bytes and more; 8-bit caches between the two
bounds are refused (``PallasGPU.refuses``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.base2 import LOG2_E, base2_logits
from easydel_ragged_plugin.rows import is_visible, needed_entries, visible_keys
from easydel_ragged_plugin.types import AttentionRequest
from easydel_ragged_plugin.varying import result_type, vary

from .tiles import Tile, power_of_two
from .work import Column, DecodeWork

__all__ = [
    "Extras",
    "Results",
    "Softmax",
    "attend_decode",
    "attend_prefill",
    "broadcast_along",
    "finish",
    "iota",
    "launch",
    "row_has_pages",
    "store_results",
]

LARGEST = float(np.finfo(np.float32).max)

SINGLY_KEYS = 16
"""Keys of a step of :func:`attend_singly`: few registers, which the loops over blocks need more."""

ENTRIES = 256
"""Entries of the block table that are looked at in one step."""


class Softmax(NamedTuple):
    """Running state of an online softmax, float32: ``[queries]``, ``[queries]`` and ``[queries, lanes]``.

    ``maximum`` is -inf and the others are zero where nothing was seen.
    """

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array


def empty_softmax(queries: int, lanes: int) -> Softmax:
    """The state before any key."""
    return Softmax(
        jnp.full((queries,), -jnp.inf, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
        jnp.zeros((queries, lanes), jnp.float32),
    )


class Results(NamedTuple):
    """What the kernels fill, one after the other in the same memory. Tokens of no live row keep what they have.

    Attributes:
        output: ``[tokens, q_heads, head_dim]`` in the queries' dtype.
        lse: ``[tokens, q_heads]`` float32 logsumexp; None where it is not requested.
    """

    output: jax.Array
    lse: jax.Array | None

    @classmethod
    def of_no_rows(cls, request: AttentionRequest) -> Results:
        """Zeros, and a logsumexp of -inf."""
        shape = (request.num_tokens, request.num_q_heads)
        lse = jnp.full(shape, -jnp.inf, jnp.float32) if request.return_lse else None
        return cls(jnp.zeros((*shape, request.head_dim), request.query_dtype), lse)

    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that are not None."""
        return (self.output,) if self.lse is None else (self.output, self.lse)


class Extras(NamedTuple):
    """Arrays that only some calls have, float32; their references inside of a kernel.

    Attributes:
        sinks: ``[q_heads]``.
        k_scale, v_scale: ``[kv_heads]``.
    """

    sinks: Any
    k_scale: Any
    v_scale: Any

    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that are not None."""
        return tuple(array for array in self if array is not None)

    @classmethod
    def of_refs(cls, request: AttentionRequest, refs: Sequence[Any]) -> Extras:
        """The references at the beginning of ``refs``, which follow :meth:`arrays`."""
        following, options = iter(refs), request.options
        wanted = (options.sinks, *(name in options.scale_arrays for name in ("k_scale", "v_scale")))
        return cls(*(next(following) if each else None for each in wanted))

    def sink_of(self, heads: jax.Array) -> jax.Array | None:
        """Sinks of query heads."""
        return None if self.sinks is None else pltriton.load(self.sinks.at[heads])

    def scales_of(self, kv_head: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Factors of the keys and values of a kv head."""
        k_scale, v_scale = (None if ref is None else ref[kv_head] for ref in (self.k_scale, self.v_scale))
        return k_scale, v_scale


def iota(size: int) -> jax.Array:
    """``[0, size)`` in int32."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def broadcast_along(array: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
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


class Places(NamedTuple):
    """Where queries stand, ``[queries]`` each."""

    token: jax.Array
    """Index on the token axis."""
    offset: jax.Array
    """Token, counted from the tile's first."""
    head: jax.Array
    """Query head."""


class Queries(NamedTuple):
    """The queries of a tile. Query m of it is head ``m % group`` of the group, of the tile's token ``m // group``."""

    operand: jax.Array
    """``[queries, lanes]`` in the compute dtype; zeros where the tile has no query."""
    position: jax.Array
    """[queries] position of each query in its context; that of the last one where there is no query."""
    first: jax.Array
    """Position of the first query."""
    last: jax.Array
    """Position of the last query."""
    start: jax.Array
    """The first token."""
    places: Places
    """Where the queries stand. What is no query has an index of its own."""
    filled: jax.Array
    """[queries] whether there is a query."""


def load_queries(
    request: AttentionRequest,
    tile: Tile,
    queries: Any,
    kv_head: jax.Array,
    start: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
) -> Queries:
    """The queries of ``tokens`` tokens from token ``start`` on, at positions from ``first`` on."""
    group = request.group_size
    query = iota(tile.queries)
    offset = lax.div(query, jnp.int32(group))
    head = kv_head * group + lax.rem(query, jnp.int32(group))
    filled = offset < tokens
    # What is no query keeps an index of its own: the interpreter writes what a masked store leaves, too.
    token = start + offset
    last = first + tokens - 1
    return Queries(
        load_operand(request, queries, token, head, filled),
        jnp.minimum(first + offset, last),
        first,
        last,
        start,
        Places(token, offset, head),
        filled,
    )


def load_operand(
    request: AttentionRequest, queries: Any, token: jax.Array, head: jax.Array, filled: jax.Array
) -> jax.Array:
    """Queries ``[queries, lanes]`` in the compute dtype; zeros where ``filled`` is false."""
    shape = (*token.shape, power_of_two(request.head_dim))
    lane = broadcast_along(iota(shape[1]), 1, shape)
    operand = pltriton.load(
        queries.at[broadcast_along(token, 0, shape), broadcast_along(head, 0, shape), lane],
        mask=broadcast_along(filled, 0, shape) & (lane < request.head_dim),
        other=0.0,
    )
    return operand.astype(request.compute_dtype)


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
    lane = broadcast_along(iota(lanes), 1, shape)
    mask = None if lanes == request.head_dim else lane < request.head_dim
    if inside is not None:
        read = broadcast_along(inside, 0, shape)
        mask = read if mask is None else mask & read
    found = []
    for offset in (0, layout.value_offset):
        element = broadcast_along(kv_head * layout.head_stride + offset, 0, shape) + lane
        stored = pltriton.load(
            pages.at[broadcast_along(page, 0, shape), broadcast_along(slot, 0, shape), element],
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
    k_scale: jax.Array | None,
    queries: Queries,
    begin: jax.Array,
    end: jax.Array,
) -> Softmax:
    """The softmax of a tile of queries over the blocks of keys ``[begin, end)``."""
    lanes, size = power_of_two(request.head_dim), tile.keys
    seen_begin, seen_end = visible_keys(request, queries.first, queries.last)

    def step(masked: bool, block: jax.Array, state: Softmax) -> Softmax:
        position = block * size + iota(size)
        inside = (position >= seen_begin) & (position < seen_end) if masked else None
        keys, values = load_block(request, size, tables, pages, row, kv_head, position, inside)
        logits = base2_logits(request, product(queries.operand, keys, 1), k_scale)
        if masked:
            shape = logits.shape
            key, query = broadcast_along(position, 1, shape), broadcast_along(queries.position, 0, shape)
            logits = jnp.where(is_visible(request, key, query), logits, -jnp.inf)
        return add_block(request, state, logits, values, product)

    # Every query sees the keys that both the first and the last one see: all of those in blocks [whole, diagonal).
    _, last_whole = visible_keys(request, queries.first, queries.first)
    diagonal = jnp.clip(lax.div(last_whole, jnp.int32(size)), begin, end)
    whole = begin
    state = empty_softmax(tile.queries, lanes)
    if request.options.is_local:
        first_whole, _ = visible_keys(request, queries.last, queries.last)
        whole = jnp.clip(lax.div(first_whole + (size - 1), jnp.int32(size)), begin, end)
        diagonal = jnp.maximum(diagonal, whole)
        state = lax.fori_loop(begin, whole, functools.partial(step, True), state)
    state = lax.fori_loop(whole, diagonal, functools.partial(step, False), state)
    return lax.fori_loop(diagonal, end, functools.partial(step, True), state)


def add_block(
    request: AttentionRequest, state: Softmax, logits: jax.Array, values: jax.Array, multiply: Callable[..., jax.Array]
) -> Softmax:
    """``state`` with a block of keys, of which the queries have ``logits [queries, keys]``; -inf where one is not
    seen. ``multiply(weights, values, 0)`` is the product of weights and ``values [keys, lanes]``."""
    maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=1))
    reference = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # -inf - -inf would be NaN
    weights = jnp.exp2(logits - reference[:, None])
    kept = jnp.exp2(state.maximum - reference)
    return Softmax(
        maximum,
        state.total * kept + jnp.sum(weights, axis=1),
        state.weighted * kept[:, None] + multiply(weights.astype(request.compute_dtype), values, 0),
    )


def is_spoiled(state: Softmax) -> jax.Array:
    """Whether the sums of a tile hold a NaN, which never leaves them.

    A weight of 0 times a value that is not finite is NaN, also for a query that does not see the value. Such a tile is
    not stored: :func:`attend_singly` takes its queries one by one.
    """
    return jnp.max(jnp.where(state.weighted == state.weighted, 0, 1)) > 0


def attend_singly(
    request: AttentionRequest,
    tables: Any,
    pages: Any,
    row: jax.Array,
    kv_head: jax.Array,
    k_scale: jax.Array | None,
    queries_ref: Any,
    queries: Queries,
    begin: jax.Array,
    end: jax.Array,
    count: jax.Array,
    store: Callable[[Softmax, Places], None],
) -> None:
    """``store`` the softmax of each of the first ``count`` queries of a tile, over the keys that it sees itself.

    The keys are those at positions ``[begin, end)``. Nothing of the tile stays in registers meanwhile.
    """
    lanes = power_of_two(request.head_dim)

    def multiply(weights: jax.Array, values: jax.Array, _: int) -> jax.Array:
        # JAX 0.8 lowers no slices, which indexing with a number is.
        return jnp.sum(weights.astype(jnp.float32).reshape(-1, 1) * values.astype(jnp.float32), axis=0)[None, :]

    def one(query: jax.Array, carry: jax.Array) -> jax.Array:
        offset, head = lax.div(query, jnp.int32(request.group_size)), lax.rem(query, jnp.int32(request.group_size))
        places = Places(
            *(each.reshape(1) for each in (queries.start + offset, offset, kv_head * request.group_size + head))
        )
        operand = load_operand(request, queries_ref, places.token, places.head, jnp.ones((1,), bool))
        seen_begin, seen_end = visible_keys(request, queries.first + offset, queries.first + offset)
        first, last = jnp.maximum(begin, seen_begin), jnp.minimum(end, seen_end)

        def step(block: jax.Array, state: Softmax) -> Softmax:
            position = first + block * SINGLY_KEYS + iota(SINGLY_KEYS)
            inside = position < last
            keys, values = load_block(request, SINGLY_KEYS, tables, pages, row, kv_head, position, inside)
            products = jnp.sum(keys.astype(jnp.float32) * operand.astype(jnp.float32), axis=1)
            logits = jnp.where(inside, base2_logits(request, products, k_scale), -jnp.inf)
            return add_block(request, state, logits[None, :], values, multiply)

        steps = lax.div(jnp.maximum(last - first, 0) + (SINGLY_KEYS - 1), jnp.int32(SINGLY_KEYS))
        store(lax.fori_loop(0, steps, step, empty_softmax(1, lanes)), places)
        return carry

    lax.fori_loop(0, count, one, jnp.int32(0))


def finish(
    request: AttentionRequest, state: Softmax, sink: jax.Array | None, v_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Output and logsumexp of a finished softmax; no logsumexp where it is not requested.

    A sink is one more key, without a value. Where nothing was seen the output is zero and the logsumexp -inf.
    ``v_scale`` is a further factor of the output.
    """
    maximum, total, kept = state.maximum, state.total, jnp.ones_like(state.total)
    highest = maximum / LOG2_E
    if sink is not None:
        logit = jnp.minimum(sink * LOG2_E, LARGEST)  # infinity minus itself would be NaN
        maximum = jnp.maximum(state.maximum, logit)
        highest = jnp.where(maximum == logit, sink, highest)
        reference = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        kept = jnp.exp2(state.maximum - reference)
        total = total * kept + jnp.exp2(logit - reference)
    factor = kept * request.v_scale / jnp.where(total == 0, 1.0, total)
    factor = factor if v_scale is None else factor * v_scale
    output = (state.weighted * factor[:, None]).astype(request.query_dtype)
    if not request.return_lse:
        return output, None
    # A row that lacks a page saw nothing, and its sinks are no result.
    lse = jnp.where(state.total == 0, -jnp.inf, highest + jnp.log2(total) / LOG2_E)
    return output, lse


def store_results(
    request: AttentionRequest,
    refs: Sequence[Any],
    results: tuple[jax.Array, jax.Array | None],
    token: jax.Array,
    head: jax.Array,
    mask: jax.Array,
) -> None:
    """Store output and logsumexp of :func:`finish` in ``refs``, those of :meth:`Results.arrays`, where ``mask``."""
    output, lse = results
    lane = broadcast_along(iota(output.shape[1]), 1, output.shape)
    pltriton.store(
        refs[0].at[broadcast_along(token, 0, output.shape), broadcast_along(head, 0, output.shape), lane],
        output,
        mask=broadcast_along(mask, 0, output.shape) & (lane < request.head_dim),
    )
    if lse is not None:
        pltriton.store(refs[1].at[token, head], lse, mask=mask)


def ragged_prefill(request: AttentionRequest, tile: Tile, *refs: Any) -> None:
    """Grid ``(kv_heads, tiles)``. The last tiles of a row see most keys, so the list is taken from its end."""
    work, queries_ref, pages, tables, *rest = refs
    out = rest[-2:] if request.return_lse else rest[-1:]
    kv_head = pl.program_id(0)
    part = work.shape[0] - 1 - pl.program_id(1)
    row, start, count, context = (work[part, int(column)] for column in Column if column <= Column.CONTEXT)
    offset = work[part, int(Column.FIRST)]
    has_pages = row_has_pages(request, tables, row, context, count)
    tokens = jnp.where(has_pages, jnp.minimum(count - offset, tile.queries // request.group_size), 0)
    # The end of a row is not the tile's: another token of the row may fill what the heads of a group leave.
    queries = load_queries(request, tile, queries_ref, kv_head, start + offset, tokens, context - count + offset)
    seen_begin, seen_end = visible_keys(request, queries.first, queries.last)
    begin = lax.div(seen_begin, jnp.int32(tile.keys))
    end = jnp.where(tokens > 0, lax.div(seen_end - 1, jnp.int32(tile.keys)) + 1, begin)
    extras = Extras.of_refs(request, rest)
    k_scale, v_scale = extras.scales_of(kv_head)
    state = walk(request, tile, tables, pages, row, kv_head, k_scale, queries, begin, end)

    def store(state: Softmax, places: Places, mask: jax.Array) -> None:
        finished = finish(request, state, extras.sink_of(places.head), v_scale)
        store_results(request, out, finished, places.token, places.head, mask)

    spoiled = is_spoiled(state)
    store(state, queries.places, queries.filled & ~spoiled)
    attend_singly(
        request, tables, pages, row, kv_head, k_scale, queries_ref, queries, begin * tile.keys, end * tile.keys,
        jnp.where(spoiled, tokens * request.group_size, 0),
        lambda state, places: store(state, places, jnp.ones((1,), bool)),
    )  # fmt: skip


def ragged_decode(request: AttentionRequest, tile: Tile, *refs: Any) -> None:
    """Grid ``(kv_heads, parts)``: neighboring programs read neighboring heads of the same slots."""
    work, queries_ref, pages, tables, *rest = refs
    *rest, maxima, totals, weighted = rest
    out = rest[-2:] if request.return_lse else rest[-1:]
    kv_head, part = pl.program_id(0), pl.program_id(1)
    row, start, count, context, begin, end, partial, parts = (work[part, int(column)] for column in Column)
    # In JAX 0.8 what is read from memory varies over the mesh of a shard_map around the kernel. What is computed does
    # not, and so what a loop counts.
    begin = begin + 0
    # A row that lacks a page has no blocks in any part, so its parts sum up to zeros.
    has_pages = row_has_pages(request, tables, row, context, count)
    queries = load_queries(request, tile, queries_ref, kv_head, start, count, context - count)
    extras = Extras.of_refs(request, rest)
    k_scale, v_scale = extras.scales_of(kv_head)
    end = jnp.where(has_pages, end, begin)
    state = walk(request, tile, tables, pages, row, kv_head, k_scale, queries, begin, end)

    def store(state: Softmax, places: Places, mask: jax.Array) -> None:
        finished = finish(request, state, extras.sink_of(places.head), v_scale)
        store_results(request, out, finished, places.token, places.head, mask & (parts == 1))
        several = mask & (parts > 1)
        partials = jnp.broadcast_to(partial, several.shape)
        for ref, value in ((maxima, state.maximum), (totals, state.total)):
            pltriton.store(ref.at[places.head, places.offset, partials], value, mask=several)
        shape = state.weighted.shape
        lane = broadcast_along(iota(shape[1]), 1, shape)
        at = (*(broadcast_along(index, 0, shape) for index in (places.head, places.offset, partials)), lane)
        pltriton.store(weighted.at[at], state.weighted, mask=broadcast_along(several, 0, shape))

    spoiled = is_spoiled(state)
    store(state, queries.places, queries.filled & ~spoiled)
    attend_singly(
        request, tables, pages, row, kv_head, k_scale, queries_ref, queries, begin * tile.keys, end * tile.keys,
        jnp.where(spoiled, count * request.group_size, 0),
        lambda state, places: store(state, places, jnp.ones((1,), bool)),
    )  # fmt: skip


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    interpret: bool,
    operands: tuple[jax.Array, ...],
    results: Results,
    *others: jax.ShapeDtypeStruct,
) -> tuple[Results, tuple[jax.Array, ...]]:
    """Run a kernel on ``operands``. It fills ``results`` in their memory, and arrays of the shapes ``others``."""
    filled = vary(results.arrays(), operands)
    wanted: list[Any] = [*filled, *others]
    shapes = [result_type(each.shape, each.dtype, operands) for each in wanted]
    # Compiler parameters of Triton choose it: JAX's own default is another backend since 0.9.
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes,
        input_output_aliases={len(operands) + index: index for index in range(len(filled))},
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )
    found = call(*operands, *filled)
    lse = None if results.lse is None else found[1]
    return Results(found[0], lse), tuple(found[len(filled) :])


def attend_prefill(
    request: AttentionRequest,
    tile: Tile,
    work: jax.Array,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    results: Results,
    interpret: bool,
) -> Results:
    """Attention of the rows in ``work``; ``arrays``: queries, pages ``[pages, page_size, slot]``, block tables."""
    results, _ = launch(
        functools.partial(ragged_prefill, request, tile),
        (request.num_kv_heads, work.shape[0]),
        tile.warps,
        tile.num_stages,
        interpret,
        (work, *arrays, *extras.arrays()),
        results,
    )
    return results


def attend_decode(
    request: AttentionRequest,
    tile: Tile,
    work: DecodeWork,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    results: Results,
    interpret: bool,
) -> tuple[Results, tuple[jax.Array, ...]]:
    """As :func:`attend_prefill`, for rows with few tokens, whose contexts may be split.

    Also gives the partial results of rows of several parts, for :func:`~.merge.merge_parts`: maxima and totals
    ``[q_heads, tokens of a row, partials]``, and weighted values with lanes as a fourth axis.
    """
    shape = (request.num_q_heads, tile.queries // request.group_size, work.num_partials)
    statistics = jax.ShapeDtypeStruct(shape, jnp.float32)
    return launch(
        functools.partial(ragged_decode, request, tile),
        (request.num_kv_heads, work.parts.shape[0]),
        tile.warps,
        tile.num_stages,
        interpret,
        (work.parts, *arrays, *extras.arrays()),
        results,
        statistics,
        statistics,
        jax.ShapeDtypeStruct((*shape, power_of_two(request.head_dim)), jnp.float32),
    )
