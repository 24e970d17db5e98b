"""Where the kernel stands in its list of work, and the copies between HBM and the core's own memories.

``refs`` are the kernel's refs by name: arrays in HBM, scalars, and the memory of :func:`~.call.scratch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .blocks import TABLE_CHUNK
from .call import Call
from .work import Item

__all__ = [
    "Cursor",
    "advance",
    "column",
    "copies_out",
    "copy_queries",
    "copy_table",
    "span_of",
    "start_pages",
    "tokens_of",
    "wait_pages",
]


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


def tokens_of(call: Call, refs: Any, item: jax.Array) -> Any:
    """Tokens of a tile."""
    return 1 if call.decode else column(refs, Item.COUNT, item)


def span_of(call: Call, refs: Any, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of a tile's first and last query."""
    first = column(refs, Item.POSITION, item)
    return first, first + (tokens_of(call, refs, item) - 1)


def copy_table(call: Call, refs: Any, at: Cursor, slot: jax.Array) -> Any:
    """The copy of the chunk of the block table that a step needs."""
    chunk = lax.div(at.block * call.pages, jnp.int32(TABLE_CHUNK))
    source = refs.tables.at[column(refs, Item.ROW, at.item), chunk]
    return pltpu.make_async_copy(source, refs.entries.at[slot], refs.table_semaphores.at[slot])


def pages_of(call: Call, refs: Any, at: Cursor) -> tuple[jax.Array, jax.Array]:
    """The first entry of the block table that a step needs, and the one after the last."""
    first = at.block * call.pages
    begin = jnp.maximum(column(refs, Item.PAGE, at.item), first)
    return begin, jnp.minimum(column(refs, Item.PAGE_END, at.item), first + call.pages)


def buffer_at(call: Call, refs: Any, buffer: jax.Array, slot: Any, count: Any) -> Any:
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
        pltpu.make_async_copy(refs.pages.at[page], to, refs.page_semaphores.at[buffer]).start()


def wait_pages(call: Call, refs: Any, at: Cursor, buffer: jax.Array) -> None:
    """Wait until a step's pages are there: a semaphore counts bytes, so one wait is for all of them."""
    begin, end = pages_of(call, refs, at)
    copied = buffer_at(call, refs, buffer, 0, (end - begin) * call.request.page_size)
    pltpu.make_async_copy(copied, copied, refs.page_semaphores.at[buffer]).wait()


def copy_queries(call: Call, refs: Any, item: jax.Array) -> Any:
    """The copy of a tile's queries."""
    slot = lax.rem(item, jnp.int32(call.block.buffers))
    token, count = column(refs, Item.TOKEN, item), tokens_of(call, refs, item)
    return pltpu.make_async_copy(
        refs.queries.at[:, pl.ds(token, count)], refs.tile.at[slot, :, pl.ds(0, count)], refs.tile_semaphores.at[slot]
    )


def copies_out(call: Call, refs: Any, item: jax.Array) -> list[Any]:
    """The copies of a tile's results."""
    slot = lax.rem(item, jnp.int32(2))
    token, count = column(refs, Item.TOKEN, item), tokens_of(call, refs, item)
    copies = [
        pltpu.make_async_copy(
            refs.out.at[slot, :, pl.ds(0, count)],
            refs.output.at[:, pl.ds(token, count)],
            refs.out_semaphores.at[slot, 0],
        )
    ]
    if call.request.return_lse:
        copies.append(
            pltpu.make_async_copy(
                refs.lse_out.at[slot, pl.ds(0, count)],
                refs.lse.at[pl.ds(token, count)],
                refs.out_semaphores.at[slot, 1],
            )
        )
    return copies
