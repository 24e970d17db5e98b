"""Calls an operation the way the host's attention layer does: its cache view, its metadata, its arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin import host as host_versions
from easydel_ragged_plugin.layout import page_shape

from .batches import Batch, Case, Version

__all__ = ["Driver", "ForwardingView", "Outcome"]

MESH_AXES = ("dp", "fsdp", "ep", "tp", "sp")

# The host writes cache dtypes as strings; its own map from dtypes back to strings lacks some of them.
_CACHE_DTYPE_NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
}


class ForwardingView:
    """A cache view of another class that forwards only pages and metadata, as the views of hybrid models do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def kv_pages(self) -> Any:
        """The pages of the view behind this one."""
        return self._inner.kv_pages

    @kv_pages.setter
    def kv_pages(self, pages: Any) -> None:
        self._inner.kv_pages = pages

    @property
    def metadata(self) -> Any:
        """The cache configuration of the view behind this one."""
        return self._inner.metadata


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a call.

    Attributes:
        output: ``[tokens, q_heads, head_dim]``.
        output_shape, output_dtype: as the operation returned it.
        pages: ``kv_pages`` of the view that went in, after the call.
        returned_view: "same" (the object that went in), "none", or "other".
    """

    output: np.ndarray
    output_shape: tuple[int, ...]
    output_dtype: np.dtype
    pages: np.ndarray
    returned_view: str


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for the host's bias initializer. Paged attention must not use its value."""


