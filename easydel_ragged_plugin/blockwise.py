"""Attention of tiles of queries over blocks of pages, in plain JAX: what the kernels ``xla`` and ``turboquant`` share.

The online softmax is FlashAttention's (Dao et al., 2022, arXiv 2205.14135). Each kernel brings its own function that
reads a block of pages as keys and values.

**Values that are not finite.** The queries of a tile see different keys. The product of weights and values covers all
keys of a block, and a weight of 0 times an infinite value is NaN, also for a query that does not see the value. Such a
NaN never leaves the sum again. So a tile whose sums hold a NaN is computed once more, with :func:`weigh_exactly`; all
others lose no time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .rows import Rows, is_visible, visible_keys
from .types import SATURATED, AttentionRequest, Operands
from .varying import vary

__all__ = [
    "Results",
    "Softmax",
    "Tiling",
    "attend_tiles",
    "empty_results",
    "initial_softmax",
    "logits_of",
    "lse_of",
    "pin",
    "rescale",
    "statistics_dtype",
    "weigh",
    "weigh_exactly",
    "weights_of",
]


class Softmax(NamedTuple):
    """Running state of an online softmax; ``maximum`` and ``total`` lack the last axis of ``weighted``."""

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array


def statistics_dtype(request: AttentionRequest) -> jnp.dtype:
    """Dtype of softmax statistics and sums: float32, or float64 for float64 queries."""
    return np.promote_types(request.query_dtype, np.float32)  # NumPy's: JAX's may be told to promote nothing


def pin(pages: Any, trip: jax.Array) -> tuple[Any, jax.Array]:
    """The same values, tied to the trip of a loop.

    Without it XLA moves the conversion of the cache's dtype out of the loop and converts the whole cache.
    """
    return lax.optimization_barrier((pages, trip))


def logits_of(request: AttentionRequest, products: jax.Array, k_scale: jax.Array | None = None) -> jax.Array:
    """Scale and cap the products of queries and keys; ``k_scale`` is a further factor that broadcasts against them."""
    scale = jnp.asarray(request.logits_scale, products.dtype)
    logits = products * (scale if k_scale is None else scale * k_scale.astype(products.dtype))
    cap = request.options.soft_cap
    if cap is None:
        return logits
    if request.scale_over_cap is None:
        logits = jnp.clip(logits, -SATURATED * cap, SATURATED * cap)
    return cap * jnp.tanh(logits / cap)


def weights_of(logits: jax.Array, visible: jax.Array, maximum: jax.Array) -> jax.Array:
    """``exp(logits - maximum)`` where visible, else 0; ``maximum`` is -inf where nothing has been seen."""
    reference = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    return jnp.where(visible, jnp.exp(logits - reference[..., None]), 0.0)


def rescale(old: jax.Array, new: jax.Array) -> jax.Array:
    """``exp(old - new)`` with the limit 0 where nothing had been seen."""
    return jnp.where(jnp.isneginf(old), 0.0, jnp.exp(old - jnp.where(jnp.isneginf(new), 0.0, new)))


def lse_of(state: Softmax) -> jax.Array:
    """Logsumexp of a finished softmax, float32; -inf where nothing was seen."""
    seen = state.total != 0  # NaN stays
    lse = state.maximum + jnp.log(jnp.where(seen, state.total, 1.0))
    return jnp.where(seen, lse, -jnp.inf).astype(jnp.float32)


def initial_softmax(
    request: AttentionRequest, sinks: jax.Array | None, leading: tuple[int, ...], dtype: jnp.dtype
) -> Softmax:
    """State before any key, ``[*leading, kv_heads, group]``. A sink counts as one key without a value."""
    heads = (request.num_kv_heads, request.group_size)
    if sinks is None:
        maximum, total = jnp.full((*leading, *heads), -jnp.inf, dtype), jnp.zeros((*leading, *heads), dtype)
    else:
        maximum = jnp.broadcast_to(sinks.astype(dtype).reshape(heads), (*leading, *heads))
        total = jnp.ones((*leading, *heads), dtype)
    return Softmax(maximum, total, jnp.zeros((*leading, *heads, request.head_dim), dtype))


Weigh = Callable[[jax.Array, jax.Array, jax.Array, "Tiling"], jax.Array]


def weigh(weights: jax.Array, visible: jax.Array, values: jax.Array, tiling: Tiling) -> jax.Array:
    """Sums of weighted values, ``[kv_heads, group, tile, head_dim]``.

    Args:
        weights: ``[kv_heads, group, tile, slots]``; 0 where not visible.
        visible: ``[tile, slots]`` bool; not read.
        values: ``[kv_heads, slots, head_dim]`` in ``tiling.operands``, all finite.
        tiling: the dtypes.
    """
    num_kv_heads, group, tile, slots = weights.shape
    merged = weights.reshape(num_kv_heads, group * tile, slots).astype(tiling.operands)
    weighted = jnp.einsum("hmt,htd->hmd", merged, values, preferred_element_type=tiling.statistics)
    return weighted.reshape(num_kv_heads, group, tile, -1)


def weigh_exactly(weights: jax.Array, visible: jax.Array, values: jax.Array, tiling: Tiling) -> jax.Array:
    """As :func:`weigh`, for any values: one that is not finite reaches the queries that see it, and no others."""
    weighted = weigh(weights, visible, jnp.where(jnp.isfinite(values), values, 0), tiling)
    # A NaN counts as both infinities, whose sum it is.
    nan = jnp.isnan(values)
    infinities = jnp.stack([jnp.isposinf(values) | nan, jnp.isneginf(values) | nan]).astype(tiling.operands)
    counts = jnp.einsum(
        "mt,khtd->khmd", visible.astype(tiling.operands), infinities, preferred_element_type=tiling.statistics
    )
    positive, negative = counts > 0
    special = jnp.where(positive, jnp.where(negative, jnp.nan, jnp.inf), jnp.where(negative, -jnp.inf, 0.0))
    return weighted + special[:, None].astype(weighted.dtype)


class Results(NamedTuple):
    """Results of a call while they are computed, with spare tokens at their end for the last tile."""

    output: jax.Array
    """``[tokens + spare, kv_heads, group, head_dim]``"""
    lse: jax.Array | None
    """``[tokens + spare, kv_heads, group]`` float32, or None where it is not requested."""

    def finished(self, request: AttentionRequest) -> Results:
        """The results without the spare tokens, with all heads in one axis."""
        shape = (request.num_tokens, request.num_q_heads)
        lse = None if self.lse is None else self.lse[: request.num_tokens].reshape(shape)
        return Results(self.output[: request.num_tokens].reshape(*shape, request.head_dim), lse)


def empty_results(request: AttentionRequest, spare: int, dtype: jnp.dtype) -> Results:
    """Results of tokens of no live row: zeros, and a logsumexp of -inf."""
    shape = (request.num_tokens + spare, request.num_kv_heads, request.group_size)
    lse = jnp.full(shape, -jnp.inf, jnp.float32) if request.return_lse else None
    return Results(jnp.zeros((*shape, request.head_dim), dtype), lse)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of the loops of :func:`attend_tiles`, and the dtypes that they compute in.

    Attributes:
        tile: query tokens of a tile.
        pages: pages that one step reads.
        operands: dtype of the products' operands.
        statistics: dtype of the softmax and of sums.
    """

    tile: int
    pages: int
    operands: jnp.dtype
    statistics: jnp.dtype


