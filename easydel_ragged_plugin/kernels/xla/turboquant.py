"""Ragged page attention over TurboQuant caches, in plain JAX.

The formulas are those of :mod:`easydel_ragged_plugin.turboquant`. How they are computed:

* new tokens are compressed all at once, and only their slots are written;
* a tile of queries reads the live blocks of its row alone, and decodes a block when it reads it;
* a byte of the cache is decoded by one look-up, which gives its two centroids or its eight signs;
* values stay rotated while they are summed: the rotation is linear, so the sum is rotated back once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.rows import Rows, first_position, live_rows, write_tokens
from easydel_ragged_plugin.turboquant import ARRAYS, INDEX_LEVELS, TurboQuantConstants, TurboQuantPages
from easydel_ragged_plugin.types import AttentionRequest, Operands

from .slots import select_slots
from .softmax import Softmax, initial_softmax, logits_of, pin, rescale, weights_of

__all__ = ["forward"]

BLOCK_TOKENS = 256
"""Key tokens that one step decodes."""

DECODE_TILE, PREFILL_TILE = 4, 64
"""Query tokens of a tile: a batch with no more tokens than this for each row on average, and any other."""

TINY_NORM = 1e-8
"""Least norm that a vector is divided by; EasyDeL's."""


class Tables(NamedTuple):
    """What each byte of the cache stands for."""

    key_pairs: jax.Array  # [256, 2]
    signs: jax.Array  # [256, 8]
    value_pairs: jax.Array  # [256, 2]


