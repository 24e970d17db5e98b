"""The host's own kernels, called as the host's own operations call them.

It runs when it is named, so that the host's kernels stay available, with the faults that docs/kernels.md lists. What
they get wrong on a TPU, and can be known before the call, is refused: :func:`refused_on_tpu`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.layout import packing
from easydel_ragged_plugin.turboquant import FORMAT as TURBOQUANT
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands

__all__ = ["KERNEL", "EjkernelKernel"]

PALLAS_V2_HEAD_DIMS = (128, 256)
"""head_dims that the v2 TPU kernel can tile; the host's operation uses XLA for all others."""

WIDE_HEAD_DIM = 256
WIDE_HEAD_PAGES = 8
"""From this head_dim on, more pages in a block than this exceed 16 MiB of scoped VMEM on TPU (the host's own cap)."""


FIRST_WITH_ROOM = 6
"""Generation of TPU whose scoped VMEM (32 MiB; 16 MiB before) holds the buffers of every kernel of v3."""
KIB = 1024
SMEM_BYTES, SMEM_BYTES_BEFORE = 2048 * KIB, 1024 * KIB
"""Memory for scalars from that generation on, and before. The kernel of v3 keeps the block table there."""
SMEM_OF_OTHERS = 16 * KIB


def unavailable() -> str | None:
    """Why there is no ejkernel, or None. Imports nothing."""
    return None if importlib.util.find_spec("ejkernel") else "ejkernel is not installed (it comes with EasyDeL)"


class EjkernelKernel(Kernel):
    """ejkernel's ``ragged_page_attention_v2`` and ``_v3``."""

    name = "ejkernel"
    platforms = frozenset({"cpu", "gpu", "tpu"})
    technologies = frozenset({"pallas", "triton", "cuda", "cute", "xla"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "logits_soft_cap",
                "k_scale",  # only v3
                "v_scale",  # only v3
                "sinks",
                "compute_dtype",  # only v2
                "vmem_limit_bytes",
            }
        ),
        cache_formats=frozenset({"plain", TURBOQUANT.name}),
    )
    label = "EasyDeL"
    color = "#c9742b"
    is_hosts = True

    def facts(self) -> dict[str, Any]:
        """Its version."""
        reason = unavailable()
        if reason is not None:
            return {"available": False, "reason": reason}
        return {"available": True, "reason": None, "version": metadata.version("ejkernel")}

    def refuses(self, request: AttentionRequest) -> str | None:
        """Calls that ejkernel's functions can't run; on TPU also those that they get wrong."""
        reason = unavailable()
        if reason is not None:
            return reason
        requested = request.requested_options()
        if request.cache_format == TURBOQUANT:
            if importlib.util.find_spec("ejkernel.kernels._xla.ragged_page_attention_v3_turboquant") is None:
                return "this ejkernel reads no TurboQuant cache; that of EasyDeL 0.3.0 does"
            if "compute_dtype" in requested:
                return "takes no compute_dtype with a TurboQuant cache"
            if request.platform == "tpu" and request.options.window is not None:
                return "sliding_window: wrong with a TurboQuant cache for every query of a row but its last"
            return None
        if request.cache_dtype.name == "int8":
            return "an int8 cache; takes float dtypes"
        if request.version == "v2":
            scales = [name for name in ("k_scale", "v_scale") if name in requested]
            if scales:
                return f"v2 takes no {', '.join(scales)}"
            return refused_on_tpu(request) if request.platform == "tpu" else None
        if "compute_dtype" in requested:
            return "v3 takes no compute_dtype"
        if request.page_size % packing(request.cache_dtype):
            return f"v3 needs a page_size that {packing(request.cache_dtype)} divides, got {request.page_size}"
        if request.platform == "tpu":
            return refused_on_tpu(request)
        return "v3 runs head_dim 64 on TPU alone" if request.head_dim == 64 else None

    def only_by_name(self, request: AttentionRequest) -> str | None:
        """On a TPU always: see :func:`refused_on_tpu` for what is known."""
        return "where its answers are wrong is not known before the call" if request.platform == "tpu" else None

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        if request.cache_format == TURBOQUANT:
            return turboquant_forward(request, config, operands)
        from ejkernel.modules import ragged_page_attention_v2, ragged_page_attention_v3

        # Entries past a context may hold any number, and these kernels read ahead.
        block_tables = jnp.clip(operands.block_tables, 0, request.num_pages - 1)
        options: dict[str, Any] = {
            "softmax_scale": request.softmax_scale,
            "logits_soft_cap": request.options.soft_cap,
            "sliding_window": request.options.window,
            "vmem_limit_bytes": request.options.vmem_limit_bytes,
            "cfg": host_config(request, config),
            "platform": host_platform(request, config),
        }
        if request.version == "v2":
            if options["platform"] != "pallas":  # that kernel accepts no dtype: it computes in the inputs'
                options |= {"compute_dtype": request.compute_dtype.type, "optimized": request.options.optimized}
            output = ragged_page_attention_v2(
                operands.queries,
                operands.pages,
                operands.context_lens,
                block_tables,
                operands.query_start_loc,
                operands.distribution[2:],
                operands.sinks,
                **options,
            )
            return Attended(output, operands.pages)
        assert operands.keys is not None
        assert operands.values is not None
        output, pages = ragged_page_attention_v3(
            operands.queries,
            operands.keys.astype(request.cache_dtype),
            operands.values.astype(request.cache_dtype),
            operands.pages,
            operands.context_lens,
            block_tables.reshape(-1),
            operands.query_start_loc,
            operands.distribution,
            None if operands.sinks is None else operands.sinks.astype(jnp.float32),
            q_scale=request.options.q_scale,
            k_scale=request.options.k_scale,
            v_scale=request.options.v_scale,
            **options,
        )
        return Attended(output, pages)


