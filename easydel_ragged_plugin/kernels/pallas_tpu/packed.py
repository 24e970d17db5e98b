"""Loads and stores of rows that share 32-bit words.

With a bfloat16 cache a word holds an element of a key and the same element of its value. Words of one kv head are every
``stride``-th row of a buffer, so a strided load picks them out, and a shift leaves the part that is wanted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.layout import LANES

from .blocks import Shapes

__all__ = ["load_head", "load_rows", "store_rows"]


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


def load_head(
    shapes: Shapes, buffer: Any, head: int, start: Any, keys: int, dtype: Any, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[keys, lanes]`` of a kv head, from a buffer ``[slots * stride, lanes]`` of words.

    The first slot's first row is row ``start``. ``dtype`` is that of the cache. Both are one array where a key and its
    value share a row. They are zero where ``seen [keys, lanes]`` is False: a slot may hold anything there.
    """

    def load(row: int) -> jax.Array:
        words = load_rows(buffer, start + row, keys, shapes.stride)
        return words if seen is None else jnp.where(seen, words, jnp.uint32(0))

    row, part = shapes.words_of(head, value=False)
    words = load(row)
    key = _part(shapes, words, part, dtype)
    if shapes.shares_rows:
        return key, key
    value_row, part = shapes.words_of(head, value=True)
    if value_row != row:
        words = load(value_row)
    return key, _part(shapes, words, part, dtype)


def _part(shapes: Shapes, words: jax.Array, part: int, dtype: Any) -> jax.Array:
    if shapes.pack == 1:
        return pltpu.bitcast(words, dtype)
    bits = 32 // shapes.pack
    shifted = words if part == 0 else words >> (part * bits)
    narrow = shifted.astype(jnp.dtype(f"uint{bits}"))  # it drops the parts above
    return pltpu.bitcast(narrow, dtype)
