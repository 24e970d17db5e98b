"""Cache formats: how one layer's keys and values are stored.

A :class:`CacheFormat` owns all that depends on the form of a cache: its check, its layout, how it is split over a
mesh. This file has the interface and :class:`PlainPages`, one array of numbers; ``turboquant.py`` has the codes.
``request.FORMATS`` lists them all.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .layout import PageLayout, Version
from .options import Options

__all__ = ["PLAIN", "CacheFormat", "PlainPages"]

Axes = tuple[str, ...]


class CacheFormat(abc.ABC):
    """One way to store a cache. Objects hold nothing about a single cache; they are hashable, part of a request.

    A cache is an array, or a pytree of arrays with ``shape``, whose first three axes are pages, slots of a page, and
    groups of heads.

    Attributes:
        name: unique name, for ``types.Features.cache_formats``.
        label: what messages call it.
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
        """Raise ValueError where ``cache`` is malformed, or is not for ``version`` and ``head_dim``."""

    @abc.abstractmethod
    def check_options(self, cache: Any, options: Options) -> None:
        """Refuse options that such a cache can't have, and the lack of those that it must have.

        Raises:
            ValueError: an option is missing.
            Unsupported: an option makes no sense for this format.
        """

    @abc.abstractmethod
    def num_kv_heads(self, version: Version, cache: Any) -> int:
        """Key/value heads of a cache whose new keys are not at hand."""

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
        """What logs call a cache of ``dtype``."""
        return f"{self.label} cache"


@dataclasses.dataclass(frozen=True)
class PlainPages(CacheFormat):
    """One array of keys and values, in the shapes of ``layout.py``."""

    name = "plain"
    label = "plain"

    def holds(self, cache: Any) -> bool:
        """Whether ``cache`` is an array, or stands for one."""
        return hasattr(cache, "shape") and hasattr(cache, "dtype")

    def dtype(self, cache: Any) -> np.dtype:
        """dtype of the array."""
        return np.dtype(cache.dtype)

    def check(self, version: Version, cache: Any, head_dim: int) -> None:
        """Raise ValueError for a wrong number of axes, a dtype that holds no keys, or an empty array."""
        rank = 4 if version == "v2" else 5
        if len(cache.shape) != rank:
            raise ValueError(
                f"kv_pages: got shape {tuple(cache.shape)}, wanted {rank} axes for {version}. "
                f"page_shape({version!r}, ...) gives the shape."
            )
        if not (jnp.issubdtype(cache.dtype, jnp.floating) or cache.dtype == jnp.int8):
            raise ValueError(f"kv_pages: got dtype {cache.dtype}, wanted a float dtype or int8.")
        if 0 in cache.shape:
            raise ValueError(f"kv_pages: got shape {tuple(cache.shape)}, wanted at least one page of one token.")

    def check_options(self, cache: Any, options: Options) -> None:
        """Integers need scales: they say nothing without the factor that makes them a key or a value."""
        missing = [name for name in ("k_scale", "v_scale") if getattr(options, name) is None]
        if jnp.issubdtype(cache.dtype, jnp.integer) and missing:
            raise ValueError(
                f"{' and '.join(missing)}: got None, wanted the size of one step of the {cache.dtype} cache. Keys and "
                "values are stored divided by them."
            )

    def num_kv_heads(self, version: Version, cache: Any) -> int:
        """Half of the heads of a v2 array: keys and values take turns."""
        return int(cache.shape[2]) // 2

    def layout(
        self, version: Version, shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> PageLayout:
        """See :meth:`PageLayout.of`."""
        return PageLayout.of(version, shape, num_kv_heads, head_dim, dtype)

    def specs(self, cache: Any, page_axes: Axes, head_axes: Axes) -> PartitionSpec:
        """Pages are the first axis, groups of heads the third."""
        return PartitionSpec(page_axes or None, None, head_axes or None, *[None] * (len(cache.shape) - 3))

    def stores(self, cache: Any, dtype: Any) -> bool:
        """Whether the cache has this very dtype."""
        return bool(dtype == cache.dtype)

    def describe(self, dtype: np.dtype) -> str:
        """The dtype says it all."""
        return f"{dtype.name} cache"


PLAIN = PlainPages()