def forward(
    request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> tuple[jax.Array, TurboQuantPages]:
    """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
    rows, pages = live_rows(request, operands), operands.pages
    if operands.keys is not None and operands.values is not None:
        pages = update(request, rows, operands)
    return attend(request, config, rows, operands._replace(pages=pages)), pages


def update(request: AttentionRequest, rows: Rows, operands: Operands) -> TurboQuantPages:
    """Compress the keys and values of live tokens into their slots; every other slot keeps its bits."""
    assert operands.keys is not None
    assert operands.values is not None
    constants = operands.pages.constants
    norms, rotated = rotate(operands.keys, constants)
    indices = nearest(rotated, constants.key_codebook)
    rest = rotated - constants.key_codebook[indices]
    signs = jnp.einsum("thd,md->thm", rest, constants.projection, precision="highest") >= 0
    key_norms = jnp.concatenate([norms, jnp.linalg.norm(rest, axis=-1, keepdims=True)], axis=-1)
    value_norms, rotated = rotate(operands.values, constants)
    new = (
        pack(indices, 2),
        pack(signs, 8),
        key_norms,
        pack(nearest(rotated, constants.value_codebook), 2),
        value_norms[..., 0],
    )
    lines = {
        name: each.astype(array.dtype).reshape(request.num_tokens, -1)
        for name, each, array in zip(ARRAYS, new, operands.pages.arrays, strict=True)
    }
    return operands.pages._replace(**write(request, rows, operands, lines))


class Written(NamedTuple):
    """What one step of :func:`write` leaves, arrays by name."""

    slots: dict[str, jax.Array]  # arrays of the cache that are scattered into, [pages * page_size, ...]
    source: jax.Array  # as in slots.py, for the others
    lines: dict[str, jax.Array]  # [tokens, ...] of the others


def write(
    request: AttentionRequest, rows: Rows, operands: Operands, lines: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The arrays of the cache by name, with ``lines [tokens, ...]`` in the slots of their tokens.

    Codes are scattered. Norms, 3 % of the cache, are not on a CPU, where :func:`select_slots` says why.
    """
    arrays = {name: getattr(operands.pages, name) for name in lines}
    num_slots = request.num_pages * request.page_size
    selected = [name for name in lines if request.platform == "cpu" and "norms" in name]

    def step(token: jax.Array, slot: jax.Array, before: Written) -> Written:
        slots = {name: old.at[slot].set(lines[name][token], mode="drop") for name, old in before.slots.items()}
        source = before.source.at[slot].set(token, mode="drop") if selected else before.source
        # They go through the loop because XLA would put their computation into the pass over the cache, for each slot.
        fresh = {name: old.at[token].set(lines[name][token]) for name, old in before.lines.items()}
        return Written(slots, source, fresh)

    state = Written(
        {name: array.reshape(num_slots, -1) for name, array in arrays.items() if name not in selected},
        jnp.full(num_slots if selected else 0, request.num_tokens, jnp.int32),
        {name: jnp.zeros_like(lines[name]) for name in selected},
    )
    state = write_tokens(request, rows, operands, step, state)
    source = state.source.reshape(request.num_pages, -1)
    written = {name: each.reshape(arrays[name].shape) for name, each in state.slots.items()}
    return written | {name: select_slots(arrays[name], each, source) for name, each in state.lines.items()}


def rotate(array: jax.Array, constants: TurboQuantConstants) -> tuple[jax.Array, jax.Array]:
    """Norm and rotated direction of each head, float32."""
    array = array.astype(jnp.float32)
    norms = jnp.linalg.norm(array, axis=-1, keepdims=True)
    direction = array / jnp.maximum(norms, TINY_NORM)
    return norms, jnp.einsum("thd,ed->the", direction, constants.rotation, precision="highest")


def nearest(array: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest entry; of two that are equally near the first."""
    return jnp.argmin(jnp.abs(array[..., None] - codebook), axis=-1).astype(jnp.uint8)


def pack(array: jax.Array, count: int) -> jax.Array:
    """``count`` neighbours of the last axis in each byte, the first in the lowest bits."""
    parts = array.astype(jnp.uint8).reshape(*array.shape[:-1], array.shape[-1] // count, count)
    return jnp.sum(parts << jnp.arange(0, 8, 8 // count, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def tables_of(constants: TurboQuantConstants, dtype: jnp.dtype) -> Tables:
    """Look-up tables in ``dtype``. An index that the codebook does not have stands for 0."""
    byte = np.arange(256)
    pair = np.stack([byte & 15, byte >> 4], axis=1)
    signs = np.where(byte[:, None] >> np.arange(8) & 1, 1.0, -1.0)

    def pairs(codebook: jax.Array) -> jax.Array:
        return jnp.pad(codebook.astype(dtype), (0, INDEX_LEVELS - codebook.shape[0]))[pair]

    return Tables(pairs(constants.key_codebook), jnp.asarray(signs, dtype), pairs(constants.value_codebook))


def attend(request: AttentionRequest, config: RaggedPageConfig, rows: Rows, operands: Operands) -> jax.Array:
    """Attention of all live tokens, ``[tokens, q_heads, head_dim]`` in the queries' dtype; all others give zeros."""
    pages, constants = operands.pages, operands.pages.constants
    # Codes carry more than the short types hold, and EasyDeL computes in float32, too.
    dtype = jnp.promote_types(jnp.promote_types(request.query_dtype, request.compute_dtype), jnp.float32)
    heads, group, head_dim = request.num_kv_heads, request.group_size, request.head_dim
    small = request.num_tokens <= DECODE_TILE * request.num_rows
    tile = min(config.num_queries_per_block or (DECODE_TILE if small else PREFILL_TILE), request.num_tokens)
    wanted = config.num_kv_pages_per_block or BLOCK_TOKENS // request.page_size
    step_pages = max(1, min(wanted, request.pages_per_row))
    step_tokens = step_pages * request.page_size

    queries = operands.queries.astype(dtype).reshape(-1, heads, group, head_dim)
    queries = jnp.pad(queries, ((0, tile), (0, 0), (0, 0), (0, 0)))
    rotation, projection = constants.rotation.astype(dtype), constants.projection.astype(dtype)
    rotated = jnp.einsum("thgd,ed->thge", queries, rotation, precision="highest")
    projected = jnp.einsum("thgd,md->thgm", queries, projection, precision="highest")
    # One product gives both parts of a logit: centroids times the key's norm, signs times the rest's norm.
    both = jnp.concatenate([rotated, projected * (math.sqrt(math.pi / 2) / projection.shape[0])], axis=-1)
    tables = tables_of(constants, dtype)

    num_tiles = -(-rows.num_queries // tile)
    last_tile = jnp.cumsum(num_tiles)

    def run_tile(index: jax.Array, output: jax.Array) -> jax.Array:
        row = jnp.minimum(jnp.sum(index >= last_tile, dtype=jnp.int32), request.num_rows - 1)
        offset = (index - (last_tile[row] - num_tiles[row])) * tile
        start = rows.query_start[row] + offset
        filled = jnp.minimum(rows.num_queries[row] - offset, tile)
        first_query = rows.context[row] - rows.num_queries[row] + offset
        position_of_query = first_query + jnp.arange(tile, dtype=jnp.int32)
        tile_queries = lax.dynamic_slice_in_dim(both, start, tile)
        tile_queries = jnp.transpose(tile_queries, (1, 2, 0, 3)).reshape(heads, group * tile, -1)
        begin, end = first_position(request, first_query), first_query + filled
        first_page = begin // request.page_size

        def step(trip: jax.Array, state: Softmax) -> Softmax:
            cache, trip = pin(pages.arrays, trip)
            page = first_page + trip * step_pages
            entries = jnp.minimum(page + jnp.arange(step_pages, dtype=jnp.int32), request.pages_per_row - 1)
            keys, values = decode(cache, operands.block_tables[row][entries], tables)
            position = page * request.page_size + jnp.arange(step_tokens, dtype=jnp.int32)
            inside = (position >= begin) & (position < end)
            values = jnp.where(inside[:, None, None], values, 0)  # 0 * NaN of a dead slot is NaN
            logits = logits_of(request, jnp.einsum("hmd,thd->hmt", tile_queries, keys))
            visible = (position[None, :] <= position_of_query[:, None]) & inside[None, :]
            visible &= position[None, :] >= first_position(request, position_of_query)[:, None]
            logits = jnp.where(visible, logits.reshape(heads, group, tile, step_tokens), -jnp.inf)
            maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=-1))
            weights = weights_of(logits, visible, maximum)
            kept = rescale(state.maximum, maximum)
            summed = jnp.einsum("hmt,thd->hmd", weights.reshape(heads, group * tile, step_tokens), values)
            return Softmax(
                maximum,
                kept * state.total + jnp.sum(weights, axis=-1),
                kept[..., None] * state.weighted + summed.reshape(state.weighted.shape),
            )

        state = initial_softmax(request, operands.sinks, (tile,), dtype)
        state = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), state)
        num_pages = -(-end // request.page_size) - first_page
        state = lax.fori_loop(0, -(-num_pages // step_pages), step, state)
        result = state.weighted / jnp.where(state.total > 0, state.total, 1.0)[..., None]
        result = jnp.transpose(result, (2, 0, 1, 3))
        there = lax.dynamic_slice_in_dim(output, start, tile)
        mine = (jnp.arange(tile, dtype=jnp.int32) < filled)[:, None, None, None]
        return lax.dynamic_update_slice_in_dim(output, jnp.where(mine, result, there), start, 0)

    output = jnp.zeros((request.num_tokens + tile, heads, group, head_dim), dtype)
    output = lax.fori_loop(0, last_tile[-1], run_tile, output)[: request.num_tokens]
    output = jnp.einsum("thge,ed->thgd", output, rotation, precision="highest")
    return output.reshape(operands.queries.shape).astype(operands.queries.dtype)


def decode(cache: tuple[jax.Array, ...], ids: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Keys with their signs ``[tokens, kv_heads, head_dim + signs]`` and rotated values of whole pages."""
    indices, signs, norms, value_indices, value_norms = (
        array.at[ids].get(mode="clip").reshape(-1, *array.shape[2:]) for array in cache
    )

    def look_up(table: jax.Array, packed: jax.Array) -> jax.Array:
        return table[packed].reshape(*packed.shape[:-1], -1)

    dtype = tables.signs.dtype
    keys = look_up(tables.key_pairs, indices) * norms[..., :1].astype(dtype)
    rest = look_up(tables.signs, signs) * norms[..., 1:].astype(dtype)
    values = look_up(tables.value_pairs, value_indices) * value_norms[..., None].astype(dtype)
    return jnp.concatenate([keys, rest], axis=-1), values