def attend_tiles(
    request: AttentionRequest,
    tiling: Tiling,
    rows: Rows,
    operands: Operands,
    pages: Any,
    queries: jax.Array,
    read: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    finish: Callable[[Softmax], jax.Array],
    results: Results,
) -> Results:
    """Attention of all rows of ``rows`` that have queries, a tile of query tokens at a time.

    Args:
        request, tiling: static sizes.
        rows: rows to attend; those with no queries are skipped.
        operands: source of block tables, sinks and ``k_scale``.
        pages: the cache, up to date.
        queries: ``[tokens, kv_heads, group, width]``.
        read: function of the cache and page ids ``[pages]``; returns keys ``[slots, kv_heads, width]`` and values
            ``[slots, kv_heads, head_dim]`` of those pages.
        finish: function of a finished softmax; returns the output.
        results: results to update, with at least ``tile`` spare tokens.
    """
    tile, step_tokens = tiling.tile, tiling.pages * request.page_size
    num_kv_heads, group, page_size = request.num_kv_heads, request.group_size, request.page_size
    num_tiles = -(-rows.num_queries // tile)
    last_tile = jnp.cumsum(num_tiles)
    queries = jnp.pad(queries, ((0, tile), (0, 0), (0, 0), (0, 0)))

    def run_tile(index: jax.Array, results: Results) -> Results:
        row = jnp.minimum(jnp.sum(index >= last_tile, dtype=jnp.int32), request.num_rows - 1)
        offset = (index - (last_tile[row] - num_tiles[row])) * tile
        start = rows.query_start[row] + offset
        filled = jnp.minimum(rows.num_queries[row] - offset, tile)
        first_query = rows.context[row] - rows.num_queries[row] + offset
        query_position = first_query + jnp.arange(tile, dtype=jnp.int32)
        mine = jnp.arange(tile, dtype=jnp.int32) < filled
        tokens = lax.dynamic_slice_in_dim(queries, start, tile)
        tokens = jnp.transpose(tokens, (1, 2, 0, 3)).reshape(num_kv_heads, group * tile, -1).astype(tiling.operands)
        begin, end = visible_keys(request, first_query, first_query + filled - 1)
        first_page = begin // page_size
        table = operands.block_tables[row]

        def step(weigh: Weigh, trip: jax.Array, state: Softmax) -> Softmax:
            cache, trip = pin(pages, trip)
            page = first_page + trip * tiling.pages
            entries = jnp.minimum(page + jnp.arange(tiling.pages, dtype=jnp.int32), request.pages_per_row - 1)
            keys, values = read(cache, table[entries])
            position = page * page_size + jnp.arange(step_tokens, dtype=jnp.int32)
            needed = (position >= begin) & (position < end)
            values = jnp.where(needed[:, None, None], values, 0)  # 0 * NaN of a dead slot is NaN
            keys = jnp.swapaxes(keys, 0, 1).astype(tiling.operands)
            values = jnp.swapaxes(values, 0, 1).astype(tiling.operands)
            products = jnp.einsum("hmd,htd->hmt", tokens, keys, preferred_element_type=tiling.statistics)
            k_scale = None if operands.k_scale is None else operands.k_scale[:, None, None]
            logits = logits_of(request, products, k_scale).reshape(num_kv_heads, group, tile, step_tokens)
            seen = is_visible(request, position[None, :], query_position[:, None]) & needed[None, :]
            visible = seen[None, None]  # all heads
            logits = jnp.where(visible, logits, -jnp.inf)
            maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=-1))
            weights = weights_of(logits, visible, maximum)
            kept = rescale(state.maximum, maximum)
            return Softmax(
                maximum,
                kept * state.total + jnp.sum(weights, axis=-1),
                kept[..., None] * state.weighted + weigh(weights, seen, values, tiling),
            )

        nothing = initial_softmax(request, operands.sinks, (), tiling.statistics)
        nothing = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:, :, None], (num_kv_heads, group, tile, *leaf.shape[2:])), nothing
        )
        nothing = vary(nothing, operands)
        num_pages = -(-end // page_size) - first_page

        def walk(weigh: Weigh) -> Softmax:
            return lax.fori_loop(0, -(-num_pages // tiling.pages), functools.partial(step, weigh), nothing)

        state = walk(weigh)
        state = lax.cond(jnp.any(jnp.isnan(state.weighted)), lambda: walk(weigh_exactly), lambda: state)

        def put(into: jax.Array, value: jax.Array) -> jax.Array:
            """``into`` with ``value [kv_heads, group, tile, ...]`` at the filled tokens of the tile."""
            value = jnp.moveaxis(value, 2, 0).astype(into.dtype)
            there = lax.dynamic_slice_in_dim(into, start, tile)
            value = jnp.where(jnp.expand_dims(mine, range(1, value.ndim)), value, there)
            return lax.dynamic_update_slice_in_dim(into, value, start, 0)

        lse = None if results.lse is None else put(results.lse, lse_of(state))
        return Results(put(results.output, finish(state)), lse)

    return lax.fori_loop(0, last_tile[-1], run_tile, vary(results, operands))