def tpu_generation() -> int:
    """Generation of this process's TPU; 0 where there is none, as on a machine that lowers for one."""
    if jax.default_backend() != "tpu":
        return 0
    found = re.search(r"TPU ?v?(\d+)", jax.devices()[0].device_kind)
    return int(found[1]) if found else 0


def refused_on_tpu(request: AttentionRequest) -> str | None:
    """Calls that ejkernel's TPU kernels get wrong or do not compile for; an unknown TPU is taken for a small one.

    Found by compiling for described TPUs (v5e, v5p, v6e, 7x) and in Pallas' TPU interpreter, with ejkernel 0.0.78.
    """
    if request.version == "v2":
        return "v2 on TPU: its kernel needs more VMEM than there is for block tables of more than a few pages"
    if request.options.window is not None:
        return "sliding_window: v3 on TPU is wrong with head_dim 64, and leaves slots of new tokens unwritten"
    if request.query_dtype.name == "float16":
        return "float16 queries: v3 does not compile for them on TPU; takes float32 and bfloat16"
    if request.options.sinks and request.group_size % packing(request.query_dtype):
        return f"sinks: v3 on TPU takes an even number of query heads for a kv head, got {request.group_size}"
    has_room = tpu_generation() >= FIRST_WITH_ROOM
    if not has_room and (request.cache_dtype.itemsize == 1 or request.layout.padded_head_dim != 128):
        return (
            f"head_dim {request.head_dim} with a {request.cache_dtype.name} cache: v3 needs more than the 16 MiB of "
            "VMEM of a TPU before v6e; there it takes head_dims up to 128 other than 64, and caches of 16 and 32 bits"
        )
    table = 4 * request.num_rows * request.pages_per_row
    if table + SMEM_OF_OTHERS > (SMEM_BYTES if has_room else SMEM_BYTES_BEFORE):
        return f"v3 on TPU keeps the block table in memory for scalars, which has no room for {table} bytes"
    return None


def turboquant_forward(request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
    """The host's calls for TurboQuant caches. ejkernel has them in XLA only, so ``platform`` is that."""
    from ejkernel.modules.operations.ragged_page_attention_v2_turboquant import ragged_page_attention_v2_turboquant
    from ejkernel.modules.operations.ragged_page_attention_v3_turboquant import ragged_page_attention_v3_turboquant

    pages = operands.pages
    constants = pages.constants
    block_tables = jnp.clip(operands.block_tables, 0, request.num_pages - 1)
    options: dict[str, Any] = {
        "softmax_scale": request.softmax_scale,
        "logits_soft_cap": request.options.soft_cap,
        "sliding_window": request.options.window,
        "bits": (constants.value_codebook.shape[0] - 1).bit_length(),
        "qjl_dim": constants.projection.shape[0],
        "cfg": host_config(request, config),
        "platform": "xla",
    }
    index = (operands.context_lens, block_tables, operands.query_start_loc)
    if request.version == "v2":
        output = ragged_page_attention_v2_turboquant(
            operands.queries, *pages.arrays, *index, operands.distribution[2:], *constants, operands.sinks, **options
        )
        return Attended(output, pages)
    index = (operands.context_lens, block_tables.reshape(-1), operands.query_start_loc)
    output, *arrays = ragged_page_attention_v3_turboquant(
        operands.queries,
        operands.keys,
        operands.values,
        *pages.arrays,
        *index,
        operands.distribution,
        *constants,
        operands.sinks,
        **options,
    )
    return Attended(output, pages.with_arrays(arrays))


def host_platform(request: AttentionRequest, config: RaggedPageConfig) -> str:
    """ejkernel's argument ``platform``, a technology: the config's, or else the one that the host's rule gives."""
    if config.platform != "auto":
        return config.platform
    if request.platform != "tpu":
        return "auto"
    if request.version == "v2" and request.head_dim not in PALLAS_V2_HEAD_DIMS:
        return "xla"
    return "pallas"


def host_config(request: AttentionRequest, config: RaggedPageConfig) -> Any:
    """The config as ejkernel's class; None where none was given and no field is set, so that ejkernel tunes."""
    from ejkernel.modules.operations.configs import RaggedPageAttentionv2Config, RaggedPageAttentionv3Config

    host_class: Any = RaggedPageAttentionv2Config if request.version == "v2" else RaggedPageAttentionv3Config
    if request.cache_format == TURBOQUANT:
        from ejkernel.modules.operations import configs

        host_class = getattr(configs, f"RaggedPageAttention{request.version}TurboQuantConfig")
    wanted = {field.name for field in dataclasses.fields(host_class)} - {"platform", "backend"}
    named = {name: getattr(config, name) for name in wanted if getattr(config, name, None) is not None}
    if request.platform == "tpu" and request.version == "v3" and request.head_dim >= WIDE_HEAD_DIM:
        named["num_kv_pages_per_block"] = min(named.get("num_kv_pages_per_block", WIDE_HEAD_PAGES), WIDE_HEAD_PAGES)
    if not named and config.backend == "any" and not config.from_host:
        return None
    return host_class(**named, platform=host_platform(request, config), backend=config.backend)


KERNEL = EjkernelKernel()
