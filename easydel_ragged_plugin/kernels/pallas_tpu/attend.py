"""The kernel: new tokens into the pages, then attention, in one Pallas call for each kind of row.

A call has no grid. It walks over steps, a step being one block of keys of one tile of queries, in the order of its
list of work. Three cursors run along the steps:

========= ===================================================================================================
tables    copies the part of the block table that a step needs to scalar memory
fetch     waits for that part, and starts the copies of the step's pages, and of the tile's queries
attend    waits for pages and queries, and goes through the online softmax (Dao et al., 2022, arXiv 2205.14135)
========= ===================================================================================================

The second runs ``buffers - 1`` steps ahead of the third, across tiles and rows, and the first one step ahead of the
second. What they fill is used in turn: buffer ``step % buffers``, tile ``item % buffers``.

Pages are copied whole, and only those that a query of the tile sees. What a buffer holds beside them is old, and never
reaches a result: logits of keys that are not seen are replaced, and values of keys that no query sees become zero.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.rows import first_visible
from easydel_ragged_plugin.types import AttentionRequest
from easydel_ragged_plugin.varying import result_type

from .blocks import TABLE_CHUNK, Block, Shapes, vmem_limit
from .tiles import (
    HIDDEN,
    LOG2_E,
    base2_logits,
    load_head,
    load_rows,
    product,
    store_rows,
    visible_mask,
    widen,
)
from .update import write_segments
from .work import Item, WorkList

__all__ = ["Call", "Results", "attend"]


class Results(NamedTuple):
    """What calls fill in, one after the other.

    Attributes:
        output: ``[kv_heads, tokens, group / pack, pack, lanes]``.
        lse: ``[tokens, group, 128]`` float32, a lane for each kv head; None where it is not requested.
    """

    output: jax.Array
    lse: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernel.

    Attributes:
        request: what is computed.
        block: its sizes.
        shapes: how arrays are held.
        writes: whether it writes the new tokens.
        decode: whether each tile is of one token.
    """

    request: AttentionRequest
    block: Block
    shapes: Shapes
    writes: bool
    decode: bool

    @property
    def pages(self) -> int:
        """Pages in a block."""
        return self.block.pages(self.request.page_size)

    @property
    def keys(self) -> int:
        """Slots in a block."""
        return self.pages * self.request.page_size

    @property
    def rows(self) -> int:
        """Rows of a tile for one kv head: the query heads of its tokens."""
        return self.block.tokens * self.shapes.group


class Cursor(NamedTuple):
    """A step: the tile of queries and the block of keys."""

    item: jax.Array
    block: jax.Array


def column(refs: Any, which: Item, item: jax.Array) -> jax.Array:
    """A number of a tile, from the list of work."""
    capacity = refs.work.shape[0] // len(Item)
    number: jax.Array = refs.work[int(which) * capacity + item]
    return number


def advance(refs: Any, at: Cursor, moves: jax.Array) -> Cursor:
    """The next step, where ``moves``."""
    last = at.block + 1 == column(refs, Item.END, at.item)
    item = jnp.where(moves & last, at.item + 1, at.item)
    block = jnp.where(last, column(refs, Item.BEGIN, item), at.block + 1)
    return Cursor(item, jnp.where(moves, block, at.block))


def copy_table(call: Call, refs: Any, at: Cursor, slot: jax.Array) -> Any:
    """The copy of the chunk of the block table that a step needs."""
    chunk = lax.div(at.block * call.pages, jnp.int32(TABLE_CHUNK))
    source = refs.tables.at[column(refs, Item.ROW, at.item), chunk]
    return pltpu.make_async_copy(source, refs.entries.at[slot], refs.table_sems.at[slot])


def pages_of(call: Call, refs: Any, at: Cursor) -> tuple[jax.Array, jax.Array]:
    """First and last-but-one entry of the block table that a step needs."""
    first = at.block * call.pages
    begin = jnp.maximum(column(refs, Item.PAGE, at.item), first)
    return begin, jnp.minimum(column(refs, Item.PAGE_END, at.item), first + call.pages)


