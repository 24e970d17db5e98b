"""Ragged page attention over TurboQuant caches, in plain JAX.

The formulas are those of :mod:`easydel_ragged_plugin.turboquant`. How they are computed:

* New tokens are compressed all at once, and only their slots are written.
* A tile of queries reads only the live blocks of its row, and unpacks a block when it reads it.
* One look-up unpacks a byte of the cache, into two centroids or eight signs.
* Values stay rotated while they are summed. The rotation is linear, so the sum is rotated back once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin.blockwise import Results, Softmax, Tiling, attend_tiles, empty_results, statistics_dtype
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.rows import Rows, live_rows
from easydel_ragged_plugin.turboquant import (
    ARRAYS,
    FORMAT,
    TurboQuantConstants,
    TurboQuantPages,
    compress,
    padded_codebook,
    queries_for_codes,
    rotate_back,
)
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands
from easydel_ragged_plugin.writes import select_slots, too_many_slots, write_tokens

__all__ = ["KERNEL", "TurboQuantKernel"]

BLOCK_TOKENS = 256
"""Key tokens that one step reads."""

DECODE_TILE, PREFILL_TILE = 4, 64
"""Query tokens of a tile: where a batch has no more than the first number for each row on average; elsewhere."""


class Tables(NamedTuple):
    """The numbers that each byte of the cache represents."""

    key_pairs: jax.Array  # [256, 2]
    signs: jax.Array  # [256, 8]
    value_pairs: jax.Array  # [256, 2]


def update(request: AttentionRequest, rows: Rows, operands: Operands) -> TurboQuantPages:
    """Compress the keys and values of live tokens into their slots; every other slot keeps its bits."""
    assert operands.keys is not None
    assert operands.values is not None
    new = compress(operands.keys, operands.values, operands.pages)
    lines = {name: each.reshape(request.num_tokens, -1) for name, each in zip(ARRAYS, new, strict=True)}
    return operands.pages._replace(**write(request, rows, operands, lines))


class Written(NamedTuple):
    """State of the loop of :func:`write`, arrays by name."""

    slots: dict[str, jax.Array]  # arrays of the cache that are scattered into, [pages * page_size, ...]
    source: jax.Array  # as in writes.py, for the others
    lines: dict[str, jax.Array]  # [tokens, ...] of the others


def write(
    request: AttentionRequest, rows: Rows, operands: Operands, lines: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The arrays of the cache by name, with ``lines [tokens, ...]`` in the slots of their tokens.

    Arrays are scattered into, except the norms on a CPU (3 % of the cache): :func:`select_slots` has the reason.
    """
    arrays = {name: getattr(operands.pages, name) for name in lines}
    num_slots = request.num_pages * request.page_size
    selected = [name for name in lines if request.platform == "cpu" and "norms" in name]

    def step(token: jax.Array, slot: jax.Array, before: Written) -> Written:
        slots = {name: old.at[slot].set(lines[name][token], mode="drop") for name, old in before.slots.items()}
        source = before.source.at[slot].set(token, mode="drop") if selected else before.source
        # Through the loop, because XLA would otherwise compute them in the pass over the cache, once for each slot.
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


def tables_of(constants: TurboQuantConstants, dtype: jnp.dtype) -> Tables:
    """Look-up tables in ``dtype``. An index past the codebook gives 0."""
    byte = np.arange(256)
    pair = np.stack([byte & 15, byte >> 4], axis=1)
    signs = np.where(byte[:, None] >> np.arange(8) & 1, 1.0, -1.0)

    def pairs(codebook: jax.Array) -> jax.Array:
        return padded_codebook(codebook.astype(dtype))[pair]

    return Tables(pairs(constants.key_codebook), jnp.asarray(signs, dtype), pairs(constants.value_codebook))


def attend(request: AttentionRequest, config: RaggedPageConfig, rows: Rows, operands: Operands) -> Results:
    """Attention of all live tokens, in the queries' dtype."""
    pages, constants = operands.pages, operands.pages.constants
    # Codes are more exact than the short types, and EasyDeL computes in float32, too.
    dtype = np.promote_types(statistics_dtype(request), request.compute_dtype)
    small = request.num_tokens <= DECODE_TILE * request.num_rows
    tile = min(config.num_queries_per_block or (DECODE_TILE if small else PREFILL_TILE), request.num_tokens)
    wanted = config.num_kv_pages_per_block or BLOCK_TOKENS // request.page_size
    tiling = Tiling(tile, max(1, min(wanted, request.pages_per_row)), dtype, dtype)

    queries = queries_for_codes(operands.queries, constants, dtype)
    queries = queries.reshape(-1, request.num_kv_heads, request.group_size, queries.shape[-1])
    tables = tables_of(constants, dtype)

    def read(cache: tuple[jax.Array, ...], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return unpack(cache, ids, tables)

    def normalize(state: Softmax) -> jax.Array:
        return state.weighted / jnp.where(state.total == 0, 1.0, state.total)[..., None]

    results = empty_results(request, tile, dtype)
    results = attend_tiles(request, tiling, rows, operands, pages.arrays, queries, read, normalize, results)
    sums = results.output[: request.num_tokens]
    output = rotate_back(sums.reshape(request.num_tokens, request.num_q_heads, -1), constants)
    return Results(output.reshape(sums.shape).astype(request.query_dtype), results.lse).finished(request)


def unpack(cache: tuple[jax.Array, ...], ids: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Keys with their signs ``[slots, kv_heads, head_dim + signs]`` and rotated values of whole pages."""
    indices, signs, norms, value_indices, value_norms = (
        array.at[ids].get(mode="clip").reshape(-1, *array.shape[2:]) for array in cache
    )

    def look_up(table: jax.Array, packed: jax.Array) -> jax.Array:
        return table[packed].reshape(*packed.shape[:-1], -1)

    dtype = tables.signs.dtype
    keys = look_up(tables.key_pairs, indices) * norms[..., :1].astype(dtype)
    residual = look_up(tables.signs, signs) * norms[..., 1:].astype(dtype)
    values = look_up(tables.value_pairs, value_indices) * value_norms[..., None].astype(dtype)
    return jnp.concatenate([keys, residual], axis=-1), values


class TurboQuantKernel(Kernel):
    """Ragged page attention v2 and v3 over TurboQuant caches, in plain JAX."""

    name = "turboquant"
    platforms = frozenset({"cpu", "gpu", "tpu", "tt"})
    technologies = frozenset({"xla"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "sinks",
                "compute_dtype",
                "update_pages",
                "vmem_limit_bytes",  # uses no VMEM
            }
        ),
        cache_formats=frozenset({FORMAT.name}),
        results=frozenset({"lse"}),
    )
    label = "TurboQuant (this package)"
    color = "#4f5d95"

    def refuses(self, request: AttentionRequest) -> str | None:
        """Only pages that :func:`~easydel_ragged_plugin.writes.too_many_slots` can't write."""
        return too_many_slots(request)

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        with jax.named_scope("ragged_page_attention_turboquant"):
            rows, pages = live_rows(request, operands), operands.pages
            if operands.keys is not None:
                pages = update(request, rows, operands)
            output, lse = attend(request, config, rows, operands._replace(pages=pages))
        return Attended(output, pages, lse)


KERNEL = TurboQuantKernel()
