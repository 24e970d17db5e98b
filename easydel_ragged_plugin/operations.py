"""The two operations that EasyDeL's registry serves as ``ragged_page_attention_v2`` and ``ragged_page_attention_v3``.

They turn the host's call (a cache view, metadata, a partition manager and a long list of keywords) into one call of
``api.py``, and its result into what the host expects.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import api, host, model_config, views
from .config import RaggedPageConfig, as_config
from .errors import Unsupported
from .options import KEYWORDS, Options, split_scales

_host = host.load()
_EMPTY, _HEAD, _PREFILL = _host.axes.EMPTY, _host.axes.HEAD, _host.axes.MODE_PREFILL

__all__ = ["RaggedPageAttnV2", "RaggedPageAttnV3"]


class _RaggedPageAttention(_host.OperationImpl):  # type: ignore[name-defined]
    """Base of both operations: every forward method calls :meth:`_forward`."""

    version: Literal["v2", "v3"]
    update_metadata: Any
    """The host's metadata field with the places of new tokens."""

    @classmethod
    def get_impl_name(cls) -> str:
        """The registered name."""
        return f"ragged_page_attention_{cls.version}"

    def get_impl_metadata(self) -> Any:
        """The host's ``OperationMetadata`` of this object."""
        return self.metadata

    @classmethod
    def get_requirements(cls, mode: Any = _host.ExecutionMode.MIXED) -> Any:
        """The metadata fields and the cache view that the engine must provide, the same in each mode."""
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
        """Attention on JAX's default backend. With the host's FORCE_NATIVE_RUNTIME only the portable kernel runs.

        The other forward methods make the same call: selection decides which kernel runs, not the method.

        Keyword Args:
            query: ``[tokens, q_heads, head_dim]``; tokens past the last row's are padding and give zeros.
            key, value: ``[tokens, kv_heads, head_dim]`` of the same tokens. v2 does not use them: the pages have them.
            cache_view: object with ``kv_pages`` and ``metadata``. v3 puts the updated pages into it.
            cache_metadata: the host's ``RaggedPagesMetadata``.
            softmax_scale, logits_soft_cap, sliding_window, attention_chunk_size, softmax_aux, mask_value,
                vmem_limit_bytes, compute_dtype, optimized, q_scale, k_scale, v_scale: as in
                :func:`easydel_ragged_plugin.ragged_page_attention_v2`.
            update_pages: as in :func:`easydel_ragged_plugin.ragged_page_attention_v3`; only for v3.

        Returns:
            The host's ``AttentionOutput``: the output in the query's dtype, no weights, and for v3 the same cache view.

        Raises:
            TypeError: an argument that neither this operation has nor the host's attention layer passes.
            Unsupported: an argument that paged attention can't honor.
            ValueError: wrong shapes, dtypes or values, before anything is written.
        """
        return self._forward(portable=_host.native_runtime_forced(), **arguments)

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
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache_view: Any,
        cache_metadata: Any,
        softmax_aux: jax.Array | None = None,
        portable: bool = False,
        **arguments: Any,
    ) -> Any:
        given, scales = split_scales({name: arguments.pop(name) for name in KEYWORDS & arguments.keys()})
        options = Options(**given)
        self._check_host_arguments(arguments, options)
        options = self._with_chunks(options, arguments.get("mask_info"), cache_view)
        view = views.adapter_of(cache_view)
        pages = view.read(cache_view, self.version)
        is_v3 = self.version == "v3"
        last = cache_metadata.request_distribution if is_v3 else jnp.asarray(cache_metadata.num_seqs).reshape(-1)[:1]
        if last is None:
            raise ValueError(
                "cache_metadata.request_distribution: got None, wanted [decode_end, prefill_end, total]. "
                "Build the metadata with version='v3'."
            )
        configs = (self.metadata.get_operation_config(name) for name in view.config_names(self.get_impl_name()))
        config = as_config(next((each for each in configs if each is not None), None))
        if portable:
            cap = None if config is None else config.logits_soft_cap
            config = RaggedPageConfig(kernel=view.portable_kernel, logits_soft_cap=cap)
        attended = api.attend(
            self.version,
            query,
            key if is_v3 else None,
            value if is_v3 else None,
            pages,
            cache_metadata.context_lens,
            cache_metadata.pages_tables,
            cache_metadata.query_start_loc,
            last,
            softmax_aux,
            options,
            **scales,
            config=self._with_soft_cap(config, options),
            **self._partitioning(query, pages, cache_view, view),
        )
        returned = view.write(cache_view, attended.pages, self.metadata.runtime_dtype) if is_v3 else None
        return _host.AttentionOutput(attention_weights=None, attention_outputs=attended.output, cache_view=returned)

    def _with_chunks(self, options: Options, mask_info: Any, cache_view: Any) -> Options:
        """``options`` with the chunks of ``mask_info``, where the call does not pass their size."""
        if options.attention_chunk_size is not None:
            return options
        size = model_config.chunk_size(self.get_impl_name(), mask_info, self.metadata.base_config, cache_view)
        return options if size is None else dataclasses.replace(options, attention_chunk_size=size)

    def _with_soft_cap(self, config: RaggedPageConfig | None, options: Options) -> RaggedPageConfig | None:
        """``config`` with the model's soft cap where neither it nor the call has one. Hooks and overrides win."""
        if options.logits_soft_cap is not None or (config is not None and config.logits_soft_cap is not None):
            return config
        cap = model_config.soft_cap(self.metadata.base_config)
        return config if cap is None else dataclasses.replace(config or RaggedPageConfig(), logits_soft_cap=cap)

    def _check_host_arguments(self, arguments: dict[str, Any], options: Options) -> None:
        """Refuse unknown arguments, and values that would change a result and can't be honored."""
        unknown = sorted(arguments.keys() - host.PASSED_ARGUMENTS)
        if unknown:
            raise TypeError(
                f"{type(self).__qualname__}: got unknown arguments {', '.join(unknown)}. This package supports EasyDeL "
                f"{' and '.join(host.SUPPORTED)}; with a newer host, install a newer version of this package."
            )
        if arguments.get("bias") is not None:
            raise Unsupported(
                f"{self.get_impl_name()}: bias, such as ALiBi's of MPT. Paged attention has none, so eSurge can't "
                "serve this model; use attn_mechanism='sdpa' and model.generate()."
            )
        model_config.refuse_mask(
            self.get_impl_name(), arguments.get("causal"), arguments.get("mask_info"), options.sliding_window
        )
        if arguments.get("dropout_prob") and arguments.get("deterministic") is False:
            raise Unsupported(f"{self.get_impl_name()}: dropout. Serving is deterministic; pass deterministic=True.")

    def _partitioning(self, query: jax.Array, pages: Any, cache_view: Any, view: views.CacheView) -> dict[str, Any]:
        """Mesh and partition specs from the host's partition manager; nothing on a single device."""
        mesh = self.metadata.mesh
        if mesh is None or mesh.size == 1:
            return {}

        def resolve(axes: list[Any], shape: tuple[int, ...]) -> Any:
            return self.metadata.partition_manager.resolve(axes=axes, mode=_PREFILL, shape=shape)

        data_parallel = getattr(cache_view.metadata, "data_parallel_size", 1) > 1
        page_axis = _host.data_parallel_axis if data_parallel else _EMPTY
        query_spec = resolve([_EMPTY, _HEAD, _EMPTY], query.shape)
        page_axes = [page_axis, _EMPTY, view.head_axis(cache_view), *[_EMPTY] * (len(pages.shape) - 3)]
        page_spec = resolve(page_axes, pages.shape)
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


# EasyDeL's Gemma 4 looks for "ragged", "page", "decode" and "unified" in the name of the operation's class. Where it
# finds one it passes a window that is one token short; to any other name it passes the pair (left, right): all of it.
# __qualname__ stays: pickle, repr and entry points use that.
RaggedPageAttnV2.__name__, RaggedPageAttnV3.__name__ = "EasyDelPluginV2", "EasyDelPluginV3"