def buffer_at(call: Call, refs: Any, buffer: jax.Array, slot: jax.Array, count: Any) -> Any:
    """Slots of a buffer, in the shape of the cache."""
    return refs.cache.at[buffer, pl.ds(slot, count), pl.ds(0, call.shapes.slot[0])]


def start_pages(call: Call, refs: Any, at: Cursor, buffer: jax.Array, table_slot: jax.Array) -> None:
    """Start the copies of a step's pages."""
    size = call.request.page_size
    begin, end = pages_of(call, refs, at)

    @pl.loop(begin, end)
    def _(entry: jax.Array) -> None:
        page = refs.entries[table_slot, 0, lax.rem(entry, jnp.int32(TABLE_CHUNK))]
        to = buffer_at(call, refs, buffer, (entry - at.block * call.pages) * size, size)
        pltpu.make_async_copy(refs.pages.at[page], to, refs.page_sems.at[buffer]).start()


def wait_pages(call: Call, refs: Any, at: Cursor, buffer: jax.Array) -> None:
    """Wait until a step's pages are there: a semaphore counts bytes, so one wait is for all of them."""
    begin, end = pages_of(call, refs, at)
    copied = buffer_at(call, refs, buffer, 0, (end - begin) * call.request.page_size)
    pltpu.make_async_copy(copied, copied, refs.page_sems.at[buffer]).wait()


def copy_queries(call: Call, refs: Any, item: jax.Array) -> Any:
    """The copy of a tile's queries."""
    slot = lax.rem(item, jnp.int32(call.block.buffers))
    token, count = column(refs, Item.TOKEN, item), tokens_of(call, refs, item)
    return pltpu.make_async_copy(
        refs.queries.at[:, pl.ds(token, count)], refs.tile.at[slot, :, pl.ds(0, count)], refs.tile_sems.at[slot]
    )


def tokens_of(call: Call, refs: Any, item: jax.Array) -> Any:
    """Tokens of a tile."""
    return 1 if call.decode else column(refs, Item.COUNT, item)


def copies_out(call: Call, refs: Any, item: jax.Array) -> list[Any]:
    """The copies of a tile's results."""
    slot = lax.rem(item, jnp.int32(2))
    token, count = column(refs, Item.TOKEN, item), tokens_of(call, refs, item)
    copies = [
        pltpu.make_async_copy(
            refs.out.at[slot, :, pl.ds(0, count)], refs.output.at[:, pl.ds(token, count)], refs.out_sems.at[slot, 0]
        )
    ]
    if call.request.return_lse:
        copies.append(
            pltpu.make_async_copy(
                refs.lse_out.at[slot, pl.ds(0, count)], refs.lse.at[pl.ds(token, count)], refs.out_sems.at[slot, 1]
            )
        )
    return copies


def begin_tile(call: Call, refs: Any, item: jax.Array) -> None:
    """Wait for a tile's queries, and empty its softmax: a sink is a key without a value."""
    copy_queries(call, refs, item).wait()
    refs.weighted[...] = jnp.zeros(refs.weighted.shape, jnp.float32)
    if call.request.options.sinks:
        highest = jnp.maximum(refs.sinks[...], HIDDEN)
        refs.maximum[...] = highest
        refs.total[...] = jnp.exp2(refs.sinks[...] - highest)
    else:
        refs.maximum[...] = jnp.full(refs.maximum.shape, HIDDEN, jnp.float32)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)


def load_tile(call: Call, refs: Any, item: jax.Array, head: int) -> jax.Array:
    """A tile's queries ``[rows, lanes]`` for one kv head."""
    slot, shapes = lax.rem(item, jnp.int32(call.block.buffers)), call.shapes
    words = call.rows // packing(shapes.operand)
    ref = refs.tile.bitcast(jnp.uint32).at[slot, head].reshape(words, shapes.lanes)
    return pltpu.bitcast(load_rows(ref, 0, words), shapes.operand)


