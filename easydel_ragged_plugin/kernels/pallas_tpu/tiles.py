"""What the kernel computes with a block of keys: loads from packed rows, logits, and the online softmax.

Rows of the cache share 32-bit words: with a bfloat16 cache a word holds an element of a key and the same element of its
value. Words of one kv head are every ``stride``-th row of a buffer, so a strided load picks them out, and a shift
leaves the part that is wanted.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.layout import LANES
from easydel_ragged_plugin.rows import is_visible
from easydel_ragged_plugin.types import SATURATED, AttentionRequest

from .blocks import Shapes

__all__ = [
    "HIDDEN",
    "LOG2_E",
    "base2_logits",
    "load_head",
    "load_rows",
    "product",
    "store_rows",
    "visible_mask",
    "widen",
]

LOG2_E = math.log2(math.e)
"""Logits are held in base 2: a TPU has an instruction for ``exp2``."""

HIDDEN = -(2.0**127)
"""The logit of a key that is not seen. It is finite, so that the difference of two is a number."""


def _folded(ref: Any) -> tuple[Any, int]:
    """A ref of rows as one of rows of 128 lanes, and how many of them are a row."""
    rows, lanes = ref.shape
    folds = max(1, lanes // LANES)
    return (ref if folds == 1 else ref.reshape(rows * folds, LANES)), folds


def load_rows(ref: Any, start: Any, count: int, stride: int = 1) -> jax.Array:
    """``[count, lanes]``: every ``stride``-th row of ``ref [rows, lanes]`` of 32-bit words."""
    ref, folds = _folded(ref)
    step = stride * folds
    parts = [ref[pl.ds(start * folds + fold, count, step), :] for fold in range(folds)]
    return parts[0] if folds == 1 else jnp.concatenate(parts, axis=1)


def store_rows(ref: Any, words: jax.Array) -> None:
    """Store ``words [rows, lanes]`` of 32 bits to all of ``ref [rows, lanes]``."""
    ref, folds = _folded(ref)
    for fold in range(folds):
        ref[pl.ds(fold, words.shape[0], folds), :] = words[:, fold * LANES : (fold + 1) * LANES]


def load_head(shapes: Shapes, buffer: Any, head: int, start: Any, keys: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[keys, lanes]`` of a kv head, from a buffer ``[slots * stride, lanes]`` of words.

    The first slot's first row is row ``start``. ``dtype`` is that of the cache. Both are one array where a key and its
    value share a row.
    """
    row, part = shapes.words_of(head, value=False)
    words = load_rows(buffer, start + row, keys, shapes.stride)
    key = _part(shapes, words, part, dtype)
    if shapes.shares_rows:
        return key, key
    value_row, part = shapes.words_of(head, value=True)
    if value_row != row:
        words = load_rows(buffer, start + value_row, keys, shapes.stride)
    return key, _part(shapes, words, part, dtype)


def _part(shapes: Shapes, words: jax.Array, part: int, dtype: Any) -> jax.Array:
    if shapes.pack == 1:
        return pltpu.bitcast(words, dtype)
    bits = 32 // shapes.pack
    shifted = words if part == 0 else words >> (part * bits)
    narrow = shifted.astype(jnp.dtype(f"uint{bits}"))  # it drops the parts above
    return pltpu.bitcast(narrow, dtype)


def product(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    """``left [m, k]`` by ``right`` over its axis ``contracted``, in float32. HIGHEST: float32 is not cut to
    bfloat16."""
    exact = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((1,), (contracted,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def base2_logits(request: AttentionRequest, products: jax.Array, k_scale: jax.Array | None) -> jax.Array:
    """Logits in base 2, from products of queries and keys."""

    def times_scale(number: float) -> float | jax.Array:
        return number if k_scale is None else k_scale * number

    scale, cap = request.logits_scale, request.options.soft_cap
    if cap is None:
        return products * times_scale(scale * LOG2_E)
    if request.scale_over_cap is None:
        scaled = jnp.clip(products * times_scale(scale), -SATURATED * cap, SATURATED * cap) * (1 / cap)
    else:
        scaled = products * times_scale(request.scale_over_cap)
    return jnp.tanh(scaled) * (cap * LOG2_E)


def widen(lanes: jax.Array, size: int) -> jax.Array:
    """``[rows, 128]`` whose lanes are equal, as ``[rows, size]``: copies of registers."""
    copies = -(-size // LANES)
    wide = lanes if copies == 1 else jnp.concatenate([lanes] * copies, axis=1)
    return wide if wide.shape[1] == size else wide[:, :size]


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
