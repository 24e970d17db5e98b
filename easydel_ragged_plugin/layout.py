"""How keys and values lie in a page array, as strides.

The three cache shapes in use (v2, v3, and v3 with head_dim 64) hold the same facts and differ only in
strides. A kernel that is written against :class:`PageLayout` serves all of them::

    address(page, slot, kv_head) = page * page_stride + slot * token_stride + kv_head * head_stride
    value address                = key address + value_offset

All strides count elements, not bytes.

======================= ==================================================== ================== =========== =========
cache                   array shape                                          token_stride       head_stride value
======================= ==================================================== ================== =========== =========
v2                      [pages, page_size, 2 * kv_heads, head_dim]           2 * kv_heads * D   2 * D       D
v3                      [pages, page_size, groups, pack, Dp]                 groups * pack * Dp 2 * Dp      Dp
v3, head_dim 64         [pages, page_size, groups, pack, 128]                groups * pack * 128 128        64
======================= ==================================================== ================== =========== =========

``pack`` is how many elements fill 32 bits, ``Dp`` is head_dim rounded up to 128, and ``groups * pack``
is the number of stored heads rounded up to a multiple of ``pack``. The v3 shapes are those of the TPU
kernel of vLLM and ejkernel (ragged page attention v3).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

__all__ = ["PageLayout", "Version", "page_shape"]

Version = Literal["v2", "v3"]
LANES = 128


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def packing(dtype: np.dtype) -> int:
    """Elements of ``dtype`` in 32 bits (at least 1)."""
    return max(1, 4 // np.dtype(dtype).itemsize)


def page_shape(
    version: Version, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: np.dtype
) -> tuple[int, ...]:
    """Shape of the page array that ``version`` uses for this geometry.

    Args:
        version: ``"v2"`` or ``"v3"``.
        num_pages: pages in the cache.
        page_size: tokens in a page.
        num_kv_heads: key/value heads.
        head_dim: elements of one key head.
        dtype: dtype of the cache; v3 packs heads into 32-bit groups by its size.
    """
    if version == "v2":
        return (num_pages, page_size, 2 * num_kv_heads, head_dim)
    pack = packing(dtype)
    stored_heads = num_kv_heads if head_dim == LANES // 2 else 2 * num_kv_heads
    return (num_pages, page_size, _round_up(stored_heads, pack) // pack, pack, _round_up(head_dim, LANES))


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Where each key and value element of a page array lies. All strides are in elements.

    Attributes:
        page_size: tokens in a page.
        num_kv_heads: key/value heads that the array holds (padding heads not counted).
        head_dim: elements of one head that carry data.
        token_stride: distance between neighbouring slots of a page.
        head_stride: distance between the keys of neighbouring kv heads.
        value_offset: distance from a key to its value.
        padded_head_dim: elements from the start of a key (or value) up to the next thing stored;
            larger than ``head_dim`` where the cache pads heads.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    token_stride: int
    head_stride: int
    value_offset: int
    padded_head_dim: int

    @property
    def page_stride(self) -> int:
        """Distance between neighbouring pages."""
        return self.page_size * self.token_stride

    @classmethod
    def of(
        cls, version: Version, shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> PageLayout:
        """Layout of a page array of ``shape``, or ValueError when that shape can't hold this geometry."""
        wanted = page_shape(version, shape[0], shape[1], num_kv_heads, head_dim, dtype) if len(shape) >= 2 else None
        if wanted is None or tuple(shape) != wanted:
            form = (
                "[pages, page_size, 2 * kv_heads, head_dim]"
                if version == "v2"
                else "[pages, page_size, groups, pack, padded_head_dim]"
            )
            raise ValueError(
                f"{version} pages: got shape {tuple(shape)}, wanted {wanted or form} ({form}) for "
                f"{num_kv_heads} kv heads of head_dim {head_dim} in {np.dtype(dtype).name}. Build the cache with "
                f"page_shape({version!r}, num_pages, page_size, {num_kv_heads}, {head_dim}, dtype), or pass keys and "
                "values of the cache's own geometry."
            )
        page_size = shape[1]
        if version == "v2":
            return cls(page_size, num_kv_heads, head_dim, 2 * num_kv_heads * head_dim, 2 * head_dim, head_dim, head_dim)
        token_stride = shape[2] * shape[3] * shape[4]
        if head_dim == LANES // 2:
            return cls(page_size, num_kv_heads, head_dim, token_stride, LANES, LANES // 2, LANES // 2)
        padded = shape[4]
        return cls(page_size, num_kv_heads, head_dim, token_stride, 2 * padded, padded, padded)
