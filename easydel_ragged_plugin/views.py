"""The cache views of the host: how a cache leaves one, and how it comes back.

A model hands its operation a view, and reads the view again in the next step, so an operation that updates the cache
puts it back into the very view that it was given.
"""

from __future__ import annotations

import abc
from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import host, turboquant
from .errors import Unsupported
from .turboquant import TurboQuantConstants, TurboQuantPages

_host = host.load()

__all__ = ["CacheView", "adapter_of"]


class CacheView(abc.ABC):
    """What this package does with one kind of view; ``portable_kernel`` is the kernel in plain JAX that reads it."""

    portable_kernel: str

    @abc.abstractmethod
    def config_names(self, operation: str) -> tuple[str, ...]:
        """Names under which the host keeps the configuration of ``operation``, the first that is set counts."""

    @abc.abstractmethod
    def read(self, view: Any, version: Literal["v2", "v3"]) -> Any:
        """The cache of ``view``."""

    @abc.abstractmethod
    def write(self, view: Any, cache: Any, model_dtype: Any) -> Any:
        """Put ``cache`` into ``view``; what the operation returns in its output, the view or None."""

    @abc.abstractmethod
    def head_axis(self, view: Any) -> Any:
        """The host's name for the axis over which it splits the heads of the cache."""


class PlainView(CacheView):
    """The host's ``RaggedPagesCacheView``, and any view that forwards its ``kv_pages`` and ``metadata``."""

    portable_kernel = "xla"

    def config_names(self, operation: str) -> tuple[str, ...]:
        """The operation's own name."""
        return (operation,)

    def read(self, view: Any, version: Literal["v2", "v3"]) -> jax.Array:
        """``kv_pages``, or an error that says what kind of view was wanted."""
        pages = getattr(view, "kv_pages", None)
        if pages is None:
            raise ValueError(
                f"cache_view: got {type(view).__name__}, wanted a view with kv_pages, such as "
                "RaggedPagesCacheView. The model must be served with a paged cache to use ragged page attention."
            )
        if not isinstance(pages, jax.Array):
            raise Unsupported(
                f"ragged_page_attention_{version}: pages of type {type(pages).__name__}. Choose a cache without a "
                "quantizer."
            )
        wanted = 4 if version == "v2" else 5
        if pages.ndim != wanted:
            raise ValueError(
                f"cache_view: got {type(view).__name__} with pages of shape {pages.shape}, wanted pages of "
                f"{wanted} axes, as RaggedPagesCacheView has them for {version}. Build the cache for the model's "
                "attn_mechanism, or choose the attn_mechanism that this cache belongs to."
            )
        return pages

    def write(self, view: Any, cache: Any, model_dtype: Any) -> Any:
        """Set ``kv_pages``. A host that casts every array of the output must not be given pages of another dtype."""
        view.kv_pages = cache
        return None if _host.casts_returned_pages and cache.dtype != jnp.dtype(model_dtype) else view

    def head_axis(self, view: Any) -> Any:
        """0.2.0.2 has no ``kv_head_shards`` and always splits the heads of its pages; 0.3.0 says whether it did."""
        whole = getattr(view.metadata, "kv_head_shards", None) == 1
        return _host.axes.EMPTY if whole else _host.axes.HEAD


class TurboQuantView(CacheView):
    """The host's ``TurboQuantRaggedPagesCacheView``: five arrays and their constants."""

    portable_kernel = "turboquant"

    def config_names(self, operation: str) -> tuple[str, ...]:
        """The host keeps a configuration of their own for these caches."""
        return (f"{operation}_turboquant", operation)

    def read(self, view: Any, version: Literal["v2", "v3"]) -> TurboQuantPages:
        """The arrays and constants of the view."""
        given = view.constants
        constants = (given.rotation_matrix, given.qjl_projection, given.key_codebook, given.value_codebook)
        arrays = {field: getattr(view, f"{field}_pages") for field in turboquant.ARRAYS}
        return TurboQuantPages(**arrays, constants=TurboQuantConstants(*constants))

    def write(self, view: Any, cache: Any, model_dtype: Any) -> Any:
        """Set the five arrays."""
        for field, array in zip(turboquant.ARRAYS, cache.arrays, strict=True):
            setattr(view, f"{field}_pages", array)
        return view

    def head_axis(self, view: Any) -> Any:
        """Always split, and the view says nothing of it."""
        return _host.axes.KV_HEAD


_PLAIN, _TURBOQUANT = PlainView(), TurboQuantView()


def adapter_of(view: Any) -> CacheView:
    """What handles ``view``. Not every view of pages has the host's class: hybrid models forward one."""
    coded = _host.TurboQuantRaggedPagesCacheView
    return _TURBOQUANT if coded is not None and isinstance(view, coded) else _PLAIN
