"""Contestants: this package's kernels, EasyDeL's, JAX's and cuDNN's, each with the cache in its own form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contestants import Contestant, of_kernel
from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.bench.timing import Step
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.kernels import ejkernel, pallas_gpu, pallas_mosaic_gpu, xla

from .table import MOSAIC, OURS

IN_FULL = f"{OURS} and lists"


def unified_attention(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """What EasyDeL recommends on a GPU. Keys and values lie in two arrays there."""
    reason = ejkernel.unavailable()
    if reason is not None:
        return reason
    from ejkernel.modules import unified_attention as function

    case, pages = problem.case, problem.operands.pages
    apart: Any = (pages[:, :, 0::2], pages[:, :, 1::2])

    def step(operands: Any) -> Any:
        keys, values = operands.pages
        index = (operands.context_lens, operands.block_tables, operands.query_start_loc)
        output = function(
            operands.queries, keys, values, *index, None, None, operands.sinks,
            softmax_scale=case.softmax_scale, sliding_window=case.window, platform="xla" if dry else "triton",
        )  # fmt: skip
        return output, operands.pages

    return dataclasses.replace(problem, operands=problem.operands._replace(pages=apart)), step


def jax_paged_attention(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """JAX's own example of a paged decode kernel, in Triton, too. It does not scale the logits."""
    case = problem.case
    if any(row.new != 1 for row in case.rows) or case.window or case.sinks:
        return "takes decode rows without window and sinks"
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pages = problem.operands.pages
    apart: Any = tuple(jnp.moveaxis(pages[:, :, first::2], 2, 0) for first in (0, 1))
    width = case.pages_per_row
    splits = max(size for size in (1, 2, 4, 8, 16) if width % size == 0)
    block = max(size for size in (1, 2, 4, 8) if (width // splits) % size == 0)

    def step(operands: Any) -> Any:
        keys, values = operands.pages
        queries = (operands.queries * case.softmax_scale).astype(operands.queries.dtype)
        output = paged_attention(
            queries, keys, values, operands.block_tables, operands.context_lens,
            k_splits=splits, pages_per_compute_block=block, interpret=dry,
        )  # fmt: skip
        return output.astype(operands.queries.dtype), operands.pages

    return dataclasses.replace(problem, operands=problem.operands._replace(pages=apart)), step


def cudnn(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """cuDNN's attention over dense keys and values: what paging costs, and what the card gives a prompt."""
    case = problem.case
    if len(case.rows) != 1 or case.rows[0].context != case.rows[0].new or case.window or case.sinks:
        return "dense: takes one whole prompt without window and sinks"
    flat = problem.operands.pages[problem.tables[0][0]].reshape(-1, 2 * case.kv_heads, case.head_dim)
    dense: Any = tuple(flat[: case.num_tokens, first::2] for first in (0, 1))

    def step(operands: Any) -> Any:
        output = jax.nn.dot_product_attention(
            operands.queries[None], *(each[None] for each in operands.pages), scale=case.softmax_scale, is_causal=True,
            implementation="xla" if dry else "cudnn",
        )  # fmt: skip
        return output[0], operands.pages

    # The one dense cache serves for every block table: it is the first one's.
    tables = problem.tables[:1]
    return dataclasses.replace(problem, operands=problem.operands._replace(pages=dense), tables=tables), step


EASYDEL = ejkernel.KERNEL.name
INTERPRETED = pallas_gpu.PallasGPU(interpret=True)
TRITON, XLA = RaggedPageConfig(platform="triton"), RaggedPageConfig(platform="xla")
OWN, OWN_IN_FULL, OWN_IN_MOSAIC, HOSTS = (
    of_kernel(pallas_gpu.KERNEL, interpreted=INTERPRETED, prepared=True),
    of_kernel(pallas_gpu.KERNEL, interpreted=INTERPRETED),
    of_kernel(pallas_mosaic_gpu.KERNEL, interpreted=pallas_mosaic_gpu.PallasMosaicGPU(interpret=True), prepared=True),
    # There is no interpreter for these: in a dry run it is what EasyDeL has for a CPU.
    of_kernel(ejkernel.KERNEL, TRITON, dry_config=XLA),
)
TRITON_V2 = Contestant(OURS, "v2", "this package, v2", "#0f766e", OWN)
TRITON_V3 = Contestant(OURS, "v3", "this package, v3", "#3aa99f", OWN)
UNIFIED = Contestant("unified_attention", "v2", "EasyDeL unified_attention", "#c9742b", unified_attention)
CUDNN = Contestant("cudnn", "v2", "cuDNN, dense", "#8c6bb1", cudnn)
CONTESTANTS = {
    OURS: (
        TRITON_V2,
        TRITON_V3,
        # In these a call makes its lists of work, too, as each trip of a loop over layers does without `prepare`.
        Contestant(IN_FULL, "v2", "this package, v2, with its lists", "#0b544e", OWN_IN_FULL),
        Contestant(IN_FULL, "v3", "this package, v3, with its lists", "#2c7f79", OWN_IN_FULL),
        Contestant(xla.KERNEL.name, "v2", "this package, XLA", "#b5ded9", of_kernel(xla.KERNEL)),
        UNIFIED,
        Contestant(EASYDEL, "v2", "EasyDeL, v2", "#e0a871", HOSTS),
        Contestant(EASYDEL, "v3", "EasyDeL, v3", "#f0d2b4", HOSTS),
        Contestant("jax paged_attention", "v2", "JAX paged_attention", "#4f5d95", jax_paged_attention),
        CUDNN,
    ),
    # In a process of its own: where a barrier is wrong, it does not end.
    MOSAIC: (
        Contestant(MOSAIC, "v2", "this package, Mosaic, v2", "#7c3aed", OWN_IN_MOSAIC),
        Contestant(MOSAIC, "v3", "this package, Mosaic, v3", "#a78bfa", OWN_IN_MOSAIC),
        TRITON_V2,
        TRITON_V3,
        UNIFIED,
        CUDNN,
    ),
}
"""Who is measured beside each of this package's kernels, which the table's targets are for. It comes first."""
