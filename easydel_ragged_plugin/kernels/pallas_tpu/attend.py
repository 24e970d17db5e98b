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

from .blocks import LEAST_KEYS, TABLE_CHUNK, Block, Shapes, vmem_limit
from .tiles import HIDDEN, LOG2_E, base2_logits, load_head, load_rows, product, store_rows, visible_mask, widen
from .update import write_segments
from .work import Item, WorkList

__all__ = ["Call", "Results", "attend"]


PART_KEYS = 256
"""See :attr:`Call.part`."""


def _part(keys: int, wanted: int) -> int:
    return wanted if keys % wanted == 0 else keys


class Results(NamedTuple):
    """What a call gives. Tokens that are in no tile of it are undefined.

    Attributes:
        output: ``[joints, tokens, rows of a token / pack, pack, lanes]``, see :class:`Call`.
        lse: ``[tokens, rows of a token, 128]`` float32, a lane for each joint; None where it is not requested.
    """

    output: jax.Array
    lse: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernel.

    In decode the kv heads are joined in twos: rows of 256 lanes fill the matrix unit of a v6e and later, and the
    queries of two heads fill more of a register. A joint has the keys of both heads side by side, and queries with
    zeros beside those of the other head. Of its output, the part of the other head's values is dropped.

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
    def part(self) -> int:
        """Keys that are attended over at once in a block that needs a mask."""
        return _part(self.keys, PART_KEYS)

    @property
    def careful_part(self) -> int:
        """The same for a tile that is done again: it is seldom, and its program should be short."""
        return _part(self.keys, LEAST_KEYS)

    @property
    def joined(self) -> int:
        """Heads of a joint."""
        return 2 if self.decode and self.request.num_kv_heads > 1 and self.shapes.lanes == LANES else 1

    @property
    def joints(self) -> int:
        """Joints of all kv heads. The last one has one head twice where their number is odd."""
        return -(-self.request.num_kv_heads // self.joined)

    @property
    def token_rows(self) -> int:
        """Rows of queries of a token for one joint."""
        return self.joined * self.shapes.group

    @property
    def rows(self) -> int:
        """Rows of queries of a tile for one joint."""
        return self.block.tokens * self.token_rows

    @property
    def lanes(self) -> int:
        """Lanes of a row of a joint."""
        return self.joined * self.shapes.lanes

    def heads_of(self, joint: int) -> tuple[int, ...]:
        """The kv heads of a joint."""
        last = self.request.num_kv_heads - 1
        return tuple(min(joint * self.joined + each, last) for each in range(self.joined))


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


def span_of(call: Call, refs: Any, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of a tile's first and last query."""
    first = column(refs, Item.POSITION, item)
    return first, first + (tokens_of(call, refs, item) - 1)


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
    """Wait for a tile's queries, and empty its softmax."""
    copy_queries(call, refs, item).wait()
    empty_softmax(call, refs)


def empty_softmax(call: Call, refs: Any) -> None:
    """The softmax of no keys. A sink is a key without a value."""
    refs.weighted[...] = jnp.zeros(refs.weighted.shape, jnp.float32)
    if call.request.options.sinks:
        highest = jnp.maximum(refs.sinks[...], HIDDEN)
        refs.maximum[...] = highest
        refs.total[...] = jnp.exp2(refs.sinks[...] - highest)
    else:
        refs.maximum[...] = jnp.full(refs.maximum.shape, HIDDEN, jnp.float32)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)


def load_tile(call: Call, refs: Any, item: jax.Array, joint: int) -> jax.Array:
    """A tile's queries ``[rows, lanes]`` for one joint."""
    slot, operand = lax.rem(item, jnp.int32(call.block.buffers)), call.shapes.operand
    words = call.rows // packing(operand)
    ref = refs.tile.bitcast(jnp.uint32).at[slot, joint].reshape(words, call.lanes)
    return pltpu.bitcast(load_rows(ref, 0, words), operand)


class Part(NamedTuple):
    """Slots of a block that are attended over at once.

    Attributes:
        buffer: the block's buffer.
        offset: first slot.
        keys: how many.
        base: position of the first one.
        first, last: positions of the tile's first and last query.
        masked: whether some query may not see all of them.
        careful: whether numbers that are not finite must reach only the queries that see them.
    """

    buffer: jax.Array
    offset: Any
    keys: int
    base: jax.Array
    first: jax.Array
    last: jax.Array
    masked: bool
    careful: bool


def attend_parts(call: Call, refs: Any, at: Cursor, buffer: jax.Array, *, careful: bool) -> None:
    """A block of keys, a few at a time, from the first one that a query of the tile sees to the last one."""
    base, (first, last) = at.block * call.keys, span_of(call, refs, at.item)
    begin = jnp.maximum(first_visible(call.request, first) - base, 0)
    end = jnp.minimum(last + 1 - base, call.keys)
    keys = call.careful_part if careful else call.part
    size = jnp.int32(keys)

    @pl.loop(lax.div(begin, size), lax.div(end + (size - 1), size))
    def _(index: jax.Array) -> None:
        offset = index * size
        attend_part(call, refs, at.item, Part(buffer, offset, keys, base + offset, first, last, True, careful))


def attend_part(call: Call, refs: Any, item: jax.Array, part: Part) -> None:
    """Some keys of a block: logits, softmax, and sums of values, of all heads."""
    request, shapes = call.request, call.shapes
    words = refs.cache.bitcast(jnp.uint32).at[part.buffer].reshape(call.keys * shapes.stride, shapes.lanes)
    start = part.offset * shapes.stride
    mask = None
    if part.masked:
        mask = visible_mask(request, call.token_rows, part.base, part.first, (call.rows, part.keys))
    behind: Any = None
    for joint in range(call.joints):
        pairs = [load_head(shapes, words, head, start, part.keys, request.cache_dtype) for head in call.heads_of(joint)]
        key = [key.astype(shapes.operand) for key, _ in pairs]
        queries = load_tile(call, refs, item, joint)
        if part.careful and call.joined > 1:  # zeros times what is not finite would be NaN
            found = [product(queries[:, i * LANES : (i + 1) * LANES], each, 1) for i, each in enumerate(key)]
            products = of_own_head(call, found)
        else:
            products = product(queries, beside(key), 1)
        logits = base2_logits(request, products, scale_of(call, refs, "k_scale", joint))
        if mask is not None:
            logits = jnp.where(mask, logits, HIDDEN)
        weights, kept = softmax_step(refs, joint, logits)
        if behind is not None:  # the product of one joint overlaps with the softmax of the next one
            add_values(call, refs, part, mask, *behind)
        behind = (joint, weights, beside([value for _, value in pairs]), kept)
    add_values(call, refs, part, mask, *behind)


def beside(parts: list[jax.Array]) -> jax.Array:
    """Parts side by side, in lanes: copies of registers."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def of_own_head(call: Call, each: list[Any]) -> Any:
    """Of one thing for each head of a joint, what the rows of queries have: their own head's."""
    if len(each) == 1:
        return each[0]
    row = lax.broadcasted_iota(jnp.int32, (call.rows, 1), 0)  # joints are of one token
    return jnp.where(row < call.shapes.group, each[0], each[1])


def softmax_step(refs: Any, joint: int, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights ``[rows, keys]``, and the factor ``[rows, 128]`` of what has been summed before."""
    before = refs.maximum[joint]
    maximum = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - widen(maximum, logits.shape[1]))
    kept = jnp.exp2(before - maximum)
    refs.maximum[joint] = maximum
    refs.total[joint] = refs.total[joint] * kept + jnp.sum(weights, axis=1, keepdims=True)
    return weights, kept


def add_values(
    call: Call,
    refs: Any,
    part: Part,
    mask: jax.Array | None,
    joint: int,
    weights: jax.Array,
    value: jax.Array,
    kept: jax.Array,
) -> None:
    """Add the weighted values of some keys.

    Where there is a mask, values of keys that no query of the tile sees become zero: their slots may hold anything.
    In a careful part, values that are not finite are left out of the product, because 0 times infinity is NaN. The
    queries that see them become NaN.
    """
    operand, seen = call.shapes.operand, None
    value = value.astype(operand)
    if mask is not None:
        key = part.base + lax.broadcasted_iota(jnp.int32, value.shape, 0)
        inside = (key >= first_visible(call.request, part.first)) & (key <= part.last)
        value = jnp.where(inside, value, jnp.zeros_like(value))
        if part.careful:
            wide = value.astype(jnp.float32)
            strange = jnp.where(wide - wide == 0, 0.0, 1.0)
            value = jnp.where(strange == 0, wide, 0.0).astype(operand)
            seen = product(jnp.where(mask, 1.0, 0.0).astype(operand), strange.astype(operand), 0)
    summed = refs.weighted[joint] * widen(kept, call.lanes) + product(weights.astype(operand), value, 0)
    refs.weighted[joint] = summed if seen is None else jnp.where(seen > 0, jnp.nan, summed)


def scale_of(call: Call, refs: Any, name: str, joint: int) -> Any:
    """The factor of a joint's rows, where the option is an array; else None."""
    ref = getattr(refs, name, None)
    return None if ref is None else of_own_head(call, [ref[head] for head in call.heads_of(joint)])


def is_spoiled(call: Call, refs: Any, item: jax.Array) -> jax.Array:
    """Whether a sum of the tile's queries is NaN. A NaN never leaves the sums."""
    sums = refs.weighted[...] * refs.total[:, :, :1]
    row = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    live = row < tokens_of(call, refs, item) * call.token_rows
    return jnp.max(jnp.where(live & (sums != sums), 1.0, 0.0)) > 0


def attend_again(call: Call, refs: Any, item: jax.Array) -> None:
    """A tile whose sums hold a NaN, once more and with care: it may have come from what its queries do not see.

    This waits for each copy, and has a buffer of its own.
    """
    buffer, slot = jnp.int32(call.block.buffers), jnp.int32(2)
    empty_softmax(call, refs)

    @pl.loop(column(refs, Item.BEGIN, item), column(refs, Item.END, item))
    def _(block: jax.Array) -> None:
        at = Cursor(item, block)
        table = copy_table(call, refs, at, slot)
        table.start()
        table.wait()
        start_pages(call, refs, at, buffer, slot)
        wait_pages(call, refs, at, buffer)
        attend_parts(call, refs, at, buffer, careful=True)


def finish_tile(call: Call, refs: Any, item: jax.Array) -> None:
    """Store a tile's results, and start their copies."""
    request, shapes = call.request, call.shapes
    slot = lax.rem(item, jnp.int32(2))

    @pl.when(is_spoiled(call, refs, item))
    def _() -> None:
        attend_again(call, refs, item)

    @pl.when(item >= 2)
    def _() -> None:
        for copy in copies_out(call, refs, item - 2):
            copy.wait()

    words = call.rows // packing(shapes.result)
    lse = jnp.zeros((call.rows, LANES), jnp.float32)
    for joint in range(call.joints):
        total = refs.total[joint]
        factor = request.v_scale / jnp.where(total == 0, 1.0, total)
        v_scale = scale_of(call, refs, "v_scale", joint)
        factor = factor if v_scale is None else factor * v_scale
        result = (refs.weighted[joint] * widen(factor, call.lanes)).astype(shapes.result)
        target = refs.out.bitcast(jnp.uint32).at[slot, joint].reshape(words, call.lanes)
        store_rows(target, pltpu.bitcast(result, jnp.uint32))
        if request.return_lse:
            lane = lax.broadcasted_iota(jnp.int32, lse.shape, 1)
            lse = jnp.where(lane == joint, (refs.maximum[joint] + jnp.log2(total)) * (1 / LOG2_E), lse)
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
    base, (first, last) = at.block * call.keys, span_of(call, refs, at.item)
    # Every query sees the keys that both the first and the last one see.
    whole = (base + call.keys <= first + 1) & (base >= first_visible(request, last))

    @pl.when(whole)
    def _() -> None:
        attend_part(call, refs, at.item, Part(buffer, 0, call.keys, base, first, last, False, False))

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        attend_parts(call, refs, at, buffer, careful=False)

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
    buffers = block.buffers + 1  # the last one is for attend_again

    def tile(copies: int, dtype: np.dtype) -> Any:
        pack = packing(dtype)
        return pltpu.VMEM((copies, call.joints, block.tokens, call.token_rows // pack, pack, call.lanes), dtype)

    found = {
        "cache": pltpu.VMEM((buffers, call.keys, *shapes.buffered_slot), request.cache_dtype),
        "tile": tile(block.buffers, shapes.operand),
        "out": tile(2, shapes.result),
        "maximum": pltpu.VMEM((call.joints, call.rows, LANES), jnp.float32),
        "total": pltpu.VMEM((call.joints, call.rows, LANES), jnp.float32),
        "weighted": pltpu.VMEM((call.joints, call.rows, call.lanes), jnp.float32),
        "entries": pltpu.SMEM((3, 1, TABLE_CHUNK), jnp.int32),
        "table_sems": pltpu.SemaphoreType.DMA((3,)),
        "page_sems": pltpu.SemaphoreType.DMA((buffers,)),
        "tile_sems": pltpu.SemaphoreType.DMA((block.buffers,)),
        "out_sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if request.return_lse:
        found["lse_out"] = pltpu.VMEM((2, block.tokens, call.token_rows, LANES), jnp.float32)
    if call.writes:
        found["write_sems"] = pltpu.SemaphoreType.DMA((1,))
    return found


def attend(
    call: Call,
    work: WorkList,
    segments: WorkList | None,
    arrays: dict[str, jax.Array],
    interpret: Any,
) -> tuple[Results, jax.Array]:
    """The results of the tiles in ``work``, and the pages.

    ``arrays`` are ``queries [joints, tokens, rows of a token / pack, pack, lanes]``, ``tables`` of
    :func:`~.work.chunked_tables`, ``pages``, ``new [tokens, ...]`` as a slot of the cache, ``k_scale`` and ``v_scale``
    where they are arrays, and ``sinks [joints, rows, 128]`` in base 2.
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
    of_output = (call.joints, request.num_tokens, call.token_rows // pack, pack, call.lanes)
    outputs = {"output": (of_output, shapes.result)}
    if request.return_lse:
        outputs["lse"] = ((request.num_tokens, call.token_rows, LANES), np.dtype(np.float32))
    aliases = {}
    if call.writes:
        outputs["written"] = (arrays["pages"].shape, request.cache_dtype)
        aliases[len(scalars) + list(inputs).index("pages")] = list(outputs).index("written")
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