def attend_block(call: Call, refs: Any, at: Cursor, buffer: jax.Array, *, masked: bool) -> None:
    """A block of keys, of which every query of the tile sees all, unless ``masked``."""
    shapes, keys = call.shapes, call.keys
    words = refs.cache.bitcast(jnp.uint32).at[buffer].reshape(keys * shapes.stride, shapes.lanes)
    base, first = at.block * keys, column(refs, Item.POSITION, at.item)
    end = first + tokens_of(call, refs, at.item)
    mask = visible_mask(call.request, shapes, base, first, (call.rows, keys)) if masked else None
    behind: Any = None
    for head in range(call.request.num_kv_heads):
        key, value = load_head(shapes, words, head, keys, call.request.cache_dtype)
        queries = load_tile(call, refs, at.item, head)
        logits = base2_logits(
            call.request, product(queries, key.astype(shapes.operand), 1), scale_of(refs, "k_scale", head)
        )
        if mask is not None:
            logits = jnp.where(mask, logits, HIDDEN)
        weights, kept = softmax_step(refs, head, logits)
        if behind is not None:  # the product of one head overlaps with the softmax of the next one
            add_values(call, refs, *behind)
        behind = (head, weights, value, kept, mask, base, first, end)
    add_values(call, refs, *behind)


