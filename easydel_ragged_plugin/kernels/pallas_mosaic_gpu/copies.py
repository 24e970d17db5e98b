"""What comes into shared memory and leaves it: pages, queries and output, by the tensor memory accelerator (TMA)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from easydel_ragged_plugin.rows import needed_entries, visible_keys
from easydel_ragged_plugin.types import AttentionRequest

from .scratch import Scratch, Tile, span
from .sizes import OUTPUT_LANES, QUERIES, Sizes

__all__ = ["copy_blocks", "load_queries", "stage", "store_output"]


def stored_slots(
    request: AttentionRequest, pages: Any, page: Any, slot: Any, size: int, kv_head: Any, value: bool
) -> Any:
    """A view of the keys or values of one kv head in ``size`` slots of a page, ``[size, head_dim]``."""
    slots = pl.ds(slot, size)
    if request.version == "v2":
        return pages.at[page, slots, 2 * kv_head + int(value)]
    _, _, _, pack, lanes = pages.shape
    in_one = request.layout.head_stride == lanes  # keys and values share the lanes of a stored head
    stored = kv_head if in_one else 2 * kv_head + int(value)
    begin = request.head_dim if in_one and value else 0
    return pages.at[
        page, slots, lax.div(stored, jnp.int32(pack)), lax.rem(stored, jnp.int32(pack)), pl.ds(begin, request.head_dim)
    ]


def copy_blocks(
    request: AttentionRequest, sizes: Sizes, tile: Tile, tables: Any, pages: Any, kv_head: Any, scratch: Scratch
) -> None:
    """What the memory warpgroup does: all blocks of a tile, each as soon as its place is free."""
    size = span(request, sizes)
    first_entry, last_entry = needed_entries(request, tile.context, tile.new)
    seen_begin, _ = visible_keys(request, tile.first, tile.last)

    def copy(block: jax.Array, value: bool, to: Any, barrier: Any) -> None:
        for piece in range(sizes.keys // size):
            position = block * sizes.keys + piece * size
            # Only entries that the row needs hold pages for certain. What another page gives is masked.
            entry = jnp.clip(lax.div(position, jnp.int32(request.page_size)), first_entry, last_entry)
            slot = lax.rem(position, jnp.int32(request.page_size))
            source = stored_slots(request, pages, tables[tile.row, entry], slot, size, kv_head, value)
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(piece * size, size)], barrier)

    def step(index: jax.Array, carry: Any) -> Any:
        block, stage = tile.begin + index, lax.rem(index, jnp.int32(sizes.stages))
        again = index >= sizes.stages

        @pl.when(again)
        def _() -> None:
            plgpu.barrier_wait(scratch.keys_free.at[stage])

        copy(block, False, scratch.keys.at[stage], scratch.keys_there.at[stage])

        @pl.when(again)
        def _() -> None:
            plgpu.barrier_wait(scratch.values_free.at[stage])

        values, there = scratch.values.at[stage], scratch.values_there.at[stage]
        position = block * sizes.keys
        edge = (position < seen_begin) | (position + sizes.keys > tile.context)

        @pl.when(jnp.logical_not(edge))
        def _() -> None:
            copy(block, True, values, there)

        @pl.when(edge)
        def _() -> None:
            copy(block, True, values, scratch.edge_there)
            plgpu.barrier_wait(scratch.edge_there)
            clean(request, sizes, values, seen_begin - position, tile.context - position)
            for _ in range(sizes.keys // size):
                plgpu.barrier_arrive(there)

        return carry

    lax.fori_loop(0, tile.end - tile.begin, step, None)


def clean(request: AttentionRequest, sizes: Sizes, values: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeros in place of the values ``[keys, head_dim]`` outside of ``[begin, end)``."""
    lanes = 128 // request.compute_dtype.itemsize
    for first in range(0, sizes.keys, QUERIES):
        key = first + plgpu.broadcasted_iota(jnp.int32, (QUERIES, lanes), 0, layout=plgpu.Layout.WGMMA)
        kept = (key >= begin) & (key < end)
        for lane in range(0, request.head_dim, lanes):
            part = values.at[pl.ds(first, QUERIES), pl.ds(lane, lanes)]
            part[...] = jnp.where(kept, part[...], jnp.zeros((), request.compute_dtype))
    plgpu.commit_smem()


def load_queries(
    request: AttentionRequest, sizes: Sizes, queries: Any, token: Any, kv_head: Any, to: Any, barrier: Any
) -> None:
    """Copy the queries of a warpgroup's tokens, in the order of :class:`~.sizes.Sizes`. Past the last token: zeros."""
    group, tokens = request.group_size, sizes.tokens
    if sizes.heads_first:
        for head in range(group):
            source = queries.at[pl.ds(token, tokens), kv_head * group + head]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(head * tokens, tokens)], barrier)
    else:
        for offset in range(tokens):
            source = queries.at[token + offset, pl.ds(kv_head * group, group)]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(offset * group, group)], barrier)


def store_output(
    request: AttentionRequest, sizes: Sizes, staged: Any, output: Any, token: Any, live: Any, kv_head: Any, lane: int
) -> None:
    """Copy the staged lanes of the first ``live`` tokens of a warpgroup to ``output``."""
    group, tokens = request.group_size, sizes.tokens
    lanes = pl.ds(lane, OUTPUT_LANES)
    if sizes.heads_first:
        size = tokens
        while size:  # the powers of two that make up the number
            done = live & -(2 * size)

            @pl.when((live & size) != 0)
            def _(size: int = size, done: Any = done) -> None:
                for head in range(group):
                    plgpu.copy_smem_to_gmem(
                        staged.at[pl.ds(head * tokens + done, size)],
                        output.at[pl.ds(token + done, size), kv_head * group + head, lanes],
                    )

            size //= 2
    else:
        for offset in range(tokens):

            @pl.when(offset < live)
            def _(offset: int = offset) -> None:
                plgpu.copy_smem_to_gmem(
                    staged.at[pl.ds(offset * group, group)],
                    output.at[token + offset, pl.ds(kv_head * group, group), lanes],
                )


def stage(lanes: jax.Array, staged: Any) -> None:
    """Store lanes of the output in shared memory, whose rows are whole: the threads of a warp meet in its banks."""
    if hasattr(plgpu, "store"):
        plgpu.store(staged, lanes, optimized=False)
    else:  # JAX 0.9, which does not ask
        staged[...] = lanes
