"""The TurboQuant cache format: the arrays of one layer, in the form of EasyDeL 0.3.0, and what depends on that form.

TurboQuant (Zandieh et al., 2025, arXiv 2504.19874) stores a key as the indices of its rotated coordinates in a codebook
(4 bits each), the signs of a projection of the residual (1 bit each), and two norms; a value as indices and a norm.
With ``R`` the rotation, ``S`` the projection, ``m`` its number of signs and ``c`` a codebook::

    query . key  ~  |key| * (R query) . c[indices]  +  sqrt(pi / 2) / m * |residual| * (S query) . signs
    value        ~  |value| * R^T c[indices]

The formulas are EasyDeL's, so caches that it has filled give the same results here. They differ from the paper's in the
second term of a logit, which should have the key's norm, the rotated query and a larger projection: as it is, it adds
almost nothing. The public functions take :class:`TurboQuantPages` in place of a page array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .errors import Unsupported
from .formats import Axes, CacheFormat
from .layout import PageLayout, Version
from .options import SCALES, Options

__all__ = [
    "ARRAYS",
    "FORMAT",
    "INDEX_LEVELS",
    "TurboQuantConstants",
    "TurboQuantFormat",
    "TurboQuantPages",
    "compress",
    "padded_codebook",
    "queries_for_codes",
    "query_rotation",
    "rotate_back",
]

ARRAYS = ("key_indices", "key_signs", "key_norms", "value_indices", "value_norms")
"""The arrays of a layer's cache, in EasyDeL's order."""

INDEX_LEVELS = 16
"""Entries that an index of 4 bits can select."""

NORM_DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes of norms."""

TINY_NORM = 1e-8
"""A vector is divided by its norm, but by no less than this; EasyDeL's value."""


class TurboQuantConstants(NamedTuple):
    """Constants of a layer, the same for all tokens; float32.

    Attributes:
        rotation: ``[head_dim, head_dim]``, orthogonal.
        projection: ``[signs, head_dim]``.
        key_codebook, value_codebook: the numbers that indices stand for.
    """

    rotation: jax.Array
    projection: jax.Array
    key_codebook: jax.Array
    value_codebook: jax.Array