def softmax_step(refs: Any, head: int, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights ``[rows, keys]``, and the factor ``[rows, 128]`` of what has been summed before."""
    before = refs.maximum[head]
    maximum = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - widen(maximum, logits.shape[1]))
    kept = jnp.exp2(before - maximum)
    refs.maximum[head] = maximum
    refs.total[head] = refs.total[head] * kept + jnp.sum(weights, axis=1, keepdims=True)
    return weights, kept


def add_values(
    call: Call,
    refs: Any,
    head: int,
    weights: jax.Array,
    value: jax.Array,
    kept: jax.Array,
    mask: jax.Array | None,
    base: jax.Array,
    first: jax.Array,
    end: jax.Array,
) -> None:
    """Add a block's weighted values.

    In a masked block, values of keys that no query of the tile sees become zero. Those that some see and that are not
    finite are left out of the product, because 0 times infinity is NaN: the queries that see them become NaN.
    """
    operand, lanes = call.shapes.operand, call.shapes.lanes
    value = value.astype(operand)
    if mask is not None:
        key = base + lax.broadcasted_iota(jnp.int32, value.shape, 0)
        value = jnp.where((key >= first_visible(call.request, first)) & (key < end), value, jnp.zeros_like(value))
    if mask is None or call.decode:
        added = product(weights.astype(operand), value, 0)
        refs.weighted[head] = refs.weighted[head] * widen(kept, lanes) + added
        return
    wide = value.astype(jnp.float32)
    strange = jnp.where(wide - wide == 0, 0.0, 1.0)
    added = product(weights.astype(operand), jnp.where(strange == 0, wide, 0.0).astype(operand), 0)
    refs.weighted[head] = refs.weighted[head] * widen(kept, lanes) + added

    @pl.when(jnp.max(strange) > 0)
    def _() -> None:
        seen = product(jnp.where(mask, 1.0, 0.0).astype(operand), strange.astype(operand), 0)
        refs.weighted[head] = jnp.where(seen > 0, jnp.nan, refs.weighted[head])


def scale_of(refs: Any, name: str, head: int) -> jax.Array | None:
    """The factor of a kv head, where the option is an array."""
    ref = getattr(refs, name, None)
    return None if ref is None else ref[head]


def finish_tile(call: Call, refs: Any, item: jax.Array) -> None:
    """Store a tile's results, and start their copies."""
    request, shapes = call.request, call.shapes
    slot = lax.rem(item, jnp.int32(2))

    @pl.when(item >= 2)
    def _() -> None:
        for copy in copies_out(call, refs, item - 2):
            copy.wait()

    words = call.rows // packing(shapes.result)
    lse = jnp.zeros((call.rows, LANES), jnp.float32)
    for head in range(request.num_kv_heads):
        total = refs.total[head]
        factor = request.v_scale / jnp.where(total == 0, 1.0, total)
        v_scale = scale_of(refs, "v_scale", head)
        factor = factor if v_scale is None else factor * v_scale
        result = (refs.weighted[head] * widen(factor, shapes.lanes)).astype(shapes.result)
        target = refs.out.bitcast(jnp.uint32).at[slot, head].reshape(words, shapes.lanes)
        store_rows(target, pltpu.bitcast(result, jnp.uint32))
        if request.return_lse:
            lane = lax.broadcasted_iota(jnp.int32, lse.shape, 1)
            lse = jnp.where(lane == head, (refs.maximum[head] + jnp.log2(total)) * (1 / LOG2_E), lse)
    if request.return_lse:
        refs.lse_out.at[slot].reshape(call.rows, LANES)[...] = lse
    for copy in copies_out(call, refs, item):
        copy.start()


def attend_step(call: Call, refs: Any, step: jax.Array, at: Cursor) -> None:
    """The step of the third cursor."""
    request, buffer = call.request, lax.rem(step, jnp.int32(call.block.buffers))

    @pl.when(at.block == column(refs, Item.BEGIN, at.item))
    def _() -> None:
        begin_tile(call, refs, at.item)

    wait_pages(call, refs, at, buffer)
    base, first = at.block * call.keys, column(refs, Item.POSITION, at.item)
    last = first + tokens_of(call, refs, at.item) - 1
    # Every query sees the keys that both the first and the last one see.
    whole = (base + call.keys <= first + 1) & (base >= first_visible(request, last))

    @pl.when(whole)
    def _() -> None:
        attend_block(call, refs, at, buffer, masked=False)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        attend_block(call, refs, at, buffer, masked=True)

    @pl.when(at.block + 1 == column(refs, Item.END, at.item))
    def _() -> None:
        finish_tile(call, refs, at.item)


def ragged_attention(call: Call, names: tuple[str, ...], *arrays: Any) -> None:
    """The kernel; ``names`` are those of its refs."""
    refs: Any = SimpleNamespace(**dict(zip(names, arrays, strict=True)))
    if call.writes:
        write_segments(refs.segments, refs.num_segments, refs.new, refs.pages, refs.write_sems)
    steps, ahead = refs.steps[0], call.block.buffers - 1

    def walk(step: jax.Array, cursors: tuple[Cursor, Cursor, Cursor]) -> tuple[Cursor, Cursor, Cursor]:
        tables, fetch, current = cursors
        next_table, next_fetch = step + ahead + 1, step + ahead

        @pl.when(next_table < steps)
        def _() -> None:
            copy_table(call, refs, tables, lax.rem(next_table, jnp.int32(2))).start()

        @pl.when((next_fetch >= 0) & (next_fetch < steps))
        def _() -> None:
            slot = lax.rem(next_fetch, jnp.int32(2))
            copy_table(call, refs, fetch, slot).wait()
            start_pages(call, refs, fetch, lax.rem(next_fetch, jnp.int32(call.block.buffers)), slot)

            @pl.when(fetch.block == column(refs, Item.BEGIN, fetch.item))
            def _() -> None:
                copy_queries(call, refs, fetch.item).start()

        @pl.when(step >= 0)
        def _() -> None:
            attend_step(call, refs, step, current)

        return (
            advance(refs, tables, next_table >= 0),
            advance(refs, fetch, next_fetch >= 0),
            advance(refs, current, step >= 0),
        )

    start = Cursor(jnp.int32(0), column(refs, Item.BEGIN, jnp.int32(0)))
    done = lax.fori_loop(-(ahead + 1), steps, walk, (start, start, start))[2].item
    for back in (2, 1):

        @pl.when(done >= back)
        def _(back: int = back) -> None:
            for copy in copies_out(call, refs, done - back):
                copy.wait()


def scratch(call: Call) -> dict[str, Any]:
    """The memory of a call."""
    request, shapes, block = call.request, call.shapes, call.block
    heads, rows = request.num_kv_heads, call.rows

    def tile(copies: int, dtype: np.dtype) -> Any:
        pack = packing(dtype)
        return pltpu.VMEM((copies, heads, block.tokens, shapes.group // pack, pack, shapes.lanes), dtype)

    found = {
        "cache": pltpu.VMEM((block.buffers, call.keys, *shapes.buffered_slot), request.cache_dtype),
        "tile": tile(block.buffers, shapes.operand),
        "out": tile(2, shapes.result),
        "maximum": pltpu.VMEM((heads, rows, LANES), jnp.float32),
        "total": pltpu.VMEM((heads, rows, LANES), jnp.float32),
        "weighted": pltpu.VMEM((heads, rows, shapes.lanes), jnp.float32),
        "entries": pltpu.SMEM((2, 1, TABLE_CHUNK), jnp.int32),
        "table_sems": pltpu.SemaphoreType.DMA((2,)),
        "page_sems": pltpu.SemaphoreType.DMA((block.buffers,)),
        "tile_sems": pltpu.SemaphoreType.DMA((block.buffers,)),
        "out_sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if request.return_lse:
        found["lse_out"] = pltpu.VMEM((2, block.tokens, shapes.group, LANES), jnp.float32)
    if call.writes:
        found["write_sems"] = pltpu.SemaphoreType.DMA((1,))
    return found


def attend(
    call: Call,
    work: WorkList,
    segments: WorkList | None,
    arrays: dict[str, jax.Array],
    results: Results | None,
    interpret: Any,
) -> tuple[Results, jax.Array]:
    """The results of the rows in ``work``, in those of an earlier call where there was one; and the pages.

    ``arrays`` are ``queries [kv_heads, tokens, group / pack, pack, lanes]``, ``tables`` of
    :func:`~.work.chunked_tables`, ``pages``, ``new [tokens, ...]`` as a slot of the cache, ``k_scale`` and ``v_scale``
    where they are arrays, and ``sinks [kv_heads, rows, 128]`` in base 2.
    """
    request, shapes = call.request, call.shapes
    scalars: dict[str, jax.Array] = {"work": work.entries, "steps": work.total}
    if segments is not None and call.writes:
        scalars |= {"segments": segments.entries, "num_segments": segments.total}
    scalars |= {name: arrays[name] for name in ("k_scale", "v_scale") if name in arrays}
    inputs = {name: arrays[name] for name in ("queries", "tables", "pages", "new", "sinks") if name in arrays}
    if not call.writes:
        inputs.pop("new", None)
    pack = packing(shapes.result)
    of_output = (request.num_kv_heads, request.num_tokens, shapes.group // pack, pack, shapes.lanes)
    outputs = {"output": (of_output, shapes.result)}
    if request.return_lse:
        outputs["lse"] = ((request.num_tokens, shapes.group, LANES), np.dtype(np.float32))
    if call.writes:
        outputs["written"] = (arrays["pages"].shape, request.cache_dtype)
    aliases = {}
    if call.writes:
        aliases[len(scalars) + list(inputs).index("pages")] = list(outputs).index("written")
    if results is not None:
        for name, earlier in results._asdict().items():
            if earlier is not None:
                aliases[len(scalars) + len(inputs)] = list(outputs).index(name)
                inputs["earlier_" + name] = earlier
    memory = scratch(call)
    names = (*scalars, *inputs, *outputs, *memory)
    if call.writes:  # the pages that are written are those that are read: one ref
        names = tuple({"pages": "pages_in", "written": "pages"}.get(name, name) for name in names)
    in_vmem = {"sinks"}
    operands = (*scalars.values(), *inputs.values())
    found = pl.pallas_call(
        functools.partial(ragged_attention, call, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM if name in in_vmem else pl.ANY) for name in inputs],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in outputs],
            scratch_shapes=list(memory.values()),
            grid=(1,),
        ),
        out_shape=[result_type(shape, dtype, operands) for shape, dtype in outputs.values()],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_limit(request), disable_bounds_checks=True, dimension_semantics=("arbitrary",)
        ),
        name=f"ragged_attention_{'decode' if call.decode else 'prefill'}",
        interpret=interpret,
    )(*operands)
    filled = dict(zip(outputs, found, strict=True))
    return Results(filled["output"], filled.get("lse")), filled.get("written", arrays["pages"])
