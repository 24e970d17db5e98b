"""Contestants: this package's kernels, EasyDeL's, JAX's and cuDNN's, each with the cache in its own form."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

# EasyDeL's kernels would time 100 runs of each of their candidates inside of the first call.
os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.bench.timing import Step
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.kernels import ejkernel, pallas_gpu, xla
from easydel_ragged_plugin.types import Kernel, Version

Prepare = Callable[[Problem, bool], tuple[Problem, Step] | str]
"""The problem with the cache in a contestant's own form, and the call; or why there is none."""

OURS = pallas_gpu.KERNEL.name
"""Whom the table's targets are for."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A contestant. ``label`` and ``color`` are those of the picture."""

    name: str
    version: Version
    label: str
    color: str
    prepare: Prepare


def of_kernel(kernel: Kernel, config: RaggedPageConfig) -> Prepare:
    def prepare(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
        chosen, how = kernel, config
        tuning = kernel.tuning()
        if dry and tuning is not None and tuning.interpreted is not None:
            chosen = tuning.interpreted
        elif dry and config.platform == "triton":  # there is no interpreter for these: what EasyDeL has for a CPU
            how = dataclasses.replace(config, platform="xla")
        refusal = chosen.refuses(problem.request)
        return refusal or (problem, lambda operands: chosen.forward(problem.request, how, operands)[:2])

    return prepare


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
AUTO, TRITON = RaggedPageConfig(), RaggedPageConfig(platform="triton")
CONTESTANTS = (
    Contestant(OURS, "v2", "this package, v2", "#0f766e", of_kernel(pallas_gpu.KERNEL, AUTO)),
    Contestant(OURS, "v3", "this package, v3", "#3aa99f", of_kernel(pallas_gpu.KERNEL, AUTO)),
    Contestant(xla.KERNEL.name, "v2", "this package, XLA", "#b5ded9", of_kernel(xla.KERNEL, AUTO)),
    Contestant("unified_attention", "v2", "EasyDeL unified_attention", "#c9742b", unified_attention),
    Contestant(EASYDEL, "v2", "EasyDeL, v2", "#e0a871", of_kernel(ejkernel.KERNEL, TRITON)),
    Contestant(EASYDEL, "v3", "EasyDeL, v3", "#f0d2b4", of_kernel(ejkernel.KERNEL, TRITON)),
    Contestant("jax paged_attention", "v2", "JAX paged_attention", "#4f5d95", jax_paged_attention),
    Contestant("cudnn", "v2", "cuDNN, dense", "#8c6bb1", cudnn),
)
