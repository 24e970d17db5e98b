"""Prefill for Hopper: rows of many new tokens in Pallas' Mosaic GPU, all others as in ``pallas_gpu``.

========== =====================================================================================================
sizes.py   what a program holds
attend.py  the kernel of long rows: a warpgroup that copies pages by TMA, two that multiply by ``wgmma`` in turn
settle.py  what follows it, in Triton: logsumexps to their places, queries with NaN once more
========== =====================================================================================================

The update of v3's pages, the rows with few new tokens and the work lists are those of ``pallas_gpu``. Names of Pallas'
Mosaic GPU backend are used in this folder alone, and imported when a call is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import pallas_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.rows import Rows, live_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands

from . import sizes

if TYPE_CHECKING:
    from easydel_ragged_plugin.kernels.pallas_gpu.attend import Results

__all__ = ["KERNEL", "LongRows", "PallasMosaicGPU"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
CAPABILITY = (9, 0)
"""The only one with ``wgmma``. For any other the compiler does not refuse the program: it ends the process."""

OLDEST_JAX = (0, 9, 2)

ASSEMBLERS = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")
"""Packages that bring ptxas, NVIDIA's assembler, to JAX."""
MISCOMPILED = ("12.8", "12.9")
"""Versions of CUDA whose ptxas miscompiles causal masks, according to JAX's own attention kernel for Hopper
(``jax/experimental/pallas/ops/gpu/attention_mgpu.py``). It names 12.8.0 to 12.9.1, which all say 12.8 or 12.9 of
themselves, and refuses them, too."""


@dataclasses.dataclass(frozen=True)
class LongRows:
    """Which rows the Mosaic kernel takes.

    Attributes:
        more_than: those with more new tokens; all others are decoded as in ``pallas_gpu``. At most the tokens that a
            tile of its decode kernel holds, 16 queries unless tuned. None for exactly these.
    """

    more_than: int | None = None

    def __post_init__(self) -> None:
        if self.more_than is not None and (not isinstance(self.more_than, int) or self.more_than < 0):
            raise ValueError(f"more_than: got {self.more_than!r}, wanted None or an int of at least 0.")


