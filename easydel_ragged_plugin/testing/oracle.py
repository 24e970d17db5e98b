"""The oracle as an operation: right and slow.

It checks the contract kit: the contract must pass on it, and fail on subclasses that have one mistake each.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from easydel_ragged_plugin import host as host_versions
from easydel_ragged_plugin import reference
from easydel_ragged_plugin.options import KEYWORDS, split_scales

__all__ = ["oracle_operation"]

_INDEX_FIELDS = ("context_lens", "pages_tables", "query_start_loc")


@functools.cache
def oracle_operation(version: str) -> type:
    """A class of EasyDeL's ``OperationImpl`` that calls the float64 reference from the compiled program.

    Args:
        version: ``"v2"`` or ``"v3"``.
    """
    host = host_versions.load()
    name = f"ragged_page_attention_{version}"

    class OracleOperation(host.OperationImpl):  # type: ignore[name-defined]
        @classmethod
        def get_impl_name(cls) -> str:
            return name

        def get_impl_metadata(self) -> Any:
            return self.metadata

        @classmethod
        def get_requirements(cls, mode: Any = host.ExecutionMode.MIXED) -> Any:
            fields = host.MetadataField
            special = fields.SLOT_MAPPING if version == "v2" else fields.REQUEST_DISTRIBUTION
            return (
                host.RequirementsBuilder(name)
                .require_metadata(fields.CONTEXT_LENS | fields.QUERY_START_LOC | fields.PAGES_TABLES | special)
                .support_cache(host.CacheType.RAGGED_PAGES)
                .use_cache_view(host.RaggedPagesCacheView)
                .build()
            )

        def compute(
            self,
            query: Any,
            key: Any,
            value: Any,
            pages: Any,
            index: tuple[Any, ...],
            sinks: Any,
            options: dict[str, Any],
        ) -> tuple[np.ndarray, np.ndarray]:
            """Output and pages in NumPy. ``index``: context lengths, tables, starts, distribution or number of rows."""
            lens, tables, starts, last = index
            if version == "v2":
                return reference.ragged_page_attention_v2(
                    query, pages, lens, tables, starts, last, sinks, **options
                ), pages
            return reference.ragged_page_attention_v3(
                query, key, value, pages, lens, tables, starts, last, sinks, **options
            )

        def store(self, cache_view: Any, pages: Any) -> Any:
            """Put the pages into the view. Returns the view to return, or None."""
            if version == "v2":
                return None
            cache_view.kv_pages = pages
            # 0.2.0.2 casts every array of the output to the model's dtype; the pages must not be among them.
            casts = host.version == "0.2.0.2" and pages.dtype != self.metadata.runtime_dtype
            return None if casts else cache_view

        def forward_native(
            self,
            query: Any,
            key: Any,
            value: Any,
            cache_view: Any,
            cache_metadata: Any,
            softmax_aux: Any = None,
            **arguments: Any,
        ) -> Any:
            unknown = set(arguments) - {*KEYWORDS, *host_versions.PASSED_ARGUMENTS}
            if unknown:
                raise TypeError(f"{name}: unknown arguments {sorted(unknown)}")
            options, scales = split_scales(
                {option: arguments[option] for option in KEYWORDS if arguments.get(option) is not None}
            )
            last = cache_metadata.num_seqs if version == "v2" else cache_metadata.request_distribution
            index = (*(getattr(cache_metadata, field) for field in _INDEX_FIELDS), last)
            pages = cache_view.kv_pages

            def on_host(query: Any, key: Any, value: Any, pages: Any, sinks: Any, scales: Any, *index: Any) -> Any:
                query, key, value, pages = (np.asarray(array) for array in (query, key, value, pages))
                sinks = None if sinks is None else np.asarray(sinks)
                output, new = self.compute(
                    query,
                    key,
                    value,
                    pages,
                    tuple(np.asarray(array) for array in index),
                    sinks,
                    {**options, **{name: np.asarray(scale) for name, scale in scales.items()}},
                )
                return output.astype(query.dtype), new

            shapes = (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype))
            output, new_pages = jax.pure_callback(
                on_host, shapes, query, key, value, pages, softmax_aux, scales, *index
            )
            returned = self.store(cache_view, new_pages)
            return host.AttentionOutput(attention_weights=None, attention_outputs=output, cache_view=returned)

        def forward_cpu(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward_native(*args, **kwargs)

        forward_gpu = forward_cuda = forward_rocm = forward_tpu = forward_tt = forward_cpu

        def __call__(self, query: Any, key: Any, value: Any, **arguments: Any) -> Any:
            flat = (array.reshape(-1, *array.shape[-2:]) for array in (query, key, value))
            output = super().__call__(**dict(zip(("query", "key", "value"), flat, strict=True)), **arguments)
            output.attention_outputs = output.attention_outputs.reshape(query.shape)
            return output

    return OracleOperation
