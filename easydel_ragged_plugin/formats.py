"""Cache formats: how one layer's keys and values are stored.

A :class:`CacheFormat` has everything that depends on the form of a cache: its check, its layout, how it is split over a
mesh. This file has the interface and :class:`PlainPages`, one array of numbers. ``turboquant.py`` has the other format.
``request.FORMATS`` lists all formats.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .layout import PageLayout, Version, page_shape
from .options import SCALES, Options

__all__ = ["CACHE_DTYPES", "PLAIN", "CacheFormat", "PlainPages"]

CACHE_DTYPES = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "int8",
)
"""Names of the dtypes that keys and values can be stored in: they have signs, zero, and eight bits at least."""

Axes = tuple[str, ...]


class CacheFormat(abc.ABC):
    """One way to store a cache. Objects have no state of a single cache. They are hashable, as part of a request.

    A cache is an array, or a pytree of arrays with ``shape``, whose first three axes are pages, slots of a page, and
    heads or groups of heads.

    Attributes:
        name: unique name, for ``types.Features.cache_formats``.
        label: its name in messages.
    """

    name: str
    label: str

    @abc.abstractmethod
    def holds(self, cache: Any) -> bool:
        """Whether ``cache`` is one of this format."""

    @abc.abstractmethod
    def dtype(self, cache: Any) -> np.dtype:
        """dtype of what is stored."""

    @abc.abstractmethod
    def check(self, version: Version, cache: Any, head_dim: int) -> None:
        """Raise ValueError where ``cache`` is malformed, or does not fit ``version`` and ``head_dim``."""

    @abc.abstractmethod
    def check_options(self, cache: Any, options: Options) -> None:
        """Check that the options fit the cache.

        Raises:
            ValueError: an option is missing that this cache needs.
            Unsupported: an option is set that this format can't have.
        """

    @abc.abstractmethod
    def num_kv_heads(self, version: Version, cache: Any, head_dim: int) -> tuple[int, ...]:
        """Key/value heads that a cache may have, for calls without new keys, which would have them. Several where the
        cache pads them."""

    @abc.abstractmethod
    def layout(
        self, version: Version, shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> PageLayout:
        """Strides of a cache of ``shape``, or ValueError where that shape can't hold this geometry."""

    @abc.abstractmethod
    def specs(self, cache: Any, page_axes: Axes, head_axes: Axes) -> Any:
        """Partition specs in the form of ``cache``: pages over ``page_axes``, heads over ``head_axes``."""

    def stores(self, cache: Any, dtype: Any) -> bool:
        """Whether new keys of ``dtype`` are stored bit for bit."""
        return False

    def describe(self, dtype: np.dtype) -> str:
        """The words for a cache of ``dtype`` in logs."""
        return f"{self.label} cache"


@dataclasses.dataclass(frozen=True)
class PlainPages(CacheFormat):
    """One array of keys and values, in the shapes of ``layout.py``."""

    name = "plain"
    label = "plain"

    def holds(self, cache: Any) -> bool:
        """Whether ``cache`` is an array, or a ``jax.ShapeDtypeStruct``."""
        return hasattr(cache, "shape") and hasattr(cache, "dtype")

    def dtype(self, cache: Any) -> np.dtype:
        """dtype of the array."""
        return np.dtype(cache.dtype)

    def check(self, version: Version, cache: Any, head_dim: int) -> None:
        """Raise ValueError for a wrong number of axes, a dtype not in :data:`CACHE_DTYPES`, or an empty array."""
        rank = 4 if version == "v2" else 5
        if len(cache.shape) != rank:
            raise ValueError(
                f"kv_pages: got shape {tuple(cache.shape)}, wanted {rank} axes for {version}. "
                f"page_shape({version!r}, ...) gives the shape."
            )
        if cache.dtype.name not in CACHE_DTYPES:
            raise ValueError(
                f"kv_pages: got dtype {cache.dtype}, wanted one that keys can be stored in: {', '.join(CACHE_DTYPES)}."
            )
        if 0 in cache.shape:
            raise ValueError(f"kv_pages: got shape {tuple(cache.shape)}, wanted at least one page of one token.")

    def check_options(self, cache: Any, options: Options) -> None:
        """Integer caches must have ``k_scale`` and ``v_scale``: the factors that turn integers into keys and values."""
        missing = [name for name in SCALES if getattr(options, name) is None and name not in options.scale_arrays]
        if jnp.issubdtype(cache.dtype, jnp.integer) and missing:
            raise ValueError(
                f"{' and '.join(missing)}: got None, wanted the size of one step of the {cache.dtype} cache. Keys and "
                "values are stored divided by them."
            )

    def num_kv_heads(self, version: Version, cache: Any, head_dim: int) -> tuple[int, ...]:
        """Half of the heads of a v2 array: keys and values alternate. All that have the shape of a v3 array."""
        if version == "v2":
            return (int(cache.shape[2]) // 2,)
        pages, page_size, groups, pack, _ = shape = tuple(cache.shape)
        return tuple(
            heads
            for heads in range(1, groups * pack + 1)
            if page_shape(version, pages, page_size, heads, head_dim, self.dtype(cache)) == shape
        )

    def layout(
        self, version: Version, shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> PageLayout:
        """See :meth:`PageLayout.of`."""
        return PageLayout.of(version, shape, num_kv_heads, head_dim, dtype)

    def specs(self, cache: Any, page_axes: Axes, head_axes: Axes) -> PartitionSpec:
        """Pages are the first axis, groups of heads the third."""
        return PartitionSpec(page_axes or None, None, head_axes or None, *[None] * (len(cache.shape) - 3))

    def stores(self, cache: Any, dtype: Any) -> bool:
        """Whether the cache has this dtype."""
        return bool(dtype == cache.dtype)

    def describe(self, dtype: np.dtype) -> str:
        """The name of the dtype."""
        return f"{dtype.name} cache"


PLAIN = PlainPages()