class PallasMosaicGPU(Kernel):
    """Ragged page attention v2 and v3 on NVIDIA Hopper.

    ``RaggedPageConfig(kernel_config=LongRows(...))`` says which rows are long. The other fields of a config size the
    tiles of the decode kernel, as in ``pallas_gpu``.

    Args:
        interpret: run on any platform, slowly, in JAX's interpreter for GPUs: what the tests on a CPU do.
    """

    name = "pallas_mosaic_gpu"
    platforms = frozenset({"gpu"})
    technologies = frozenset({"mosaic", "pallas"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "k_scale",
                "v_scale",
                "sinks",
                "update_pages",
                "vmem_limit_bytes",  # a TPU's; it uses none
            }
        ),
        results=frozenset({"lse"}),
    )
    custom_calls = (*pallas_gpu.KERNEL.custom_calls, "mosaic_gpu_v2")
    label = "Mosaic (this package)"
    color = "#7c3aed"
    config_type = LongRows

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret
        self.others = pallas_gpu.PallasGPU(interpret=interpret)
        if interpret:
            self.platforms = self.platforms | {"cpu"}

    def refuses(self, request: AttentionRequest) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.refuses`."""
        reason = self._not_here() or not_its_shape(request) or self.others.refuses(request)
        if reason is None and request.num_tokens <= self._more_than(request, RaggedPageConfig()):
            return f"{request.num_tokens} tokens in all: no row has so many that it is not decoded"
        return reason

    def _not_here(self) -> str | None:
        """Why it can't run in this process, or None."""
        if jax.__version_info__ < OLDEST_JAX or importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
            return f"needs Pallas' Mosaic GPU backend as JAX 0.9.2 and later have it, this is JAX {jax.__version__}"
        if (self.interpret or jax.__version_info__ < (0, 12)) and importlib.util.find_spec("absl") is None:
            return "Pallas' Mosaic GPU backend imports absl-py, which is not installed; pip install absl-py"
        if self.interpret:
            if jax.__version_info__ < (0, 12):
                return f"JAX's interpreter for GPUs runs it from 0.12 on, this is JAX {jax.__version__}"
            return None
        capability = tiles.card()[1].capability
        if capability != CAPABILITY:
            found = "an unknown one" if capability is None else ".".join(map(str, capability))
            return f"takes compute capability {'.'.join(map(str, CAPABILITY))} alone (Hopper), this is {found}"
        return miscompiles()

    def _more_than(self, request: AttentionRequest, config: RaggedPageConfig) -> int:
        """Rows with more new tokens than that are long."""
        others = tiles.choose(request, dataclasses.replace(config, kernel_config=None))
        most = others.decode.queries // request.group_size
        if config.kernel_config is None or config.kernel_config.more_than is None:
            return most
        wanted: int = config.kernel_config.more_than
        if wanted > most:
            raise Unsupported(
                f"{self.name}: rows with up to {wanted} new tokens are to be decoded (LongRows.more_than), tiles of "
                f"{others.decode.queries} queries hold {most} tokens of {request.group_size} query heads for a kv "
                "head. Lower more_than, or leave it to the kernel."
            )
        return wanted

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        others = tiles.choose(request, dataclasses.replace(config, kernel_config=None))
        with jax.named_scope("ragged_page_attention_mosaic_gpu"):
            # Not all of a row's tiles look at its pages, so a row that lacks one is taken out beforehand.
            rows = live_rows(request, operands)
            pages = operands.pages
            if operands.keys is not None:
                pages = self.others.update(request, others, rows, operands)
            results = self._attend(request, config, others, rows, operands._replace(pages=pages))
            # No kernel stores the output of a token of no live row.
            live = tokens_of_rows(request, rows)
            output = jnp.where(live[:, None, None], results.output, jnp.zeros((), request.query_dtype))
        return Attended(output, pages, results.lse)

    def _attend(
        self, request: AttentionRequest, config: RaggedPageConfig, others: tiles.Tiles, rows: Rows, operands: Operands
    ) -> Results:
        """Attention over pages that are up to date; anything in the output of tokens of no live row."""
        from easydel_ragged_plugin.kernels.pallas_gpu.attend import Extras, Results, attend_decode
        from easydel_ragged_plugin.kernels.pallas_gpu.merge import merge_parts
        from easydel_ragged_plugin.kernels.pallas_gpu.work import decode_work, query_work

        from .attend import attend_long_rows
        from .settle import settle

        own = sizes.choose(request)
        assert own is not None  # refuses() has seen to it
        more_than = self._more_than(request, config)
        pages, tables, sinks = operands.pages, operands.block_tables, operands.sinks
        slots = pages.reshape(request.num_pages, request.page_size, request.layout.token_stride)
        arrays = (operands.queries, slots, tables)
        sinks = None if sinks is None else sinks.astype(jnp.float32)

        work = query_work(request, rows, own.tile_tokens, more_than)
        output, logsumexps = attend_long_rows(
            request, own, work, operands.queries, pages, tables, sinks, self.interpret
        )
        shape = (request.num_tokens, request.num_q_heads)
        lse = jnp.full(shape, -jnp.inf, jnp.float32) if request.return_lse else None
        results = settle(request, own, work, logsumexps, arrays, sinks, Results(output, lse), self.interpret)
        if more_than:
            extras = Extras(sinks, None, None)
            parts = decode_work(request, others, rows, more_than)
            results, partials = attend_decode(request, others.decode, parts, arrays, extras, results, self.interpret)
            if parts.merges is not None:
                results = merge_parts(request, parts.merges, partials, extras, results, self.interpret)
        return results

    def facts(self) -> dict[str, Any]:
        """Why it can't run here, where it can't; and the GPU."""
        reason = self._not_here()
        return {"available": reason is None, "reason": reason, "card": tiles.card()[0] or None}

    def fingerprint(self) -> str:
        """With what the kernel of few tokens depends on."""
        return f"{super().fingerprint()}, with {self.others.fingerprint()}"


def tokens_of_rows(request: AttentionRequest, rows: Rows) -> jax.Array:
    """``[tokens]``: whether any row has the token."""
    token = jnp.arange(request.num_tokens, dtype=jnp.int32)[:, None]
    start, end = rows.query_start[None, :], (rows.query_start + rows.num_queries)[None, :]
    return jnp.any((token >= start) & (token < end), axis=1)


def not_its_shape(request: AttentionRequest) -> str | None:
    """Why the kernel of long rows does not take these shapes and dtypes, or None."""
    for what, dtype in (("queries", request.query_dtype), ("compute_dtype", request.compute_dtype)):
        if dtype.name not in DTYPES:
            return f"{what}: {dtype.name}; takes {', '.join(DTYPES)}"
    if request.cache_dtype != request.compute_dtype:
        return f"cache: {request.cache_dtype.name}; takes that of the queries, {request.query_dtype.name}"
    if request.head_dim not in HEAD_DIMS:
        return f"head_dim {request.head_dim}; takes {', '.join(map(str, HEAD_DIMS))}"
    if request.page_size not in PAGE_SIZES:
        return f"page_size {request.page_size}; takes {', '.join(map(str, PAGE_SIZES))}"
    if sizes.choose(request) is None:
        return f"{request.group_size} query heads for a kv head; takes 1 to 8, and multiples of 8 up to 64"
    return None


def miscompiles() -> str | None:
    """Why the assembler that compiles for this process's GPU can't be trusted, or None."""
    for name in ASSEMBLERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            return of_cuda(".".join(version.split(".")[:2]), f"{name} {version}")
    found = re.search(r"\bcuda (\d+)", jax.local_devices()[0].client.platform_version)
    if found is None:
        return "the version of CUDA is unknown; the ptxas of some miscompiles it"
    number = int(found[1])  # 12080 is 12.8
    return of_cuda(f"{number // 1000}.{number % 1000 // 10}", f"CUDA {number}")


def of_cuda(version: str, source: str) -> str | None:
    """Why ptxas of a version of CUDA can't be trusted, or None."""
    if version not in MISCOMPILED:
        return None
    return f"ptxas of CUDA {version} ({source}) miscompiles causal masks; install another one, such as CUDA 13"


KERNEL = PallasMosaicGPU()
