"""The two operations that EasyDeL's registry serves as ``ragged_page_attention_v2`` and ``ragged_page_attention_v3``.

They turn the host's call (a cache view, metadata, a partition manager and a long list of keywords) into one call of
``api.py``, and its result into what the host expects. The class names matter: the host's Gemma 4 model tells ragged
attention by the name of the class.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import api, host, turboquant
from .config import as_config
from .errors import Unsupported
from .turboquant import TurboQuantConstants, TurboQuantPages

_host = host.load()
_EMPTY, _HEAD, _PREFILL = _host.axes.EMPTY, _host.axes.HEAD, _host.axes.MODE_PREFILL

__all__ = ["RaggedPageAttnV2", "RaggedPageAttnV3"]


class _RaggedPageAttention(_host.OperationImpl):  # type: ignore[name-defined]
    """What both operations share: every forward method leads to :meth:`_forward`."""

    version: Literal["v2", "v3"]
    update_metadata: Any
    """The host's metadata field that says where new tokens go."""

    @classmethod
    def get_impl_name(cls) -> str:
        """The registered name."""
        return f"ragged_page_attention_{cls.version}"

    def get_impl_metadata(self) -> Any:
        """The host's ``OperationMetadata`` of this object."""
        return self.metadata

    @classmethod
    def get_requirements(cls, mode: Any = _host.ExecutionMode.MIXED) -> Any:
        """The metadata fields and the cache view that the engine must provide, in any mode."""
        field = _host.MetadataField
        return (
            _host.RequirementsBuilder(cls.get_impl_name())
            .require_metadata(
                field.SEQ_LENS
                | field.CONTEXT_LENS
                | field.POSITIONS
                | field.QUERY_START_LOC
                | field.PAGES_TABLES
                | cls.update_metadata
            )
            .optional_metadata(field.LOGITS_INDICES)
            .support_cache(_host.CacheType.RAGGED_PAGES)
            .use_cache_view(_host.RaggedPagesCacheView)
            .build()
        )

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **arguments: Any) -> Any:
        """Attention of ``query`` ``[tokens, heads, head_dim]`` or ``[batch, length, heads, head_dim]``.

        The leading axes of key and value are flattened with the query's; the output has the query's shape. See
        :meth:`forward_native` for the arguments.
        """
        shape = query.shape
        flat = (array.reshape(-1, *array.shape[-2:]) for array in (query, key, value))
        output = super().__call__(**dict(zip(("query", "key", "value"), flat, strict=True)), **arguments)
        output.attention_outputs = output.attention_outputs.reshape(shape)
        return output

    def forward_native(self, **arguments: Any) -> Any:
        """Attention on JAX's default backend. With the host's FORCE_NATIVE_RUNTIME, by the portable kernel alone.

        Every other forward method is the same call: which kernel runs is a matter of selection, not of the method.

        Keyword Args:
            query: ``[tokens, q_heads, head_dim]``; tokens past the last row's are padding and give zeros.
            key, value: ``[tokens, kv_heads, head_dim]`` of the same tokens. v2 finds them in the pages already.
            cache_view: object with ``kv_pages`` and ``metadata``. v3 puts the updated pages into it.
            cache_metadata: the host's ``RaggedPagesMetadata``.
            softmax_scale, logits_soft_cap, sliding_window, softmax_aux, mask_value, vmem_limit_bytes, compute_dtype,
                optimized, q_scale, k_scale, v_scale: as in :func:`easydel_ragged_plugin.ragged_page_attention_v2`.

        Returns:
            The host's ``AttentionOutput``: the output in the query's dtype, no weights, and for v3 the same cache view.

        Raises:
            TypeError: an argument that neither this operation nor the host's attention layer knows.
            Unsupported: an argument that paged attention can't honour.
            ValueError: wrong shapes, dtypes or values, before anything is written.
        """
        return self._forward(kernel="xla" if _host.native_runtime_forced() else None, **arguments)

    def forward_cpu(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`, which the host's dispatch takes on CPU."""
        return self._forward(**arguments)

    def forward_gpu(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`."""
        return self._forward(**arguments)

    def forward_cuda(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`."""
        return self._forward(**arguments)

    def forward_rocm(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`."""
        return self._forward(**arguments)

    def forward_tpu(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`."""
        return self._forward(**arguments)

    def forward_tt(self, **arguments: Any) -> Any:
        """See :meth:`forward_native`. Only EasyDeL 0.3.0 calls it, on Tenstorrent devices."""
        return self._forward(**arguments)

    def _forward(
        self,
        *,
        kernel: str | None = None,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache_view: Any,
        cache_metadata: Any,
        softmax_scale: float | None = None,
        logits_soft_cap: float | None = None,
        compute_dtype: Any = None,
        optimized: bool = False,
        sliding_window: int | tuple[int, int] | None = None,
        softmax_aux: jax.Array | None = None,
        mask_value: float | None = None,
        vmem_limit_bytes: int | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        **host_arguments: Any,
    ) -> Any:
        options = {
            "softmax_scale": softmax_scale,
            "logits_soft_cap": logits_soft_cap,
            "sliding_window": sliding_window,
            "mask_value": mask_value,
            "vmem_limit_bytes": vmem_limit_bytes,
            "compute_dtype": compute_dtype,
            "optimized": optimized,
            "q_scale": q_scale,
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        self._check_host_arguments(host_arguments)
        pages = self._pages_of(cache_view)
        name = self.get_impl_name()
        config = as_config(self.metadata.get_operation_config(name))
        if isinstance(pages, TurboQuantPages):  # the host keeps a config of its own for them
            config = as_config(self.metadata.get_operation_config(f"{name}_turboquant")) or config
        options |= {
            "config": kernel or config,
            **self._partitioning(query, pages, cache_view),
        }
        rows = (cache_metadata.context_lens, cache_metadata.pages_tables, cache_metadata.query_start_loc)
        if self.version == "v2":
            num_seqs = jnp.asarray(cache_metadata.num_seqs).reshape(-1)[:1]
            output = api.ragged_page_attention_v2(query, pages, *rows, num_seqs, softmax_aux, **options)
            return _host.AttentionOutput(attention_weights=None, attention_outputs=output)
        if cache_metadata.request_distribution is None:
            raise ValueError(
                "cache_metadata.request_distribution: got None, wanted [decode_end, prefill_end, total]. "
                "Build the metadata with version='v3'."
            )
        output, pages = api.ragged_page_attention_v3(
            query, key, value, pages, *rows, cache_metadata.request_distribution, softmax_aux, **options
        )
        if isinstance(pages, TurboQuantPages):
            for field, array in zip(turboquant.ARRAYS, pages.arrays, strict=True):
                setattr(cache_view, f"{field}_pages", array)
            return _host.AttentionOutput(attention_weights=None, attention_outputs=output, cache_view=cache_view)
        cache_view.kv_pages = pages
        would_be_cast = _host.casts_returned_pages and pages.dtype != jnp.dtype(self.metadata.runtime_dtype)
        return _host.AttentionOutput(
            attention_weights=None, attention_outputs=output, cache_view=None if would_be_cast else cache_view
        )

    def _check_host_arguments(self, arguments: dict[str, Any]) -> None:
        """Refuse arguments that nobody knows, and values that would change a result and can't be honoured."""
        unknown = sorted(arguments.keys() - host.PASSED_ARGUMENTS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: got unknown arguments {', '.join(unknown)}. This package supports EasyDeL "
                f"{' and '.join(host.SUPPORTED)}; with a newer host, update it: pip install -U easydel-ragged-plugin"
            )
        if arguments.get("bias") is not None:
            raise Unsupported(f"{self.get_impl_name()}: bias. Paged attention has none; use another attn_mechanism.")
        if arguments.get("causal") is False:
            raise Unsupported(f"{self.get_impl_name()}: causal=False. A decoding cache is causal.")
        if arguments.get("dropout_prob") and arguments.get("deterministic") is False:
            raise Unsupported(f"{self.get_impl_name()}: dropout. Serving is deterministic; pass deterministic=True.")

    def _pages_of(self, cache_view: Any) -> jax.Array | TurboQuantPages:
        view_class = _host.TurboQuantRaggedPagesCacheView
        if view_class is not None and isinstance(cache_view, view_class):
            given = cache_view.constants
            constants = (given.rotation_matrix, given.qjl_projection, given.key_codebook, given.value_codebook)
            arrays = {field: getattr(cache_view, f"{field}_pages") for field in turboquant.ARRAYS}
            return TurboQuantPages(**arrays, constants=TurboQuantConstants(*constants))
        pages = getattr(cache_view, "kv_pages", None)
        if pages is None:
            raise ValueError(
                f"cache_view: got {type(cache_view).__name__}, wanted a view with kv_pages, such as "
                "RaggedPagesCacheView. The model must be served with a paged cache to use ragged page attention."
            )
        if not isinstance(pages, jax.Array):
            raise Unsupported(
                f"{self.get_impl_name()}: pages of type {type(pages).__name__}. Choose a cache without a quantizer."
            )
        wanted = 4 if self.version == "v2" else 5
        if pages.ndim != wanted:
            raise ValueError(
                f"cache_view: got {type(cache_view).__name__} with pages of shape {pages.shape}, wanted pages of "
                f"{wanted} axes, as RaggedPagesCacheView has them for {self.version}. Build the cache for the model's "
                "attn_mechanism, or choose the attn_mechanism that this cache belongs to."
            )
        return pages

    def _partitioning(self, query: jax.Array, pages: jax.Array | TurboQuantPages, cache_view: Any) -> dict[str, Any]:
        """Mesh and partition specs from the host's partition manager; nothing on a single device."""
        mesh = self.metadata.mesh
        if mesh is None or mesh.size == 1:
            return {}

        def resolve(axes: list[Any], shape: tuple[int, ...]) -> Any:
            return self.metadata.partition_manager.resolve(axes=axes, mode=_PREFILL, shape=shape)

        cache = cache_view.metadata
        page_axis = _host.data_parallel_axis if getattr(cache, "data_parallel_size", 1) > 1 else _EMPTY
        # 0.2.0.2 has no kv_head_shards and always splits the heads of its pages; 0.3.0 says whether it did.
        head_shards = getattr(cache, "kv_head_shards", None)
        head_axis = _EMPTY if head_shards == 1 else _HEAD
        if isinstance(pages, TurboQuantPages):  # always split, and the view says nothing of it
            head_axis = _host.axes.KV_HEAD
        query_spec = resolve([_EMPTY, _HEAD, _EMPTY], query.shape)
        page_spec = resolve([page_axis, _EMPTY, head_axis, *[_EMPTY] * (len(pages.shape) - 3)], pages.shape)
        if self.version == "v2":
            return {"mesh": mesh, "in_specs": (query_spec, page_spec, None, None, None, None)}
        return {"mesh": mesh, "in_specs": (query_spec, None, None, page_spec, None, None, None, None)}


class RaggedPageAttnV2(_RaggedPageAttention):
    """``ragged_page_attention_v2``: the host has written new keys and values into the pages before the call."""

    version = "v2"
    update_metadata = _host.MetadataField.SLOT_MAPPING


class RaggedPageAttnV3(_RaggedPageAttention):
    """``ragged_page_attention_v3``: the operation writes new keys and values into the pages, then attends."""

    version = "v3"
    update_metadata = _host.MetadataField.REQUEST_DISTRIBUTION
