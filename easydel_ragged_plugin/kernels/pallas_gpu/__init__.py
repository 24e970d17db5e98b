"""GPU kernels in Pallas, lowered by Triton: one code for v2, v3 and v3 with head_dim 64.

========== =====================================================================================================
tiles.py   sizes of tiles: tables, what was tuned, and what fits a card
tuning.py  what can be tuned: candidates, and the file of winners
work.py    which row, and which part of it, each program takes
attend.py  the attention kernels
merge.py   the kernel that joins the parts of split contexts
update.py  the kernel that writes v3's new keys and values
blocks.py  what the kernels read: queries, keys and values
softmax.py the online softmax
call.py    how a kernel is called, and what it fills
========== =====================================================================================================

Pallas' Triton backend is deprecated since JAX 0.11 and still there in 0.12. Its names are used in this folder alone,
and imported when a GPU needs them.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.rows import plausible_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands, Tuning
from easydel_ragged_plugin.writes import to_cache_dtype

from . import tiles
from .tiles import MOST_QUERIES, Tiles
from .work import Work, work_of

if TYPE_CHECKING:
    from .call import Results

__all__ = ["KERNEL", "PallasGPU"]

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*COMPUTE_DTYPES, "float8_e4m3fn", "float8_e5m2")
MOST_HEAD_DIM = 256

LEAST_CAPABILITY = (8, 0)
LEAST_CAPABILITY_FLOAT8_E4M3 = (8, 9)
"""NVIDIA cards below it have no conversion from e4m3; that from e5m2 needs none."""


class PallasGPU(Kernel):
    """Ragged page attention v2 and v3 on NVIDIA and AMD GPUs.

    Tile sizes in place of those that it would choose go into ``RaggedPageConfig(kernel_config=Tiles(...))``.

    Args:
        interpret: run on any platform, slowly, in Pallas' interpreter: what the tests on a CPU do.
    """

    name = "pallas_gpu"
    platforms = frozenset({"gpu"})
    technologies = frozenset({"triton", "pallas"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "k_scale",
                "v_scale",
                "scale_arrays",
                "sinks",
                "compute_dtype",
                "update_pages",
                "vmem_limit_bytes",  # a TPU's; it uses none
            }
        ),
        results=frozenset({"lse"}),
    )
    custom_calls = ("__gpu$xla.gpu.triton",)
    label = "Triton (this package)"
    color = "#0f766e"
    config_type = Tiles

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret
        if interpret:
            self.platforms = self.platforms | {"cpu"}

    def refuses(self, request: AttentionRequest) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.refuses`."""
        if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
            return f"JAX {jax.__version__} has no Pallas backend for Triton"
        for what, dtype, known in (
            ("queries", request.query_dtype, COMPUTE_DTYPES),
            ("compute_dtype", request.compute_dtype, COMPUTE_DTYPES),
            ("cache", request.cache_dtype, CACHE_DTYPES),
        ):
            if dtype.name not in known:
                return f"{what}: {dtype.name}; takes {', '.join(known)}"
        if request.head_dim > MOST_HEAD_DIM:
            return f"head_dim {request.head_dim}, more than {MOST_HEAD_DIM}"
        if request.group_size > MOST_QUERIES:
            return f"{request.group_size} query heads for a kv head, more than {MOST_QUERIES}"
        elements = request.num_pages * request.layout.page_stride
        if 2**31 < elements <= 2**32 and request.cache_dtype.itemsize == 1:
            return (
                f"an 8-bit cache of {elements / 2**30:.2f} GiB: between 2 and 4 GiB Triton's offsets of 32 signed bits "
                "do not reach its end (above, they have 64)"
            )
        capability = tiles.card()[1].capability
        if capability is not None and not self.interpret:
            least = LEAST_CAPABILITY_FLOAT8_E4M3 if request.cache_dtype.name == "float8_e4m3fn" else LEAST_CAPABILITY
            if capability < least:
                version, wanted = (".".join(map(str, each)) for each in (capability, least))
                return f"a {request.cache_dtype.name} cache on compute capability {version}, less than {wanted}"
        return tiles.too_large(request)

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        sizes = tiles.choose(request, config)
        with jax.named_scope("ragged_page_attention_gpu"):
            work = self.prepare(request, config, operands) if operands.work is None else operands.work
            pages = operands.pages
            if operands.keys is not None:
                pages = self.update(request, sizes, work, operands)
            results = self.attend(request, sizes, work, operands._replace(pages=pages))
        return Attended(results.output, pages, results.lse)

    def prepare(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Work:
        """The lists of work. See :meth:`easydel_ragged_plugin.types.Kernel.prepare`."""
        return work_of(request, tiles.choose(request, config), plausible_rows(request, operands))

    def facts(self) -> dict[str, Any]:
        """The GPU, and for how many geometries its tile sizes were measured on it."""
        if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
            return {"available": False, "reason": f"JAX {jax.__version__} has no Pallas backend for Triton"}
        name, _ = tiles.card()
        return {"available": True, "reason": None, "card": name or None, "tuned": len(tiles.tuned_here())}

    def fingerprint(self) -> str:
        """With the GPU and the tile sizes that were tuned on it: they decide about the order of sums."""
        name, _ = tiles.card()
        if not name:
            return super().fingerprint()
        tuned = ", ".join(f"{key}: {sizes}" for key, sizes in sorted(tiles.tuned_here().items()))
        return f"{super().fingerprint()} on {name}, tuned: {tuned or 'nothing'}"

    def notes(self, platform: str) -> tuple[str, ...]:
        """On a GPU whose tiles have not been tuned, that they can be."""
        if platform != "gpu" or tiles.tuned_here():
            return ()
        return (
            f"The kernel {self.name} has tile sizes from a built-in table, which has not been measured. "
            "'easydel-ragged tune' finds those of this GPU.",
        )

    def tuning(self) -> Tuning:
        """The sizes of the tiles."""
        from .tuning import TileTuning

        return TileTuning(interpreted=PallasGPU(interpret=True), interpret=self.interpret)

    def update(self, request: AttentionRequest, sizes: Tiles, work: Work, operands: Operands) -> jax.Array:
        """The pages with the new keys and values of live tokens, in the same memory where they are donated."""
        from .update import update_pages

        assert operands.keys is not None  # for v3, api.py made both
        assert operands.values is not None
        assert work.update is not None
        keys, values = (to_cache_dtype(array, request) for array in (operands.keys, operands.values))
        pages = update_pages(
            request, sizes.update_tokens, work.update, keys, values, operands.block_tables,
            _slots(request, operands.pages), self.interpret,
        )  # fmt: skip
        return pages.reshape(operands.pages.shape)

    def attend(self, request: AttentionRequest, sizes: Tiles, work: Work, operands: Operands) -> Results:
        """Attention over pages that are up to date."""
        from .attend import attend_decode, attend_prefill
        from .call import Extras
        from .merge import merge_parts

        arrays = (operands.queries, _slots(request, operands.pages), operands.block_tables)
        sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)
        extras = Extras(sinks, operands.k_scale, operands.v_scale)
        results, partials = attend_decode(request, sizes, work, arrays, extras, self.interpret)
        if work.merges is not None:
            results = merge_parts(request, work.merges, partials, extras, results, self.interpret)
        if work.prefill is not None:
            results = attend_prefill(request, sizes, work, arrays, extras, results, self.interpret)
        return results


def _slots(request: AttentionRequest, pages: jax.Array) -> jax.Array:
    """A view of the same memory, with the elements of a slot in one axis: the same form for every cache."""
    return pages.reshape(request.num_pages, request.page_size, request.layout.token_stride)


KERNEL = PallasGPU()
