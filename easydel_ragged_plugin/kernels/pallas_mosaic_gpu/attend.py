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

from easydel_ragged_plugin.base2 import LOG2_E
from easydel_ragged_plugin.kernels.pallas_gpu.work import Column
from easydel_ragged_plugin.rows import first_visible, needed_entries, visible_keys
from easydel_ragged_plugin.types import SATURATED, AttentionRequest

from .sizes import COMPUTE_WARPGROUPS, OUTPUT_LANES, QUERIES, Sizes

__all__ = ["attend_long_rows"]

LARGEST = float(np.finfo(np.float32).max)
LOWEST = float(np.finfo(np.float32).min)
"""The maximum of no logits: finite, so that nothing is infinity minus itself."""
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)

COMPUTE_REGISTERS = 224
MEMORY_REGISTERS = 56

ROW = plgpu.Layout.WGMMA.reduce(1)
"""How the registers of a warpgroup hold one number for each query."""


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


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for each query, all over its row."""
    return lax.broadcast_in_dim(rows, shape, (0,))


class Logits(NamedTuple):
    """Logits of a block in base 2 without a factor, so that the factor costs nothing where it can be multiplied in the
    same instruction as the maximum is subtracted."""

    values: jax.Array
    factor: float


def base2(request: AttentionRequest, products: jax.Array) -> Logits:
    """Logits of products of queries and keys."""
    scale, cap = request.logits_scale, request.options.soft_cap
    if cap is None:
        factor = scale * LOG2_E
        # The maximum of logits is the factor times that of products where it is positive.
        return Logits(products, factor) if factor >= SMALLEST_SCALE else Logits(products * factor, 1.0)
    if request.scale_over_cap is None:
        scaled = jnp.clip(products * scale, -SATURATED * cap, SATURATED * cap) * (1 / cap)
    else:
        scaled = products * request.scale_over_cap
    # tanh(x) is 1 - 2 / (exp(2x) + 1). The hardware's own one errs by 2**-11 of a cap.
    reciprocal_root = lax.rsqrt(jnp.exp2(scaled * (2 * LOG2_E)) + 1.0)
    return Logits(1.0 - 2.0 * reciprocal_root * reciprocal_root, cap * LOG2_E)


class State(NamedTuple):
    """Running state of the online softmax, float32: ``[64, head_dim]``, ``[64]`` and ``[64]``."""

    weighted: jax.Array
    maximum: jax.Array
    total: jax.Array


def take_turn(scratch: Scratch) -> None:
    """Let the other warpgroup go on, and wait for it."""
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.turn)


def compute(
    request: AttentionRequest,
    sizes: Sizes,
    tile: Tile,
    warpgroup: jax.Array,
    scratch: Scratch,
    positions: jax.Array,
    interpreted: bool,
) -> State:
    """The softmax of a warpgroup's queries over the blocks of the tile. ``positions``: those of its queries."""
    size, shape = sizes.keys, (QUERIES, sizes.keys)
    dtype = request.compute_dtype
    begin, end = tile.begin, tile.end
    queries = scratch.queries.at[warpgroup]
    starts = first_visible(request, positions) if request.options.is_local else None

    def step(masked: bool, block: jax.Array, state: State) -> State:
        index = block - begin
        stage = lax.rem(index, jnp.int32(sizes.stages))

        def multiply(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, queries, scratch.keys.at[stage].transpose((1, 0)))
            take_turn(scratch)
            found: jax.Array = accumulator[...]
            return found

        products = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        plgpu.barrier_arrive(scratch.keys_free.at[stage])

        logits, factor = base2(request, products)
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            seen = key <= spread(positions - block * size, shape)
            if starts is not None:
                seen &= key >= spread(starts - block * size, shape)
            logits = jnp.where(seen, logits, -jnp.inf)
        maximum = jnp.maximum(state.maximum, logits.max(axis=1) * factor)
        kept = jnp.exp2(state.maximum - maximum)
        weights = jnp.exp2(logits * factor - spread(maximum, shape))
        weighted = state.weighted * spread(kept, state.weighted.shape)
        total = state.total * kept
        operand = weights.astype(dtype)

        def wait_for_turn() -> None:
            plgpu.barrier_arrive(scratch.turn)
            plgpu.barrier_wait(scratch.values_there.at[stage])
            plgpu.barrier_wait(scratch.turn)

        def wait_for_next_keys() -> None:
            @pl.when(block + 1 < end)
            def _() -> None:
                plgpu.barrier_wait(scratch.keys_there.at[lax.rem(index + 1, jnp.int32(sizes.stages))])

        if request.head_dim <= 128:
            total += weights.sum(axis=1)
            weighted, total, maximum, operand = lax.optimization_barrier((weighted, total, maximum, operand))
            wait_for_turn()
        else:  # the sum fills the wait, where the accumulator leaves few registers
            wait_for_turn()
            total += weights.sum(axis=1)

        if interpreted:
            values = scratch.values[stage]
            plgpu.commit_smem()  # orders this read, which wgmma does not do, before the copy that comes next
            weighted += lax.dot(operand, values, preferred_element_type=jnp.float32)
            wait_for_next_keys()
        else:

            def add(accumulator: Any) -> None:
                plgpu.wgmma(accumulator, operand, scratch.values.at[stage])
                wait_for_next_keys()

            weighted = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(weighted))
        plgpu.barrier_arrive(scratch.values_free.at[stage])
        return State(weighted, maximum, total)

    state = State(
        plgpu.layout_cast(jnp.zeros((QUERIES, request.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((QUERIES,), LOWEST, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), ROW),
    )
    plgpu.barrier_wait(scratch.keys_there.at[0])
    pl.when(warpgroup == 1)(functools.partial(take_turn, scratch))
    # Every query of the tile sees all keys of the blocks [whole, diagonal): these are not masked.
    _, last_whole = visible_keys(request, tile.first, tile.first)
    whole, diagonal = begin, jnp.clip(lax.div(last_whole, jnp.int32(size)), begin, end)
    if request.options.is_local:
        first_whole, _ = visible_keys(request, tile.last, tile.last)
        whole = jnp.clip(lax.div(first_whole + (size - 1), jnp.int32(size)), begin, end)
        diagonal = jnp.maximum(diagonal, whole)
        state = lax.fori_loop(begin, whole, functools.partial(step, True), state)
    state = lax.fori_loop(whole, diagonal, functools.partial(step, False), state)
    state = lax.fori_loop(diagonal, end, functools.partial(step, True), state)
    pl.when(warpgroup == 0)(functools.partial(take_turn, scratch))
    return state


def finish(request: AttentionRequest, state: State, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output ``[64, head_dim]``, float32, and logsumexp of a finished softmax; the latter is NaN for a query whose sums
    hold one. A sink is one more key, without a value. Where nothing was seen: zeros, and -inf."""
    maximum, total, kept = state.maximum, state.total, jnp.ones_like(state.total)
    highest = maximum * (1 / LOG2_E)
    if sink is not None:
        logit = jnp.minimum(sink * LOG2_E, LARGEST)
        maximum = jnp.maximum(state.maximum, logit)
        highest = jnp.where(maximum == logit, sink, highest)
        kept = jnp.exp2(state.maximum - maximum)
        total = total * kept + jnp.exp2(logit - maximum)
    factor = kept * request.v_scale / jnp.where(total == 0, 1.0, total)
    summed = state.weighted.sum(axis=1)
    lse = jnp.where(state.total == 0, -jnp.inf, highest + jnp.log(total))
    lse = jnp.where(summed == summed, lse, jnp.nan)
    return state.weighted * spread(factor, state.weighted.shape), lse


def ragged_long_rows(request: AttentionRequest, sizes: Sizes, interpreted: bool, *refs: Any) -> None:
    """Grid ``(kv heads, parts)``, from the end of the work list: the last tiles of a row see most keys. Neighboring
    programs have the same kv head, and share its keys in the cache of the card."""
    work, queries, pages, tables, *rest = refs
    sinks = rest.pop(0) if request.options.sinks else None
    output, lse, *allocated = rest
    scratch = Scratch(*allocated)
    warpgroup, kv_head = lax.axis_index("warpgroup"), lax.axis_index("kv_head")
    part = work.shape[0] - 1 - lax.axis_index("part")
    tile = Tile.of(request, sizes, work, part)
    works = tile.tokens > 0

    @pl.when(works & (warpgroup == COMPUTE_WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy_blocks(request, sizes, tile, tables, pages, kv_head, scratch)

    @pl.when(works & (warpgroup < COMPUTE_WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        offset = warpgroup * sizes.tokens
        live = jnp.clip(tile.tokens - offset, 0, sizes.tokens)
        there, rows = scratch.queries_there.at[warpgroup], scratch.rows.at[warpgroup]
        load_queries(request, sizes, queries, tile.token + offset, kv_head, scratch.queries.at[warpgroup], there)
        if sinks is not None:
            plgpu.copy_gmem_to_smem(sinks.at[kv_head], rows, there)
        plgpu.barrier_wait(there)

        query = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW)
        if sizes.heads_first:
            token = query & (sizes.tokens - 1)
        else:
            token = lax.div(query, plgpu.layout_cast(jnp.full((QUERIES,), request.group_size, jnp.int32), ROW))
        positions = jnp.minimum(token + (tile.first + offset), tile.last)
        state = compute(request, sizes, tile, warpgroup, scratch, positions, interpreted)

        sink = None if sinks is None else plgpu.layout_cast(rows[...], ROW)
        found, logsumexp = finish(request, state, sink)
        rows[...] = logsumexp
        staged = scratch.output.at[warpgroup]
        for lane in range(0, request.head_dim, OUTPUT_LANES):
            if lane:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage(found[:, lane : lane + OUTPUT_LANES].astype(request.query_dtype), staged)
            plgpu.commit_smem()
            store_output(request, sizes, staged, output, tile.token + offset, live, kv_head, lane)
            if not lane:
                plgpu.copy_smem_to_gmem(rows, lse.at[kv_head, part, warpgroup])
        plgpu.wait_smem_to_gmem(0)


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
