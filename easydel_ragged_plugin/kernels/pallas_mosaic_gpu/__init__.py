"""Prefill for Hopper: rows of many new tokens in Pallas' Mosaic GPU, all others as in ``pallas_gpu``.

============ ===================================================================================================
sizes.py     what a program holds
work.py      which rows are long, and the lists of work
attend.py    the kernel of long rows: a warpgroup that copies pages by TMA, two that multiply by ``wgmma`` in turn
scratch.py   its tile, its shared memory and its barriers
copies.py    what it copies: pages, queries, output
softmax.py   its softmax, in registers
settle.py    what follows it, in Triton: logsumexps to their places, queries with NaN once more
assembler.py which versions of NVIDIA's assembler are there, and whether they can be trusted
verdicts.py  where it was tried, and whether it passed
============ ===================================================================================================

The update of v3's pages and the rows with few new tokens are left to ``pallas_gpu``. Names of Pallas'
Mosaic GPU backend are used in this folder alone, and imported when a call is traced.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import pallas_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.rows import plausible_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands, Trial
from easydel_ragged_plugin.varying import varying_axes

from . import assembler, sizes, verdicts
from .sizes import Sizes
from .work import LongWork, work_of

if TYPE_CHECKING:
    from easydel_ragged_plugin.kernels.pallas_gpu.call import Results

__all__ = ["KERNEL", "LongRows", "PallasMosaicGPU"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
CAPABILITY = (9, 0)
"""The only one with ``wgmma``. For any other the compiler does not refuse the program: it ends the process."""

OLDEST_JAX = (0, 9, 2)
FOLLOWS_AXES_JAX = (0, 10)
"""From then on JAX traces such a kernel inside of ``jax.shard_map`` with its defaults."""


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
    improves_on = pallas_gpu.KERNEL.name

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret
        self.others = pallas_gpu.PallasGPU(interpret=interpret)
        if interpret:
            self.platforms = self.platforms | {"cpu"}

    def refuses(self, request: AttentionRequest) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.refuses`."""
        reason = self._not_here() or not_its_shape(request) or self.others.refuses(request)
        if reason is None and jax.__version_info__ < FOLLOWS_AXES_JAX and follows_axes():
            return f"JAX {jax.__version__} can't trace it inside of jax.shard_map, unless with check_vma=False"
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
        return assembler.miscompiles()

    def only_by_name(self, request: AttentionRequest) -> str | None:
        """Unless a step is one of long rows by its shape, and a trial has passed on this card: see ``verdicts.py``.

        A step has no more tokens than its shape says. If these are more than all rows of the shape may have while each
        is decoded, then a full step has a long row, whichever way its tokens are shared out. With fewer tokens there
        may be none, as in a bucket for decoding: the step would pay for the second output of this kernel, and gain
        nothing.
        """
        tokens, rows = request.num_tokens, request.num_rows
        if tokens <= rows * self._more_than(request, RaggedPageConfig()):
            return f"it is for long rows, and a step of {tokens} tokens in {rows} rows may have none"
        return verdicts.against(request)

    def _more_than(self, request: AttentionRequest, config: RaggedPageConfig) -> int:
        """Rows with more new tokens than that are long."""
        others = tiles_of_others(request, config)
        most = others.decoded_tokens(request)
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
        others = tiles_of_others(request, config)
        with jax.named_scope("ragged_page_attention_mosaic_gpu"):
            work: LongWork = self.prepare(request, config, operands) if operands.work is None else operands.work
            pages = operands.pages
            if operands.keys is not None:
                pages = self.others.update(request, others, work.others, operands)
            operands = operands._replace(pages=pages)
            output: Any = jnp.zeros((), request.query_dtype)
            lse: Any = jnp.float32(-jnp.inf)
            if self._more_than(request, config):  # decode, which also gives that to tokens of no row
                output, lse = self.others.attend(request, others, work.others, operands)
            work = work.with_pages(request, operands.block_tables)
            long, of_long = self._attend_long_rows(request, work, operands), work.has_token(request)
            output = jnp.where(of_long[:, None, None], long.output, output)
            lse = jnp.where(of_long[:, None], long.lse, lse) if request.return_lse else None
        return Attended(output, pages, lse)

    def prepare(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> LongWork:
        """The lists of work. See :meth:`easydel_ragged_plugin.types.Kernel.prepare`."""
        own, more_than = sizes_of(request), self._more_than(request, config)
        others = tiles_of_others(request, config)
        return work_of(request, others, own.tile_tokens, more_than, plausible_rows(request, operands))

    def _attend_long_rows(self, request: AttentionRequest, work: LongWork, operands: Operands) -> Results:
        """Attention over pages that are up to date; anything for tokens that no tile of ``work`` has."""
        from easydel_ragged_plugin.kernels.pallas_gpu.call import Results

        from .attend import attend_long_rows
        from .settle import settle

        own, pages, sinks = sizes_of(request), operands.pages, operands.sinks
        sinks = None if sinks is None else sinks.astype(jnp.float32)
        output, logsumexps = attend_long_rows(
            request, own, work.tiles, operands.queries, pages, operands.block_tables, sinks, self.interpret
        )
        slots = pages.reshape(request.num_pages, request.page_size, request.layout.token_stride)
        arrays = (operands.queries, slots, operands.block_tables)
        shape = (request.num_tokens, request.num_q_heads)
        lse = jnp.full(shape, -jnp.inf, jnp.float32) if request.return_lse else None
        return settle(request, own, work.tiles, logsumexps, arrays, sinks, Results(output, lse), self.interpret)

    def facts(self) -> dict[str, Any]:
        """Why it can't run here, where it can't; the GPU, and the trials on it."""
        reason = self._not_here()
        tried = [f"{geometry}: {verdict}" for geometry, verdict in verdicts.here().items()]
        return {"available": reason is None, "reason": reason, "card": tiles.card()[0] or None, "tried": tried}

    def fingerprint(self) -> str:
        """With what the kernel of few tokens depends on, and the geometries for which it is chosen."""
        passed = [geometry for geometry, verdict in sorted(verdicts.here().items()) if verdict.in_force]
        chosen = f"chosen for: {', '.join(passed) or 'nothing'}"
        return f"{super().fingerprint()}, with {self.others.fingerprint()}, {chosen}"

    def notes(self, platform: str) -> tuple[str, ...]:
        """On a GPU that it is for, that it can be tried; on one that it was tried on, what has become of that."""
        if platform != "gpu":
            return ()
        reason, found = self._not_here(), verdicts.here()
        if reason is None and not found:
            return (
                f"The kernel {self.name}, for long rows on this GPU, has not been tried on it: 'easydel-ragged tune' "
                "tries it, and from then on it is chosen where it is right and faster.",
            )
        again = "'easydel-ragged tune' tries it again"
        why = {
            geometry: reason or (verdict.stale and f"that was {verdict.stale}; {again}")
            for geometry, verdict in found.items()
            if verdict.reason is None
        }
        return tuple(
            f"The kernel {self.name} passed its trial for {geometry}, and is not chosen now: {lost}."
            for geometry, lost in why.items()
            if lost is not None
        )

    def trial(self) -> Trial:
        """Its right answers, and its time on long rows beside that of ``pallas_gpu``."""
        return verdicts.HopperTrial(self.others, PallasMosaicGPU(interpret=True), interpret=self.interpret)


def tiles_of_others(request: AttentionRequest, config: RaggedPageConfig) -> tiles.Tiles:
    """Tiles of ``pallas_gpu``, whose own ``kernel_config`` has no place in a config of this kernel."""
    return tiles.choose(request, dataclasses.replace(config, kernel_config=None))


def follows_axes() -> bool:
    """Whether a call is traced inside of ``jax.shard_map`` with ``check_vma``, its default."""
    return any(varying_axes(jax.lax.axis_index(axis)) for axis in jax.sharding.get_abstract_mesh().manual_axes)


def sizes_of(request: AttentionRequest) -> Sizes:
    """Sizes of the kernel of long rows, for a request that is not refused."""
    found = sizes.choose(request)
    assert found is not None
    return found


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


KERNEL = PallasMosaicGPU()
