"""The kernel: new tokens into the pages, then attention, in one Pallas call for each kind of row.

A call has no grid. It walks over steps, a step being one block of keys of one tile of queries, in the order of its
list of work. Three cursors run along the steps:

========= ===================================================================================================
tables    copies the part of the block table that a step needs to scalar memory
fetch     waits for that part, and starts the copies of the step's pages, and of the tile's queries
attend    waits for pages and queries, and goes through the softmax
========= ===================================================================================================

The second runs ``buffers - 1`` steps ahead of the third, across tiles and rows, and the first one step ahead of the
second. What they fill is used in turn: buffer ``step % buffers``, tile ``item % buffers``.

Pages are copied whole, and only those that a query of the tile sees. What a buffer holds beside them is old, and never
reaches a result: logits of keys that are not seen are replaced, and values of keys that no query sees become zero.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.base2 import LOG2_E
from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.rows import first_visible
from easydel_ragged_plugin.varying import result_type

from .blocks import vmem_limit
from .call import Call, Results, scratch
from .copies import Cursor, advance, column, copies_out, copy_queries, copy_table, span_of, start_pages, wait_pages
from .packed import store_rows
from .softmax import Part, attend_part, attend_parts, empty_softmax, is_spoiled, scale_of, widen
from .update import write_segments
from .work import Item, WorkList

__all__ = ["attend"]


def ragged_attention(call: Call, names: tuple[str, ...], *arrays: Any) -> None:
    """The kernel; ``names`` are those of its refs."""
    refs: Any = SimpleNamespace(**dict(zip(names, arrays, strict=True)))
    if call.writes:
        write_segments(refs.segments, refs.num_segments, refs.new, refs.pages, refs.write_semaphores)
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


def begin_tile(call: Call, refs: Any, item: jax.Array) -> None:
    """Wait for a tile's queries, and empty its softmax."""
    copy_queries(call, refs, item).wait()
    empty_softmax(call, refs)


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
        target = refs.out.at[slot, joint].bitcast(jnp.uint32).reshape(words, call.lanes)
        store_rows(target, pltpu.bitcast(result, jnp.uint32))
        if request.return_lse:
            lane = lax.broadcasted_iota(jnp.int32, lse.shape, 1)
            lse = jnp.where(lane == joint, (refs.maximum[joint] + jnp.log2(total)) * (1 / LOG2_E), lse)
    if request.return_lse:
        refs.lse_out.at[slot].reshape(call.rows, LANES)[...] = lse
    for copy in copies_out(call, refs, item):
        copy.start()


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
    of_output = (call.joints, call.tokens, call.token_rows // pack, pack, call.lanes)
    outputs: dict[str, tuple[tuple[int, ...], Any]] = {"output": (of_output, shapes.result)}
    if request.return_lse:
        outputs["lse"] = ((call.tokens, call.token_rows, LANES), np.dtype(np.float32))
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
