"""What a program has: its tile, its shared memory and its barriers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from easydel_ragged_plugin.kernels.pallas_gpu.work import Column
from easydel_ragged_plugin.rows import visible_keys
from easydel_ragged_plugin.types import AttentionRequest

from .sizes import COMPUTE_WARPGROUPS, OUTPUT_LANES, QUERIES, Sizes

__all__ = ["Scratch", "Tile", "span"]


class Scratch(NamedTuple):
    """Shared memory of a program, and its barriers. One of each for each stage or warpgroup.

    Attributes:
        queries: ``[warpgroups, 64, head_dim]``.
        keys, values: ``[stages, keys, head_dim]``.
        output: ``[warpgroups, 64, 64]``, some lanes on their way out.
        rows: ``[warpgroups, 64]`` float32: sinks on their way in, logsumexps on their way out.
        queries_there: copies of queries have come.
        keys_there, values_there: copies of a block have come.
        keys_free, values_free: both warpgroups are done with a block.
        edge_there: copies of values have come that are to be cleaned first.
        turn: where the warpgroups take turns.
    """

    queries: Any
    keys: Any
    values: Any
    output: Any
    rows: Any
    queries_there: Any
    keys_there: Any
    values_there: Any
    keys_free: Any
    values_free: Any
    edge_there: Any
    turn: Any

    @classmethod
    def types(cls, request: AttentionRequest, sizes: Sizes) -> Scratch:
        """What to allocate."""
        dtype, lanes = request.compute_dtype, request.head_dim
        transforms: Any = plgpu  # whether these are abstract classes depends on the version of JAX
        swizzled = (transforms.TilingTransform((8, 128 // dtype.itemsize)), transforms.SwizzleTransform(128))
        block = plgpu.SMEM((sizes.stages, sizes.keys, lanes), dtype, transforms=swizzled)
        copies = sizes.keys // span(request, sizes)
        query_copies = request.group_size if sizes.heads_first else sizes.tokens
        come = plgpu.Barrier(num_arrivals=copies, num_barriers=sizes.stages)
        free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=sizes.stages)
        return cls(
            plgpu.SMEM((COMPUTE_WARPGROUPS, QUERIES, lanes), dtype, transforms=swizzled),
            block,
            block,
            plgpu.SMEM((COMPUTE_WARPGROUPS, QUERIES, OUTPUT_LANES), dtype),
            plgpu.SMEM((COMPUTE_WARPGROUPS, QUERIES), jnp.float32),
            plgpu.Barrier(num_arrivals=query_copies + request.options.sinks, num_barriers=COMPUTE_WARPGROUPS),
            come,
            come,
            free,
            free,
            plgpu.Barrier(num_arrivals=copies),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        )


class Tile(NamedTuple):
    """What a program attends to, scalars. Positions are those in the context of its row."""

    row: jax.Array
    token: jax.Array
    """First token."""
    tokens: jax.Array
    """Tokens that there are; zero where the program has no work."""
    context: jax.Array
    new: jax.Array
    """New tokens of the row."""
    first: jax.Array
    """Position of the first token."""
    last: jax.Array
    begin: jax.Array
    """First block of keys."""
    end: jax.Array

    @classmethod
    def of(cls, request: AttentionRequest, sizes: Sizes, work: Any, part: jax.Array) -> Tile:
        """That of a part of the work list."""
        columns = (Column.ROW, Column.START, Column.TOKENS, Column.CONTEXT, Column.FIRST)
        row, start, count, context, offset = (work[part, int(column)] for column in columns)
        tokens = jnp.clip(count - offset, 0, sizes.tile_tokens)
        first = context - count + offset
        last = first + tokens - 1
        seen_begin, seen_end = visible_keys(request, first, last)
        begin = lax.div(seen_begin, jnp.int32(sizes.keys))
        end = lax.div(seen_end + (sizes.keys - 1), jnp.int32(sizes.keys))
        return cls(row, start + offset, tokens, context, count, first, last, begin, end)


def span(request: AttentionRequest, sizes: Sizes) -> int:
    """Keys that one copy brings: a page, or as much of it as a block has."""
    return min(request.page_size, sizes.keys)
