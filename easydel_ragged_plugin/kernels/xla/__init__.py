"""Portable kernel: ragged page attention in plain JAX, for every platform.

Rows are split by what bounds them.

*Decode rows* (one new token) are bound by reading pages. Their contexts are cut into blocks of a few pages, and the
blocks of all rows form one list. A loop takes ``lanes`` blocks at a time from that list, whichever rows they belong
to, computes the partial softmax of each, and merges it into the running state of its row. The trip count follows the
number of live blocks, so the width of the table and the length of other rows cost nothing.

*Longer rows* (prefill, chunked prefill) are bound by arithmetic. Each tile of query tokens runs over the blocks
between the first position that its window reaches and its last causal one, with the online softmax of ``blockwise.py``.

Both loops are always compiled, and make no trip when no row needs them. Pages are read through
:class:`~easydel_ragged_plugin.layout.PageLayout`, so the same code reads every page shape.

On a TPU an array is tiled over its last two axes, so a reshape that merges these moves every element, and XLA chooses
the order of the axes by what reads them: it would copy the whole cache at each call. There the pages keep their shape
and the order of their axes, blocks are put together page by page, and new tokens are written one by one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from easydel_ragged_plugin.blockwise import (
    Results,
    Softmax,
    Tiling,
    attend_tiles,
    empty_results,
    initial_softmax,
    logits_of,
    lse_of,
    pin,
    rescale,
    statistics_dtype,
    weights_of,
)
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.rows import Rows, first_visible, live_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands
from easydel_ragged_plugin.varying import vary
from easydel_ragged_plugin.writes import select_slots, sources_of_slots, to_cache_dtype, too_many_slots, write_tokens

__all__ = ["KERNEL", "XlaKernel"]

DECODE_BLOCK_TOKENS = 256
"""Tokens that one lane of the decode loop reads in a step."""

DECODE_STEP_TOKENS = 2048
"""Tokens that all lanes of the decode loop read in a step. Limits its temporary memory."""

PREFILL_BLOCK_TOKENS = 256
"""Key tokens of one prefill step."""

PREFILL_TILE_QUERIES = 512
"""Query vectors of one prefill product: query tokens of a tile times the query heads of a kv head."""


def update_pages(request: AttentionRequest, rows: Rows, operands: Operands) -> jax.Array:
    """Write the new keys and values of live tokens into their slots; every other slot keeps its bits.

    The padding of a written slot (elements past head_dim, heads past kv_heads) becomes zero, as in the TPU kernel.
    """
    new = merge_heads(request, operands.keys, operands.values)
    if request.platform == "cpu":
        return select_slots(operands.pages, new, sources_of_slots(request, rows, operands))

    if request.platform == "tpu":
        merged = new.reshape(-1, 1, 1, *operands.pages.shape[2:])
        return write_tokens(request, rows, operands, functools.partial(write_one_by_one, merged), operands.pages)

    def scatter(token: jax.Array, slot: jax.Array, flat: jax.Array) -> jax.Array:
        return flat.at[slot].set(new[token], mode="drop")

    flat = operands.pages.reshape(-1, request.layout.token_stride)
    return write_tokens(request, rows, operands, scatter, flat).reshape(operands.pages.shape)


def write_one_by_one(new: jax.Array, token: jax.Array, slot: jax.Array, pages: jax.Array) -> jax.Array:
    """``pages`` with ``new[token]`` in the slots, in place on a TPU, where a scatter copies the pages.

    Args:
        new: ``[tokens, 1, 1, ...]``, the last axes those of a slot.
        token, slot: as in :func:`~easydel_ragged_plugin.writes.write_tokens`; those that are past the end come last.
        pages: ``[pages, page_size, ...]``.
    """
    num_pages, page_size = pages.shape[:2]

    def put(index: jax.Array, pages: jax.Array) -> jax.Array:
        page, within = lax.div(slot[index], jnp.int32(page_size)), lax.rem(slot[index], jnp.int32(page_size))
        start = (page, within, *(jnp.int32(0) for _ in pages.shape[2:]))
        return lax.dynamic_update_slice(row_major(pages), new[token[index]], start)

    count = jnp.sum(slot < num_pages * page_size, dtype=jnp.int32)
    return lax.fori_loop(0, count, put, pages)


def row_major(array: jax.Array) -> jax.Array:
    """``array``, which XLA must keep with its last axis innermost."""
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def merge_heads(request: AttentionRequest, keys: jax.Array | None, values: jax.Array | None) -> jax.Array:
    """Keys and values of each token as one slot of the cache, ``[tokens, token_stride]``."""
    assert keys is not None  # for v3, api.py made both
    assert values is not None
    layout = request.layout
    padding = layout.padded_head_dim - request.head_dim
    pair = jnp.stack([to_cache_dtype(keys, request), to_cache_dtype(values, request)], axis=2)
    pair = jnp.pad(pair, ((0, 0), (0, 0), (0, 0), (0, padding))) if padding else pair
    merged = pair.reshape(pair.shape[0], -1)
    return jnp.pad(merged, ((0, 0), (0, layout.token_stride - merged.shape[1])))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static sizes of one compiled program."""

    pages: int
    """Pages in one block."""
    lanes: int
    """Blocks that one decode step takes."""
    tile: int
    """Query tokens of a prefill tile."""
    prefill_pages: int
    """Pages that one prefill step reads."""

    @classmethod
    def choose(cls, request: AttentionRequest, config: RaggedPageConfig) -> Blocks:
        """Sizes for a request: the config's where it sets them, else from the defaults above."""

        def pages_of(tokens: int) -> int:
            wanted = config.num_kv_pages_per_block or -(-tokens // request.page_size)
            return max(1, min(wanted, request.pages_per_row))

        pages = pages_of(DECODE_BLOCK_TOKENS)
        most_blocks = request.num_rows * -(-request.pages_per_row // pages)
        lanes = max(1, min(DECODE_STEP_TOKENS // (pages * request.page_size), most_blocks))
        tile = config.num_queries_per_block or min(256, max(32, PREFILL_TILE_QUERIES // request.group_size))
        return cls(pages, lanes, min(tile, request.num_tokens), pages_of(PREFILL_BLOCK_TOKENS))


def operand_dtype(request: AttentionRequest) -> jnp.dtype:
    """Dtype of the products' operands.

    CPUs multiply float32 at full rate and emulate shorter types, so float32 is both faster and more exact there.
    """
    if request.platform == "cpu":
        return np.promote_types(request.compute_dtype, np.float32)
    return request.compute_dtype


def gather_one_by_one(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """``pages[ids]`` without a gather, for which XLA copies the cache into another order on a TPU (v5e)."""

    def read(page: jax.Array) -> jax.Array:
        return row_major(lax.dynamic_index_in_dim(row_major(pages), page, keepdims=False))

    return row_major(lax.map(read, ids))


def read_pages(request: AttentionRequest, pages: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages: ``[..., pages * page_size, kv_heads, head_dim]`` for ids ``[..., pages]``."""
    layout = request.layout
    if request.platform == "tpu":
        block = gather_one_by_one(pages, jnp.clip(ids.reshape(-1), 0, request.num_pages - 1))
    else:
        flat = pages.reshape(request.num_pages, layout.page_size, layout.token_stride)
        block = flat.at[ids].get(mode="clip")
    block = block.reshape(*ids.shape[:-1], ids.shape[-1] * layout.page_size, layout.token_stride)
    block = block[..., : request.num_kv_heads * layout.head_stride]
    block = block.reshape(*block.shape[:-1], request.num_kv_heads, layout.head_stride)
    keys = block[..., : request.head_dim]
    values = block[..., layout.value_offset : layout.value_offset + request.head_dim]
    return keys, values


def normalize(request: AttentionRequest, v_scale: jax.Array | None, state: Softmax) -> jax.Array:
    """Attention output of a finished softmax; zeros where nothing was seen. ``v_scale`` is a further factor that
    broadcasts against the output."""
    total = state.total[..., None]
    output = state.weighted / jnp.where(total == 0, 1.0, total) * request.v_scale
    output = output if v_scale is None else output * v_scale.astype(output.dtype)
    return output.astype(request.query_dtype)


def attend_decode(
    request: AttentionRequest, blocks: Blocks, rows: Rows, operands: Operands, pages: jax.Array, results: Results
) -> Results:
    """Attention of all rows with one query; their tokens of ``results`` are set."""
    dtype = operand_dtype(request)
    lanes, block_tokens = blocks.lanes, blocks.pages * request.page_size
    num_rows, num_kv_heads, group = request.num_rows, request.num_kv_heads, request.group_size

    # Decode rows first, so that neighboring blocks belong to neighboring ranks.
    order = jnp.argsort(rows.num_queries != 1, stable=True).astype(jnp.int32)
    is_decode = rows.num_queries[order] == 1
    context = jnp.where(is_decode, rows.context[order], 0)
    first_page = first_visible(request, context - 1) // request.page_size
    num_pages = jnp.where(is_decode, -(-context // request.page_size) - first_page, 0)
    num_blocks = -(-num_pages // blocks.pages)
    last_block = jnp.cumsum(num_blocks)
    token = jnp.where(is_decode, rows.query_start[order], 0)
    queries = operands.queries[token].reshape(num_rows, num_kv_heads, group, request.head_dim)
    tables = operands.block_tables

    def step(trip: jax.Array, state: Softmax) -> Softmax:
        cache, trip = pin(pages, trip)
        item = trip * lanes + jnp.arange(lanes, dtype=jnp.int32)
        rank = jnp.sum(item[:, None] >= last_block[None, :], axis=1, dtype=jnp.int32)
        taken = rank < num_rows
        rank = jnp.minimum(rank, num_rows - 1)
        block = item - (last_block[rank] - num_blocks[rank])
        page = first_page[rank] + block * blocks.pages
        entries = page[:, None] + jnp.arange(blocks.pages, dtype=jnp.int32)[None, :]
        ids = tables[order[rank][:, None], jnp.minimum(entries, request.pages_per_row - 1)]
        keys, values = read_pages(request, cache, ids)

        position = page[:, None] * request.page_size + jnp.arange(block_tokens, dtype=jnp.int32)[None, :]
        end = context[rank][:, None]
        visible = taken[:, None] & (position < end) & (position >= first_visible(request, end - 1))
        keys = jnp.swapaxes(keys, 1, 2).astype(dtype)
        values = jnp.where(visible[:, :, None, None], values, 0)  # 0 * NaN of a dead slot is NaN
        values = jnp.swapaxes(values, 1, 2).astype(dtype)
        products = jnp.einsum(
            "whgd,whtd->whgt", queries[rank].astype(dtype), keys, preferred_element_type=state.total.dtype
        )
        visible = visible[:, None, None, :]
        k_scale = None if operands.k_scale is None else operands.k_scale[None, :, None, None]
        logits = jnp.where(visible, logits_of(request, products, k_scale), -jnp.inf)
        maximum = jnp.max(logits, axis=-1)
        weights = weights_of(logits, visible, maximum)
        part = Softmax(
            maximum,
            jnp.sum(weights, axis=-1),
            jnp.einsum("whgt,whtd->whgd", weights.astype(dtype), values, preferred_element_type=state.total.dtype),
        )
        return merge_parts(state, part, rank, taken)

    # The state has `lanes` spare ranks after the last row, so that a slice of it is never clamped.
    nothing = vary(initial_softmax(request, operands.sinks, (num_rows + lanes,), statistics_dtype(request)), operands)
    state = lax.fori_loop(0, -(-last_block[-1] // lanes), step, nothing)
    state = jax.tree.map(lambda leaf: leaf[:num_rows], state)
    token = jnp.where(is_decode, token, results.output.shape[0])  # one past the end: dropped
    lse = None if results.lse is None else results.lse.at[token].set(lse_of(state), mode="drop")
    v_scale = None if operands.v_scale is None else operands.v_scale[None, :, None, None]
    return Results(results.output.at[token].set(normalize(request, v_scale, state), mode="drop"), lse)


def merge_parts(state: Softmax, part: Softmax, rank: jax.Array, taken: jax.Array) -> Softmax:
    """Merge the partial softmax of each lane into the state of its row.

    The lanes have neighboring ranks, so only ``lanes`` entries of the state change, however many rows there are.
    """
    lanes = rank.shape[0]
    base = rank[0]
    before = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, base, lanes), state)
    owner = (rank - base)[None, :] == jnp.arange(lanes, dtype=jnp.int32)[:, None]
    owner = (owner & taken[None, :])[:, :, None, None]
    maximum = jnp.maximum(before.maximum, jnp.max(jnp.where(owner, part.maximum[None], -jnp.inf), axis=1))
    factor = jnp.where(owner, rescale(part.maximum[None], maximum[:, None]), 0.0)
    kept = rescale(before.maximum, maximum)
    # Not a product: 0 times what is not finite is NaN, and lanes have different rows.
    weighted = jnp.where(owner[..., None], factor[..., None] * part.weighted[None], 0.0)
    merged = Softmax(
        maximum,
        kept * before.total + jnp.sum(jnp.where(owner, factor * part.total[None], 0.0), axis=1),
        kept[..., None] * before.weighted + jnp.sum(weighted, axis=1),
    )
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, base, 0), state, merged)


def attend_prefill(
    request: AttentionRequest, blocks: Blocks, rows: Rows, operands: Operands, pages: jax.Array, results: Results
) -> Results:
    """Attention of all rows with several queries; their tokens of ``results`` are set."""
    several = rows._replace(num_queries=jnp.where(rows.num_queries > 1, rows.num_queries, 0))
    tiling = Tiling(blocks.tile, blocks.prefill_pages, operand_dtype(request), statistics_dtype(request))
    queries = operands.queries.reshape(-1, request.num_kv_heads, request.group_size, request.head_dim)
    v_scale = None if operands.v_scale is None else operands.v_scale[:, None, None, None]
    return attend_tiles(
        request,
        tiling,
        several,
        operands,
        pages,
        queries,
        functools.partial(read_pages, request),
        functools.partial(normalize, request, v_scale),
        results,
    )


class XlaKernel(Kernel):
    """Ragged page attention v2 and v3 in plain JAX."""

    name = "xla"
    platforms = frozenset({"cpu", "gpu", "tpu", "tt"})
    technologies = frozenset({"xla"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "k_scale",
                "v_scale",
                "scale_arrays",
                "sinks",
                "compute_dtype",
                "update_pages",
                "vmem_limit_bytes",  # uses no VMEM
            }
        ),
        results=frozenset({"lse"}),
    )
    custom_calls = ("LayoutConstraint",)  # on TPU
    label = "XLA (this package)"
    color = "#7cc5bd"

    def refuses(self, request: AttentionRequest) -> str | None:
        """Only pages that :func:`~easydel_ragged_plugin.writes.too_many_slots` can't write."""
        return too_many_slots(request)

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        blocks = Blocks.choose(request, config)
        with jax.named_scope("ragged_page_attention_xla"):
            rows = live_rows(request, operands)
            pages = operands.pages
            if operands.keys is not None:
                pages = update_pages(request, rows, operands)
            results = empty_results(request, blocks.tile, request.query_dtype)
            results = attend_decode(request, blocks, rows, operands, pages, results)
            if request.num_tokens > 1:
                results = attend_prefill(request, blocks, rows, operands, pages, results)
            output, lse = results.finished(request)
        return Attended(output, pages, lse)


KERNEL = XlaKernel()
