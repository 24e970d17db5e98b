"""What the kernels read: the pages that a row needs, the queries of a tile, and blocks of keys and values.

**Addresses.** Pages are indexed as ``[page, slot, element of the slot]``, each with its own int32, which none exceeds.
Their strides are applied by Pallas, in 64 bits where an array is larger than 2**32 bytes. Below that it takes 32 signed
bits for the number of *elements*, which suffices for elements of two bytes and more; 8-bit caches between the two
bounds are refused (``PallasGPU.refuses``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.rows import needed_entries
from easydel_ragged_plugin.types import AttentionRequest

from .tiles import Tile, power_of_two

__all__ = [
    "Places",
    "Queries",
    "broadcast_along",
    "iota",
    "load_block",
    "load_operand",
    "load_queries",
    "row_has_pages",
]

ENTRIES = 256
"""Entries of the block table that are looked at in one step."""


def iota(size: int) -> jax.Array:
    """``[0, size)`` in int32."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def broadcast_along(array: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """A vector laid along ``axis`` of a tile; a scalar all over it. Every index of a tile has the tile's shape."""
    return lax.broadcast_in_dim(array, shape, (axis,) if array.ndim else ())


def row_has_pages(
    request: AttentionRequest, tables: Any, row: jax.Array, context: jax.Array, queries: jax.Array
) -> jax.Array:
    """Whether every page that a row needs is in the cache. Costs 4 bytes for each of these pages, whatever the table's
    width."""
    first, last = needed_entries(request, context, queries)
    steps = jnp.where(queries > 0, lax.div(last - first, jnp.int32(ENTRIES)) + 1, 0)

    def step(index: jax.Array, outside: jax.Array) -> jax.Array:
        entry = first + index * ENTRIES + iota(ENTRIES)
        needed = entry <= last
        page = pltriton.load(tables.at[jnp.broadcast_to(row, (ENTRIES,)), entry], mask=needed, other=0)
        return outside | jnp.where(needed & ((page < 0) | (page >= request.num_pages)), 1, 0)

    return jnp.max(lax.fori_loop(0, steps, step, jnp.zeros((ENTRIES,), jnp.int32))) == 0


class Places(NamedTuple):
    """Where queries stand, ``[queries]`` each."""

    token: jax.Array
    """Index on the token axis."""
    offset: jax.Array
    """Token, counted from the tile's first."""
    head: jax.Array
    """Query head."""


class Queries(NamedTuple):
    """The queries of a tile. Query m of it is head ``m % group`` of the group, of the tile's token ``m // group``."""

    operand: jax.Array
    """``[queries, lanes]`` in the compute dtype; zeros where the tile has no query."""
    position: jax.Array
    """[queries] position of each query in its context; that of the last one where there is no query."""
    first: jax.Array
    """Position of the first query."""
    last: jax.Array
    """Position of the last query."""
    start: jax.Array
    """The first token."""
    places: Places
    """Where the queries stand. What is no query has an index of its own."""
    filled: jax.Array
    """[queries] whether there is a query."""


def load_queries(
    request: AttentionRequest,
    tile: Tile,
    queries: Any,
    kv_head: jax.Array,
    start: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
) -> Queries:
    """The queries of ``tokens`` tokens from token ``start`` on, at positions from ``first`` on."""
    group = request.group_size
    query = iota(tile.queries)
    offset = lax.div(query, jnp.int32(group))
    head = kv_head * group + lax.rem(query, jnp.int32(group))
    filled = offset < tokens
    # What is no query keeps an index of its own: the interpreter writes what a masked store leaves, too.
    token = start + offset
    last = first + tokens - 1
    return Queries(
        load_operand(request, queries, token, head, filled),
        jnp.minimum(first + offset, last),
        first,
        last,
        start,
        Places(token, offset, head),
        filled,
    )


def load_operand(
    request: AttentionRequest, queries: Any, token: jax.Array, head: jax.Array, filled: jax.Array
) -> jax.Array:
    """Queries ``[queries, lanes]`` in the compute dtype; zeros where ``filled`` is false."""
    shape = (*token.shape, power_of_two(request.head_dim))
    lane = broadcast_along(iota(shape[1]), 1, shape)
    operand = pltriton.load(
        queries.at[broadcast_along(token, 0, shape), broadcast_along(head, 0, shape), lane],
        mask=broadcast_along(filled, 0, shape) & (lane < request.head_dim),
        other=0.0,
    )
    return operand.astype(request.compute_dtype)


def load_block(
    request: AttentionRequest,
    size: int,
    tables: Any,
    pages: Any,
    row: jax.Array,
    kv_head: jax.Array,
    position: jax.Array,
    inside: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[size, lanes]`` at the positions of a block; zeros, unread, where ``inside`` is false."""
    layout, lanes = request.layout, power_of_two(request.head_dim)
    entry = lax.div(position, jnp.int32(layout.page_size))
    slot = lax.rem(position, jnp.int32(layout.page_size))
    page = pltriton.load(
        tables.at[jnp.broadcast_to(row, (size,)), entry], mask=inside, other=None if inside is None else 0
    )
    shape = (size, lanes)
    lane = broadcast_along(iota(lanes), 1, shape)
    mask = None if lanes == request.head_dim else lane < request.head_dim
    if inside is not None:
        read = broadcast_along(inside, 0, shape)
        mask = read if mask is None else mask & read
    found = []
    for offset in (0, layout.value_offset):
        element = broadcast_along(kv_head * layout.head_stride + offset, 0, shape) + lane
        stored = pltriton.load(
            pages.at[broadcast_along(page, 0, shape), broadcast_along(slot, 0, shape), element],
            mask=mask,
            other=None if mask is None else 0.0,
        )
        found.append(stored.astype(request.compute_dtype))
    return found[0], found[1]
