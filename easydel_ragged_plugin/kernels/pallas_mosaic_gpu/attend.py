"""The attention kernel of long rows: three warpgroups of a program, of which two compute and one copies.

A program takes one tile of a row's tokens for one kv head. The memory warpgroup reads the ids of the row's pages and
has the tensor memory accelerator (TMA) copy their keys and values from the cache, as it lies, into a ring of blocks in
shared memory. The compute warpgroups have 64 queries each and walk over the same blocks with the online softmax of
FlashAttention (Dao et al., 2022, arXiv 2205.14135). They take turns, so that one multiplies while the other computes
weights (FlashAttention-3, Shah et al., 2024, arXiv 2407.08608).

**What a query must not see.** Logits are masked, so keys may hold anything. A weight of zero times a value that is not
finite is NaN, however. Values before the window and past the context belong to nobody, and are set to zero in shared
memory by the memory warpgroup. Values of the row itself that some queries of the tile see and others do not are left:
a query whose sums hold a NaN gives a logsumexp of NaN, and ``settle.py`` attends to it by itself.

**Interpreted.** JAX's interpreter for GPUs has neither ``run_state`` nor products with an operand in registers, so the
product of weights and values is a plain one there. All else is the same code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from easydel_ragged_plugin.rows import first_visible, visible_keys
from easydel_ragged_plugin.types import AttentionRequest

from .copies import copy_blocks, load_queries, stage, store_output
from .scratch import Scratch, Tile
from .sizes import COMPUTE_REGISTERS, COMPUTE_WARPGROUPS, MEMORY_REGISTERS, OUTPUT_LANES, QUERIES, Sizes
from .softmax import ROW, State, empty, finish, scores_of, spread, with_weights

__all__ = ["attend_long_rows"]


class Warpgroup(NamedTuple):
    """One of those that compute, and what it computes with.

    Attributes:
        number: which one.
        token: its first token in the tile.
        live: its tokens that there are.
    """

    request: AttentionRequest
    sizes: Sizes
    tile: Tile
    scratch: Scratch
    interpreted: bool
    number: jax.Array
    token: jax.Array
    live: jax.Array

    @classmethod
    def of(
        cls, request: AttentionRequest, sizes: Sizes, tile: Tile, scratch: Scratch, interpreted: bool, number: jax.Array
    ) -> Warpgroup:
        """The one of this number."""
        token = number * sizes.tokens
        live = jnp.clip(tile.tokens - token, 0, sizes.tokens)
        return cls(request, sizes, tile, scratch, interpreted, number, token, live)


class Positions(NamedTuple):
    """Of the queries of a warpgroup, and of the first key that each of them sees; None where that is the first one."""

    queries: jax.Array
    starts: jax.Array | None

    @classmethod
    def of(cls, group: Warpgroup) -> Positions:
        """Those of a warpgroup."""
        request, sizes, tile = group.request, group.sizes, group.tile
        query = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW)
        if sizes.heads_first:
            token = query & (sizes.tokens - 1)
        else:
            token = lax.div(query, plgpu.layout_cast(jnp.full((QUERIES,), request.group_size, jnp.int32), ROW))
        queries = jnp.minimum(token + (tile.first + group.token), tile.last)
        return cls(queries, first_visible(request, queries) if request.options.is_local else None)


class Block(NamedTuple):
    """A block of keys: its number in the row, how many of the tile come before it, and where in the rings it lies."""

    number: jax.Array
    before: jax.Array
    stage: jax.Array


def take_turn(scratch: Scratch) -> None:
    """Let the other warpgroup go on, and wait for it."""
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.turn)


def multiply_keys(group: Warpgroup, block: Block) -> jax.Array:
    """Products ``[64, keys]`` of the queries and the keys of a block, whose place is free then."""
    queries, keys = group.scratch.queries.at[group.number], group.scratch.keys

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, queries, keys.at[block.stage].transpose((1, 0)))
        take_turn(group.scratch)
        found: jax.Array = accumulator[...]
        return found

    products = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((QUERIES, group.sizes.keys), jnp.float32))
    plgpu.barrier_arrive(group.scratch.keys_free.at[block.stage])
    return products


def hide(group: Warpgroup, positions: Positions, block: Block, scores: jax.Array) -> jax.Array:
    """``scores`` with -inf for keys that a query does not see."""
    size, shape = group.sizes.keys, scores.shape
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen = key <= spread(positions.queries - block.number * size, shape)
    if positions.starts is not None:
        seen &= key >= spread(positions.starts - block.number * size, shape)
    return jnp.where(seen, scores, -jnp.inf)


def multiply_values(group: Warpgroup, block: Block, operand: jax.Array, weighted: jax.Array) -> jax.Array:
    """``weighted`` and the product of weights and the values of a block. Meanwhile the next keys come."""
    scratch = group.scratch

    def wait_for_next_keys() -> None:
        @pl.when(block.number + 1 < group.tile.end)
        def _() -> None:
            plgpu.barrier_wait(scratch.keys_there.at[lax.rem(block.before + 1, jnp.int32(group.sizes.stages))])

    if group.interpreted:
        values = scratch.values[block.stage]
        plgpu.commit_smem()  # orders this read, which wgmma does not do, before the copy that comes next
        weighted += lax.dot(operand, values, preferred_element_type=jnp.float32)
        wait_for_next_keys()
        return weighted

    def add(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, operand, scratch.values.at[block.stage])
        wait_for_next_keys()

    found: jax.Array = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(weighted))
    return found


def add_values(group: Warpgroup, block: Block, state: State, weights: jax.Array) -> State:
    """``state`` with the weights of a block and its values, after the other warpgroup has multiplied."""
    scratch = group.scratch
    operand = weights.astype(group.request.compute_dtype)
    weighted, maximum, total = state

    def wait_for_turn() -> None:
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.values_there.at[block.stage])
        plgpu.barrier_wait(scratch.turn)

    if group.request.head_dim <= 128:
        total += weights.sum(axis=1)
        weighted, total, maximum, operand = lax.optimization_barrier((weighted, total, maximum, operand))
        wait_for_turn()
    else:  # the sum fills the wait, where the accumulator leaves few registers
        wait_for_turn()
        total += weights.sum(axis=1)
    weighted = multiply_values(group, block, operand, weighted)
    plgpu.barrier_arrive(scratch.values_free.at[block.stage])
    return State(weighted, maximum, total)


def attend_block(group: Warpgroup, positions: Positions | None, number: jax.Array, state: State) -> State:
    """``state`` with a block of keys, which is there. ``positions``: None where all queries see all of its keys."""
    index = number - group.tile.begin
    block = Block(number, index, lax.rem(index, jnp.int32(group.sizes.stages)))
    array, factor = scores_of(group.request, multiply_keys(group, block))
    if positions is not None:
        array = hide(group, positions, block, array)
    state, weights = with_weights((array, factor), state)
    return add_values(group, block, state, weights)


def seen_whole(request: AttentionRequest, sizes: Sizes, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Every query of the tile sees all keys of the blocks from the first number on, up to the second one."""
    size = sizes.keys
    _, last_whole = visible_keys(request, tile.first, tile.first)
    whole, diagonal = tile.begin, jnp.clip(lax.div(last_whole, jnp.int32(size)), tile.begin, tile.end)
    if request.options.is_local:
        first_whole, _ = visible_keys(request, tile.last, tile.last)
        whole = jnp.clip(lax.div(first_whole + (size - 1), jnp.int32(size)), tile.begin, tile.end)
        diagonal = jnp.maximum(diagonal, whole)
    return whole, diagonal


