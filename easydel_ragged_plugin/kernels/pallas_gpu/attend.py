"""Attention kernels: decode with split contexts, and prefill.

One program of decode or prefill takes one part of one row (see ``work.py``) for one kv head. A query is one head of
one token here; the queries of its tokens and of the heads of the group are one tile, so a key is read once for all of
them. It walks over blocks of keys with an online softmax; the loop's bounds are read from the work list, so they end at
the live context and begin at the window. There is one such loop, and it masks each block: Triton copies keys and values
ahead in a kernel's first loop alone, and a window or a short context has few blocks that every query sees whole. Long
contexts are split between programs (flash-decoding), and ``merge.py`` joins their float32 results.

A tile whose sums hold a NaN is not stored: its queries are taken one by one, so that a value that is not finite reaches
only the queries that see it.

Nothing is decided by a branch: a program without work has loops of no trips and stores that are masked off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.base2 import base2_scores
from easydel_ragged_plugin.rows import visible_keys
from easydel_ragged_plugin.types import AttentionRequest

from .blocks import Places, Queries, broadcast_along, iota, load_block, load_operand, load_queries, row_has_pages
from .call import Extras, Results, launch, store_results
from .softmax import Exp2, Softmax, add_block, empty_softmax, exp2, exp2_of_nvidia, finish, is_spoiled
from .tiles import Tile, Tiles, power_of_two
from .work import Column, Work, decode_room

__all__ = ["attend_decode", "attend_prefill"]

SINGLY_KEYS = 16
"""Keys of a step of :func:`attend_singly`: few registers, which the loops over blocks need more."""

FLAGS = 256
"""Tokens that are looked at in one step, for those that no row has."""


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
    exp2: Exp2,
) -> Softmax:
    """The softmax of a tile of queries over the blocks of keys ``[begin, end)``."""
    seen_begin, seen_end = visible_keys(request, queries.first, queries.last)
    first, after = visible_keys(request, queries.position, queries.position)

    def step(block: jax.Array, state: Softmax) -> Softmax:
        base, key = block * tile.keys, iota(tile.keys)
        position = base + key
        inside = (position >= seen_begin) & (position < seen_end)
        keys, values = load_block(request, tile.keys, tables, pages, row, kv_head, position, inside)
        products = product(queries.operand, keys, 1)
        # Of the block's base and a query one number is made, so that each product costs a comparison and no addition.
        shape = products.shape
        keys_along = broadcast_along(key, 1, shape)
        visible = keys_along < broadcast_along(after - base, 0, shape)
        if request.options.is_local:
            visible &= keys_along >= broadcast_along(first - base, 0, shape)
        scores = base2_scores(request, products, k_scale)
        return add_block(request, state, scores, visible, values, product, exp2)

    return lax.fori_loop(begin, end, step, empty_softmax(tile.queries, power_of_two(request.head_dim)))


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
            scores, factor = base2_scores(request, products, k_scale)
            return add_block(request, state, (scores[None, :], factor), inside[None, :], values, multiply)

        steps = lax.div(jnp.maximum(last - first, 0) + (SINGLY_KEYS - 1), jnp.int32(SINGLY_KEYS))
        store(lax.fori_loop(0, steps, step, empty_softmax(1, lanes)), places)
        return carry

    lax.fori_loop(0, count, one, jnp.int32(0))


def ragged_prefill(request: AttentionRequest, tile: Tile, *refs: Any, exp2: Exp2 = exp2) -> None:
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
    state = walk(request, tile, tables, pages, row, kv_head, k_scale, queries, begin, end, exp2)

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


def clear_unused(
    request: AttentionRequest, tile: Tile, used: Any, kv_head: jax.Array, part: jax.Array, parts: int, out: Any
) -> None:
    """Results of the tokens in which no row has a query: each of ``parts`` programs looks at a share of the tokens."""
    share = -(-request.num_tokens // parts)
    begin, end = share * part, jnp.minimum(share * (part + 1), request.num_tokens)
    query = iota(tile.queries)
    offset, head = lax.div(query, jnp.int32(request.group_size)), lax.rem(query, jnp.int32(request.group_size))
    head = kv_head * request.group_size + head
    output = jnp.zeros((tile.queries, power_of_two(request.head_dim)), request.query_dtype)
    lse = jnp.full((tile.queries,), -jnp.inf, jnp.float32) if request.return_lse else None
    tokens = tile.queries // request.group_size

    def look(index: jax.Array, carry: jax.Array) -> jax.Array:
        seen = begin + index * FLAGS + iota(FLAGS)
        found = pltriton.load(used.at[seen], mask=seen < end, other=1) == 0
        first = jnp.min(jnp.where(found, seen, end))
        last = jnp.max(jnp.where(found, seen, first - 1))

        def clear(index: jax.Array, carry: jax.Array) -> jax.Array:
            token = first + index * tokens + offset
            there = (offset < tokens) & (token <= last)
            mask = pltriton.load(used.at[token], mask=there, other=1) == 0
            store_results(request, out, (output, lse), token, head, mask)
            return carry

        return lax.fori_loop(0, lax.div(last - first + tokens, jnp.int32(tokens)), clear, carry)

    lax.fori_loop(0, -(-share // FLAGS), look, jnp.int32(0))


def ragged_decode(request: AttentionRequest, tile: Tile, num_partials: int, *refs: Any, exp2: Exp2 = exp2) -> None:
    """Grid ``(kv_heads, parts)``: neighboring programs read neighboring heads of the same slots."""
    work, used, queries_ref, pages, tables, *rest = refs
    rest, partial_refs = (rest[:-3], rest[-3:]) if num_partials else (rest, [])
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
    state = walk(request, tile, tables, pages, row, kv_head, k_scale, queries, begin, end, exp2)

    def store(state: Softmax, places: Places, mask: jax.Array) -> None:
        finished = finish(request, state, extras.sink_of(places.head), v_scale)
        store_results(request, out, finished, places.token, places.head, mask & (parts == 1))
        if not partial_refs:
            return
        maxima, totals, weighted = partial_refs
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
    clear_unused(request, tile, used, kv_head, part, work.shape[0], out)


def attend_prefill(
    request: AttentionRequest,
    sizes: Tiles,
    work: Work,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    results: Results,
    interpret: bool,
) -> Results:
    """The results, with the rows of ``work.prefill``. ``arrays``: queries, pages ``[pages, page_size, slot]``, block
    tables."""
    tile, tiles = sizes.prefill, work.prefill
    assert tiles is not None
    kernel = functools.partial(ragged_prefill, request, tile)
    results, _ = launch(
        kernel,
        (request.num_kv_heads, tiles.shape[0]),
        tile.warps,
        tile.num_stages,
        interpret,
        (tiles, *arrays, *extras.arrays()),
        results,
        of_nvidia=functools.partial(kernel, exp2=exp2_of_nvidia),
    )
    return results


def attend_decode(
    request: AttentionRequest,
    sizes: Tiles,
    work: Work,
    arrays: tuple[jax.Array, ...],
    extras: Extras,
    interpret: bool,
) -> tuple[Results, tuple[jax.Array, ...]]:
    """As :func:`attend_prefill`, for rows with few tokens, whose contexts may be split; and zeros for tokens of no row.

    Also gives the partial results of rows of several parts, for :func:`~.merge.merge_parts`: maxima and totals
    ``[q_heads, tokens of a row, partials]``, and weighted values with lanes as a fourth axis. None of these where no
    context can be long enough to be split.
    """
    tile, partials = sizes.decode, decode_room(request, sizes).partials
    shape = (request.num_q_heads, sizes.decoded_tokens(request), partials)
    statistics = jax.ShapeDtypeStruct(shape, jnp.float32)
    weighted = jax.ShapeDtypeStruct((*shape, power_of_two(request.head_dim)), jnp.float32)
    kernel = functools.partial(ragged_decode, request, tile, partials)
    return launch(
        kernel,
        (request.num_kv_heads, work.parts.shape[0]),
        tile.warps,
        tile.num_stages,
        interpret,
        (work.parts, work.used, *arrays, *extras.arrays()),
        Results.types_of(request),
        *((statistics, statistics, weighted) if partials else ()),
        of_nvidia=functools.partial(kernel, exp2=exp2_of_nvidia),
    )
