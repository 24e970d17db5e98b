"""The online softmax (Dao et al., 2022, arXiv 2205.14135) over the keys of a block."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.base2 import base2_logits
from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.rows import first_visible, is_visible
from easydel_ragged_plugin.types import AttentionRequest

from .call import Call
from .copies import Cursor, span_of, tokens_of
from .packed import load_head, load_rows

__all__ = [
    "HIDDEN",
    "Part",
    "attend_part",
    "attend_parts",
    "empty_softmax",
    "is_spoiled",
    "scale_of",
    "widen",
]

HIDDEN = -(2.0**127)
"""The logit of a key that is not seen. It is finite, so that the difference of two is a number."""


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


def attend_parts(call: Call, refs: Any, at: Cursor, buffer: jax.Array, *, careful: bool) -> None:
    """A block of keys, a few at a time, from the first one that a query of the tile sees to the last one."""
    base, (first, last) = at.block * call.keys, span_of(call, refs, at.item)
    keys = call.careful_part if careful else call.part
    if keys == call.keys:
        attend_part(call, refs, at.item, Part(buffer, 0, keys, base, first, last, True, careful))
        return
    begin = jnp.maximum(first_visible(call.request, first) - base, 0)
    end = jnp.minimum(last + 1 - base, call.keys)
    size = jnp.int32(keys)

    @pl.loop(lax.div(begin, size), lax.div(end + (size - 1), size))
    def _(index: jax.Array) -> None:
        offset = index * size
        attend_part(call, refs, at.item, Part(buffer, offset, keys, base + offset, first, last, True, careful))


def attend_part(call: Call, refs: Any, item: jax.Array, part: Part) -> None:
    """Some keys of a block: logits, softmax, and sums of values, of all heads."""
    request, shapes = call.request, call.shapes
    words = refs.cache.at[part.buffer].bitcast(jnp.uint32).reshape(call.keys * shapes.stride, shapes.lanes)
    start = part.offset * shapes.stride
    mask = seen = None
    if part.masked:
        mask = visible_mask(request, call.token_rows, part.base, part.first, (call.rows, part.keys))
        position = part.base + lax.broadcasted_iota(jnp.int32, (part.keys, shapes.lanes), 0)
        seen = (position >= first_visible(request, part.first)) & (position <= part.last)
    behind: Any = None
    for joint in range(call.joints):
        pairs = [
            load_head(shapes, words, head, start, part.keys, request.cache_dtype, seen) for head in call.heads_of(joint)
        ]
        key = [as_operand(call, part, key) for key, _ in pairs]
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


def load_tile(call: Call, refs: Any, item: jax.Array, joint: int) -> jax.Array:
    """A tile's queries ``[rows, lanes]`` for one joint."""
    slot, operand = lax.rem(item, jnp.int32(call.block.buffers)), call.shapes.operand
    words = call.rows // packing(operand)
    ref = refs.tile.at[slot, joint].bitcast(jnp.uint32).reshape(words, call.lanes)
    return pltpu.bitcast(load_rows(ref, 0, words), operand)


def as_operand(call: Call, part: Part, stored: jax.Array) -> jax.Array:
    """Keys or values as they are multiplied. Mosaic takes products of bfloat16 and 8 bits, in a tenth of what a
    conversion would take before them."""
    mixed = stored.dtype.itemsize == 1 and call.shapes.operand == jnp.bfloat16 and not part.careful
    return stored if mixed else stored.astype(call.shapes.operand)


def product(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    """``left [m, k]`` by ``right`` over its axis ``contracted``, in float32. HIGHEST: float32 is not cut to
    bfloat16."""
    exact = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((1,), (contracted,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def visible_mask(
    request: AttentionRequest, token_rows: int, base: jax.Array, first: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """Whether the queries of a tile see the keys of a block: ``[rows, keys]``.

    The tile's first query is at position ``first``, and has ``token_rows`` rows; the block begins at ``base``.
    """
    key = base + lax.broadcasted_iota(jnp.int32, shape, 1)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    if token_rows == shape[0]:
        return is_visible(request, key, jnp.broadcast_to(first, shape))
    if token_rows & (token_rows - 1):  # a TPU does not divide vectors of integers; of few rows this one is exact
        token = ((row.astype(jnp.float32) + 0.5) * (1 / token_rows)).astype(jnp.int32)
    else:
        token = row >> (token_rows.bit_length() - 1)
    return is_visible(request, key, first + token)


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

    In a careful part, values that are not finite are left out of the product, because 0 times infinity is NaN. The
    queries that see them become NaN.
    """
    operand, seen = call.shapes.operand, None
    value = as_operand(call, part, value)
    if part.careful:
        assert mask is not None
        wide = value.astype(jnp.float32)
        strange = jnp.where(wide - wide == 0, 0.0, 1.0)
        value = jnp.where(strange == 0, wide, 0.0).astype(operand)
        seen = product(jnp.where(mask, 1.0, 0.0).astype(operand), strange.astype(operand), 0)
    summed = refs.weighted[joint] * widen(kept, call.lanes) + product(weights.astype(operand), value, 0)
    refs.weighted[joint] = summed if seen is None else jnp.where(seen > 0, jnp.nan, summed)


def widen(lanes: jax.Array, size: int) -> jax.Array:
    """``[rows, 128]`` whose lanes are equal, as ``[rows, size]``: copies of registers."""
    copies = -(-size // LANES)
    wide = lanes if copies == 1 else jnp.concatenate([lanes] * copies, axis=1)
    return wide if wide.shape[1] == size else wide[:, :size]


def beside(parts: list[jax.Array]) -> jax.Array:
    """Parts side by side, in lanes: copies of registers."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def of_own_head(call: Call, each: list[Any]) -> Any:
    """Of one thing for each head of a joint, what the rows of queries have: their own head's."""
    if len(each) == 1:
        return each[0]
    row = lax.broadcasted_iota(jnp.int32, (call.rows, 1), 0)  # joints are of one token
    return jnp.where(row < call.shapes.group, each[0], each[1])


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