def attend_blocks(group: Warpgroup) -> State:
    """The softmax of a warpgroup's queries over the blocks of the tile."""
    tile, scratch = group.tile, group.scratch
    positions = Positions.of(group)
    state = empty(group.request)
    plgpu.barrier_wait(scratch.keys_there.at[0])
    pl.when(group.number == 1)(functools.partial(take_turn, scratch))
    whole, diagonal = seen_whole(group.request, group.sizes, tile)
    if group.request.options.is_local:
        state = lax.fori_loop(tile.begin, whole, functools.partial(attend_block, group, positions), state)
    state = lax.fori_loop(whole, diagonal, functools.partial(attend_block, group, None), state)
    state = lax.fori_loop(diagonal, tile.end, functools.partial(attend_block, group, positions), state)
    pl.when(group.number == 0)(functools.partial(take_turn, scratch))
    return state


class Arrays(NamedTuple):
    """Arguments and results of the kernel, in the card's memory. ``sinks``: ``[kv_heads, 64]``, or None."""

    work: Any
    queries: Any
    pages: Any
    tables: Any
    sinks: Any
    output: Any
    lse: Any


def load(group: Warpgroup, arrays: Arrays, kv_head: jax.Array) -> None:
    """The queries of a warpgroup, and their sinks."""
    scratch, index = group.scratch, group.number
    there, queries = scratch.queries_there.at[index], scratch.queries.at[index]
    load_queries(group.request, group.sizes, arrays.queries, group.tile.token + group.token, kv_head, queries, there)
    if arrays.sinks is not None:
        plgpu.copy_gmem_to_smem(arrays.sinks.at[kv_head], scratch.rows.at[index], there)
    plgpu.barrier_wait(there)


