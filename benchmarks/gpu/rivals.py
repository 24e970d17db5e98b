"""The contestants: this package's kernels, the host's, JAX's and cuDNN's, each in the form of cache that it takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

# ejkernel would time 100 runs of each of its candidates inside of the first call.
os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.bench.timing import Step
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.kernels import ejkernel, xla
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU

OURS = "pallas_gpu"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """``prepare`` gives the problem in the form of cache that it wants, and the call; or says why it can't."""

    name: str
    version: Any
    prepare: Callable[[Problem, bool], tuple[Problem, Step] | str]


def of_kernel(kernel: Any, config: RaggedPageConfig) -> Callable[[Problem, bool], tuple[Problem, Step] | str]:
    def prepare(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
        chosen, how = kernel, config
        if dry and isinstance(kernel, PallasGPU):
            chosen = PallasGPU(interpret=True)
        elif dry and config.platform == "triton":  # there is no interpreter for these: what the host has for a CPU
            how = dataclasses.replace(config, platform="xla")
        refusal = chosen.refuses(problem.request)
        return refusal or (problem, lambda operands: chosen.forward(problem.request, how, operands)[:2])

    return prepare


def unified_attention(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """What EasyDeL recommends on a GPU. Keys and values lie in two arrays there."""
    if importlib.util.find_spec("ejkernel") is None:
        return "ejkernel is not installed (it comes with EasyDeL)"
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


TRITON = RaggedPageConfig(platform="triton")
CONTESTANTS = (
    Contestant(OURS, "v2", of_kernel(PallasGPU(), RaggedPageConfig())),
    Contestant(OURS, "v3", of_kernel(PallasGPU(), RaggedPageConfig())),
    Contestant("xla", "v2", of_kernel(xla.KERNEL, RaggedPageConfig())),
    Contestant("unified_attention", "v2", unified_attention),
    Contestant("ejkernel", "v2", of_kernel(ejkernel.KERNEL, TRITON)),
    Contestant("ejkernel", "v3", of_kernel(ejkernel.KERNEL, TRITON)),
    Contestant("jax paged_attention", "v2", jax_paged_attention),
    Contestant("cudnn", "v2", cudnn),
)