class Driver:
    """Calls one operation class. Keeps its compiled programs, so cases of equal shape compile once.

    ``outcomes`` is for the caller: several tests check different results of one run.

    Args:
        operation: the class to call.
        mesh_axes: sizes of the host's mesh axes, ``{"tp": 2}`` for example; axes that are not named have size 1.
            With ``dp`` above 1 each row's pages must lie in its shard's part of the cache (:func:`.cases.local_pages`).
        version: whether it is called as v2 or as v3; None for what its name says.
    """

    def __init__(
        self, operation: type[Any], mesh_axes: Mapping[str, int] | None = None, version: Version | None = None
    ) -> None:
        self.operation = operation
        self._version = version
        self.host = host_versions.load()
        sizes = {**dict.fromkeys(MESH_AXES, 1), **(mesh_axes or {})}
        devices = np.array(jax.devices()[: math.prod(sizes.values())])
        self.mesh = jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), MESH_AXES)
        self.outcomes: dict[Case, Any] = {}
        self._instances: dict[str, Any] = {}
        self._programs: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._cache_configs: dict[Any, Any] = {}

    @property
    def name(self) -> str:
        """Canonical operation name."""
        names = self.operation.get_impl_name()
        return names if isinstance(names, str) else names[0]

    @property
    def version(self) -> Version:
        """``"v2"`` or ``"v3"``, as it was given or from the operation's name."""
        if self._version is not None:
            return self._version
        return "v2" if self.name.endswith("v2") else "v3"

    def instance(self, dtype: Any = np.float32) -> Any:
        """The operation object for models that attend in ``dtype``."""
        key = np.dtype(dtype).name
        if key not in self._instances:
            with self.mesh:
                metadata = self.host.OperationMetadata(runtime_dtype=jnp.dtype(dtype), platform="jax")
            self._instances[key] = self.operation(metadata)
        return self._instances[key]

    def cache_config(self, case: Case, num_pages: int) -> Any:
        """The host's cache configuration for ``case``."""
        fields = {
            "num_hidden_layers": 1,
            "max_model_length": case.pages_per_row * case.page_size,
            "num_kv_heads": case.kv_heads,
            "k_headdim": case.head_dim,
            "v_headdim": case.head_dim,
            "page_size": case.page_size,
            "num_pages": num_pages,
            "max_num_pages_per_req": case.pages_per_row,
            "num_slices_per_kv_cache_update_page": 8,
            "max_num_tokens": case.num_tokens,
            "max_num_reqs": case.num_rows,
            "version": self.version,
            "_kvdtype_str": _CACHE_DTYPE_NAMES[case.np_cache_dtype.name],
        }
        if self.host.data_parallel_axis is not None:  # 0.2.0.2 replicates pages and always splits their heads
            fields |= {"data_parallel_size": self.mesh.shape["dp"], "kv_head_shards": self._head_shards(case)}
        key = tuple(fields.values())
        if key not in self._cache_configs:
            self._cache_configs[key] = self.host.RaggedPagesCacheConfig(**fields)
        return self._cache_configs[key]

    def _head_shards(self, case: Case) -> int:
        """Devices over which the host splits the heads of the pages: ``tp``, or 1 where they do not divide."""
        stored = page_shape(self.version, 1, 1, case.kv_heads, case.head_dim, case.np_cache_dtype)[2]
        return self.mesh.shape["tp"] if stored % self.mesh.shape["tp"] == 0 else 1

    def view(self, batch: Batch, pages: np.ndarray) -> Any:
        """The host's cache view around ``pages``, placed as the host places it."""
        config = self.cache_config(batch.case, len(pages))
        manager = self.instance(batch.case.np_dtype).metadata.partition_manager
        shape, axes = config.get_shape_and_axes()
        if tuple(shape) != pages.shape:
            raise AssertionError(f"the host's cache has shape {shape}, this kit built {pages.shape}")
        with self.mesh:
            spec = manager.resolve(axes=axes, mode=self.host.axes.MODE_PREFILL, shape=shape)
        return self.host.RaggedPagesCacheView(
            metadata=config,
            layer_index=0,
            kv_pages=jax.device_put(pages, jax.sharding.NamedSharding(self.mesh, spec)),
            partition_manager=manager,
        )

    def metadata(self, batch: Batch) -> Any:
        """The host's run-time metadata of ``batch``."""
        is_v2 = self.version == "v2"
        return self.host.RaggedPagesMetadata(
            pages_tables=jnp.array(batch.block_tables),
            context_lens=jnp.array(batch.context_lens),
            query_start_loc=jnp.array(batch.query_start_loc),
            num_seqs=jnp.array(batch.num_seqs),
            slot_mapping=jnp.array(batch.slot_mapping) if is_v2 else None,
            position_ids=None,
            request_distribution=None if is_v2 else jnp.array(batch.distribution),
            num_kv_update_slices=jnp.array(batch.num_kv_update_slices) if is_v2 else None,
            version=self.version,
            num_slices_per_kv_cache_update_page=8 if is_v2 else None,
            page_size=batch.case.page_size,
        )

    def arguments(self, case: Case, num_tokens: int, compute_dtype: Any) -> dict[str, Any]:
        """Everything else that the host's attention layer passes, with the values of a served model."""
        from ejkernel.types import MaskInfo

        return {
            "mask_info": MaskInfo.from_segments(jnp.ones((1, num_tokens), jnp.int32)),
            "bias": None,
            "sliding_window": None,
            "init_bias": _nothing,
            "causal": True,
            "deterministic": True,
            "dropout_rng": None,
            "softmax_scale": case.softmax_scale,
            "logits_soft_cap": None,
            "dropout_prob": 0.0,
            "precision": jax.lax.Precision.DEFAULT,
            "prevent_cse": True,
            "cum_seqlens_q": None,
            "cum_seqlens_k": None,
            "normalize_output": True,
            "fused_backward": False,
            "compute_dtype": compute_dtype,
            "optimized": False,
            "mask_value": None,
            "vmem_limit_bytes": None,
            "policy": jax.checkpoint_policies.nothing_saveable,
            **case.options.keywords(),
        }

    def expected(self, batch: Batch, outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's output and pages for a call on ``batch``."""
        return batch.expected()

    def call(
        self,
        batch: Batch,
        *,
        method: str = "__call__",
        compute_dtype: Any = None,
        forwarding_view: bool = False,
        host_writes: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> Outcome:
        """Run the operation on ``batch`` inside ``jax.jit``, with the cache donated.

        Args:
            batch: what to run.
            method: method to call; forward methods get three-dimensional arrays, as the host gives them.
            compute_dtype: what the host passes under that name.
            forwarding_view: pass a :class:`ForwardingView`.
            host_writes: for v2, the host's view writes the new tokens, not the oracle.
            extra: more keyword arguments.
        """
        case, operation = batch.case, self.instance(batch.case.np_dtype)
        flat = method != "__call__"
        key = (
            method,
            None if compute_dtype is None else np.dtype(compute_dtype).name,
            forwarding_view,
            host_writes,
            case.dtype,
            case.softmax_scale,  # a number that is part of the program; by default it follows from head_dim
            case.options,
            tuple(sorted((extra or {}).items())),
        )
        if key not in self._programs:
            facts: dict[str, Any] = {}

            def program(
                view: Any, metadata: Any, query: Any, key: Any, value: Any, sinks: Any, scales: dict[str, Any]
            ) -> tuple[Any, Any]:
                # Cases of other shapes trace this again, so shapes come from the arguments.
                arguments = self.arguments(case, query.shape[1], compute_dtype)
                if host_writes:
                    view = view.concatenate_to_cache(key=key, value=value, cache_metadata=metadata)
                if flat:
                    query, key, value = (a[0] for a in (query, key, value))
                given = ForwardingView(view) if forwarding_view else view
                output = getattr(operation, method)(
                    query=query,
                    key=key,
                    value=value,
                    cache_view=given,
                    cache_metadata=metadata,
                    softmax_aux=sinks,
                    **arguments,
                    **scales,
                    **(extra or {}),
                )
                returned = output.cache_view
                facts["view"] = "none" if returned is None else "same" if returned is given else "other"
                return output.attention_outputs, view.kv_pages

            self._programs[key] = (jax.jit(program, donate_argnums=0), facts)
        compiled, facts = self._programs[key]
        pages = batch.pages if self.version == "v3" or host_writes else batch.updated_pages
        with self.mesh:
            output, new_pages = compiled(
                self.view(batch, pages),
                self.metadata(batch),
                *(jnp.array(a[None]) for a in (batch.queries, batch.keys, batch.values)),
                None if batch.sinks is None else jnp.array(batch.sinks),
                {name: jnp.array(scale) for name, scale in batch.scales.items()},
            )
        result = np.asarray(output)
        return Outcome(
            output=result.reshape(batch.queries.shape) if result.size == batch.queries.size else result,
            output_shape=result.shape,
            output_dtype=result.dtype,
            pages=np.asarray(new_pages),
            returned_view=facts["view"],
        )