def store(group: Warpgroup, arrays: Arrays, kv_head: jax.Array, part: jax.Array, state: State) -> None:
    """What a warpgroup has found: output a few lanes at a time, and logsumexps."""
    request, sizes, tile, scratch = group.request, group.sizes, group.tile, group.scratch
    rows, staged = scratch.rows.at[group.number], scratch.output.at[group.number]
    sink = None if arrays.sinks is None else plgpu.layout_cast(rows[...], ROW)
    found, logsumexp = finish(request, state, sink)
    rows[...] = logsumexp
    for lane in range(0, request.head_dim, OUTPUT_LANES):
        if lane:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage(found[:, lane : lane + OUTPUT_LANES].astype(request.query_dtype), staged)
        plgpu.commit_smem()
        store_output(request, sizes, staged, arrays.output, tile.token + group.token, group.live, kv_head, lane)
        if not lane:
            plgpu.copy_smem_to_gmem(rows, arrays.lse.at[kv_head, part, group.number])
    plgpu.wait_smem_to_gmem(0)


def ragged_long_rows(request: AttentionRequest, sizes: Sizes, interpreted: bool, *refs: Any) -> None:
    """Grid ``(kv heads, parts)``, from the end of the work list: the last tiles of a row see most keys. Neighboring
    programs have the same kv head, and share its keys in the cache of the card."""
    work, queries, pages, tables, *rest = refs
    sinks = rest.pop(0) if request.options.sinks else None
    output, lse, *allocated = rest
    arrays, scratch = Arrays(work, queries, pages, tables, sinks, output, lse), Scratch(*allocated)
    index, kv_head = lax.axis_index("warpgroup"), lax.axis_index("kv_head")
    part = work.shape[0] - 1 - lax.axis_index("part")
    tile = Tile.of(request, sizes, work, part)
    works = tile.tokens > 0

    @pl.when(works & (index == COMPUTE_WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy_blocks(request, sizes, tile, tables, pages, kv_head, scratch)

    @pl.when(works & (index < COMPUTE_WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        group = Warpgroup.of(request, sizes, tile, scratch, interpreted, index)
        load(group, arrays, kv_head)
        store(group, arrays, kv_head, part, attend_blocks(group))


def sinks_of_queries(request: AttentionRequest, sizes: Sizes, sinks: jax.Array) -> jax.Array:
    """``[kv_heads, 64]`` float32: the sink of each query of a warpgroup."""
    group, query = request.group_size, np.arange(QUERIES)
    head = query // sizes.tokens if sizes.heads_first else query % group
    by_head = sinks.astype(jnp.float32).reshape(request.num_kv_heads, group)
    return by_head[:, np.minimum(head, group - 1)]


def attend_long_rows(
    request: AttentionRequest,
    sizes: Sizes,
    work: jax.Array,
    queries: jax.Array,
    pages: jax.Array,
    tables: jax.Array,
    sinks: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows in ``work``, a list of tiles of ``sizes.tile_tokens``.

    Returns:
        Output ``[tokens, q_heads, head_dim]``, where no row in ``work`` has a token: anything. And the logsumexp
        ``[kv_heads, parts, 2, 64]`` of the queries of each part, in the order of ``sizes``; NaN for those that are
        to be attended to again, and anything where there is no query.
    """
    shapes = (
        jax.ShapeDtypeStruct(queries.shape, request.query_dtype),
        jax.ShapeDtypeStruct((request.num_kv_heads, work.shape[0], COMPUTE_WARPGROUPS, QUERIES), jnp.float32),
    )
    arrays = [work, queries, pages, tables]
    if sinks is not None:
        arrays.append(sinks_of_queries(request, sizes, sinks))
    body = functools.partial(ragged_long_rows, request, sizes, interpret)
    scratch = tuple(Scratch.types(request, sizes))
    named: dict[str, Any] = {"out_type": shapes, "scratch_types": scratch}
    if "out_type" not in inspect.signature(plgpu.kernel).parameters:  # names of JAX 0.9
        named = {"out_shape": shapes, "scratch_shapes": scratch}
    call: Callable[..., Any] = plgpu.kernel(
        body,
        **named,
        grid=(request.num_kv_heads, work.shape[0]),
        grid_names=("kv_head", "part"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="ragged_long_rows",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpreter() if interpret else None,
    )
    output, lse = call(*arrays)
    return output, lse


def interpreter() -> Any:
    """JAX's interpreter for GPUs. Queries past the last token read nothing, as with TMA; a race is an error."""
    interpreters: Any = plgpu  # JAX 0.9 has none
    return interpreters.InterpretGPUParams(out_of_bounds_reads="uninitialized", detect_races=True)