class TurboQuantPages(NamedTuple):
    """The cache of a layer. The five arrays begin with ``[pages, page_size, kv_heads]``.

    Attributes:
        key_indices: ``[..., head_dim / 2]`` uint8: two indices in a byte, the first in its low half.
        key_signs: ``[..., signs / 8]`` uint8: the first sign in the lowest bit, 1 for a number that is not negative.
        key_norms: ``[..., 2]``: of the key, and of the residual of its rotated direction.
        value_indices: ``[..., head_dim / 2]`` uint8.
        value_norms: ``[...]``.
        constants: of the layer.
    """

    key_indices: jax.Array
    key_signs: jax.Array
    key_norms: jax.Array
    value_indices: jax.Array
    value_norms: jax.Array
    constants: TurboQuantConstants

    @property
    def shape(self) -> tuple[int, ...]:
        """``(pages, page_size, kv_heads)``, which all five arrays share."""
        return tuple(self.key_indices.shape[:3])

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The five arrays, in the order of :data:`ARRAYS`."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def with_arrays(self, arrays: Iterable[Any]) -> TurboQuantPages:
        """A cache of five other arrays and the same constants."""
        return self._replace(**dict(zip(ARRAYS, arrays, strict=True)))

    def check(self, head_dim: int) -> None:
        """Raise ValueError where the arrays do not fit each other, or this ``head_dim``."""
        rotation, projection, *codebooks = self.constants
        for name, codebook in zip(("key", "value"), codebooks, strict=True):
            if len(codebook.shape) != 1 or not 1 <= codebook.shape[0] <= INDEX_LEVELS:
                raise ValueError(
                    f"{name} codebook: got shape {tuple(codebook.shape)}, wanted up to {INDEX_LEVELS} entries: an "
                    "index is stored in 4 bits. Choose a TurboQuantConfig with bits of 2 to 4."
                )
        if tuple(rotation.shape) != (head_dim, head_dim) or len(projection.shape) != 2:
            raise ValueError(
                f"TurboQuant constants: got a rotation of shape {tuple(rotation.shape)} and a projection of shape "
                f"{tuple(projection.shape)}, wanted [{head_dim}, {head_dim}] and [signs, {head_dim}] for queries of "
                f"head_dim {head_dim}."
            )
        signs = projection.shape[0]
        if head_dim % 2 or not signs or signs % 8 or projection.shape[1] != head_dim:
            raise ValueError(
                f"TurboQuant cache: got head_dim {head_dim} and a projection of shape {tuple(projection.shape)}, "
                "wanted an even head_dim, and a multiple of 8 signs for it: both are stored in whole bytes."
            )
        wanted = ((head_dim // 2,), (signs // 8,), (2,), (head_dim // 2,), ())
        for name, array, rest in zip(ARRAYS, self.arrays, wanted, strict=True):
            if len(self.shape) != 3 or 0 in array.shape or tuple(array.shape) != (*self.shape, *rest):
                raise ValueError(
                    f"{name}: got shape {tuple(array.shape)}, wanted {(*self.shape, *rest)}: as many pages, slots and "
                    f"heads as the key indices, and what head_dim {head_dim} with {signs} signs takes."
                )
            is_code = "norms" not in name
            dtypes = ("uint8",) if is_code else NORM_DTYPES
            if array.dtype.name not in dtypes:
                raise ValueError(f"{name}: got dtype {array.dtype}, wanted {' or '.join(dtypes)}.")


def compress(keys: jax.Array, values: jax.Array, cache: TurboQuantPages) -> tuple[jax.Array, ...]:
    """Codes and norms of new tokens, ``[tokens, kv_heads, ...]`` in the dtypes of the cache's arrays.

    Args:
        keys, values: ``[tokens, kv_heads, head_dim]``, any float dtype.
        cache: the cache that they are for: its constants and dtypes.
    """
    constants = cache.constants
    norms, rotated = _rotate(keys, constants)
    indices, entries = _nearest(rotated, constants.key_codebook)
    residual = rotated - entries
    signs = jnp.einsum("thd,md->thm", residual, constants.projection, precision="highest") >= 0
    key_norms = jnp.concatenate([norms, jnp.linalg.norm(residual, axis=-1, keepdims=True)], axis=-1)
    value_norms, rotated = _rotate(values, constants)
    value_indices, _ = _nearest(rotated, constants.value_codebook)
    new = (_pack(indices, 2), _pack(signs, 8), key_norms, _pack(value_indices, 2), value_norms[..., 0])
    return tuple(each.astype(array.dtype) for each, array in zip(new, cache.arrays, strict=True))


def _rotate(array: jax.Array, constants: TurboQuantConstants) -> tuple[jax.Array, jax.Array]:
    """Norm and rotated direction of each head, float32."""
    array = array.astype(jnp.float32)
    norms = jnp.linalg.norm(array, axis=-1, keepdims=True)
    direction = array / jnp.maximum(norms, TINY_NORM)
    return norms, jnp.einsum("thd,ed->the", direction, constants.rotation, precision="highest")


def _nearest(array: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the nearest entries, or of the first of two that are equally near; and these entries."""
    # Entry by entry: on a CPU that takes half the time of argmin over an axis of 16, for which XLA has no vector code.
    indices = jnp.zeros(array.shape, jnp.uint8)
    entries = jnp.broadcast_to(codebook[0], array.shape)
    least = jnp.abs(array - entries)
    for index in range(1, codebook.shape[0]):
        distance = jnp.abs(array - codebook[index])
        closer = distance < least
        least = jnp.where(closer, distance, least)
        indices = jnp.where(closer, jnp.uint8(index), indices)
        entries = jnp.where(closer, codebook[index], entries)
    return indices, entries


def _pack(array: jax.Array, count: int) -> jax.Array:
    """``count`` neighbors of the last axis in each byte, the first in the lowest bits."""
    parts = array.astype(jnp.uint8).reshape(*array.shape[:-1], array.shape[-1] // count, count)
    shifts = jnp.arange(0, 8, 8 // count, dtype=jnp.uint8)[None, None, None, :]
    return jnp.sum(parts << shifts, axis=-1, dtype=jnp.uint8)


def query_rotation(constants: TurboQuantConstants, dtype: Any) -> jax.Array:
    """Matrix ``[head_dim + signs, head_dim]`` that makes queries for keys of codes.

    Such a key is centroids times the key's norm, and then signs times the residual's norm. One product of it with a
    rotated query gives both terms of a logit.
    """
    rotation, projection = (each.astype(dtype) for each in constants[:2])
    return jnp.concatenate([rotation, projection * (math.sqrt(math.pi / 2) / projection.shape[0])])


def queries_for_codes(queries: jax.Array, constants: TurboQuantConstants, dtype: Any) -> jax.Array:
    """Queries in the coordinates of codes, by :func:`query_rotation`.

    Args:
        queries: ``[tokens, q_heads, head_dim]``.
        constants: of the cache.
        dtype: of the products and of the result, float32 or float64.

    Returns:
        ``[tokens, q_heads, head_dim + signs]``.
    """
    return jnp.einsum("thd,ed->the", queries.astype(dtype), query_rotation(constants, dtype), precision="highest")


def rotate_back(output: jax.Array, constants: TurboQuantConstants) -> jax.Array:
    """Sums ``[tokens, q_heads, head_dim]`` of rotated values, as sums of values, in the same dtype."""
    return jnp.einsum("the,ed->thd", output, constants.rotation.astype(output.dtype), precision="highest")


def padded_codebook(codebook: jax.Array) -> jax.Array:
    """All entries ``[INDEX_LEVELS]`` that an index can select. One past the codebook stands for 0."""
    return jnp.pad(codebook, (0, INDEX_LEVELS - codebook.shape[0]))


@dataclasses.dataclass(frozen=True)
class TurboQuantFormat(CacheFormat):
    """Caches of codes: :class:`TurboQuantPages`."""

    name = "turboquant"
    label = "TurboQuant"

    def holds(self, cache: Any) -> bool:
        """Whether ``cache`` is a :class:`TurboQuantPages`."""
        return isinstance(cache, TurboQuantPages)

    def dtype(self, cache: Any) -> np.dtype:
        """dtype of the codes."""
        return np.dtype(np.uint8)

    def check(self, version: Version, cache: Any, head_dim: int) -> None:
        """See :meth:`TurboQuantPages.check`. Both versions have the same arrays."""
        cache.check(head_dim)

    def check_options(self, cache: Any, options: Options) -> None:
        """Refuse scales: the cache has norms."""
        given = [name for name in SCALES if getattr(options, name) is not None or name in options.scale_arrays]
        if given:
            raise Unsupported(
                f"{' and '.join(given)} with a TurboQuant cache, which has norms instead. Leave them out."
            )

    def num_kv_heads(self, version: Version, cache: Any, head_dim: int) -> tuple[int, ...]:
        """The third axis of each array."""
        return (int(cache.shape[2]),)

    def layout(
        self, version: Version, shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> PageLayout:
        """Strides of the numbers that the codes represent. They do not address the arrays."""
        if num_kv_heads != shape[2]:
            raise ValueError(f"keys: got {num_kv_heads} kv heads, wanted the {shape[2]} of the TurboQuant cache.")
        token_stride, head_stride = 2 * num_kv_heads * head_dim, 2 * head_dim
        return PageLayout(shape[1], num_kv_heads, head_dim, token_stride, head_stride, head_dim, head_dim)

    def specs(self, cache: Any, page_axes: Axes, head_axes: Axes) -> Any:
        """The five arrays are split in the same way; the constants are on every device."""
        whole = jax.tree.map(lambda _: PartitionSpec(), cache)
        leading = (page_axes or None, None, head_axes or None)
        return whole.with_arrays(PartitionSpec(*leading, *[None] * (array.ndim - 3)) for array in cache.arrays)


FORMAT = TurboQuantFormat()
