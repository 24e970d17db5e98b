"""Who is measured: a kernel in a form that can be called again and again, on a device or interpreted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

# EasyDeL's kernels would time 100 runs of each of their candidates inside of the first call.
os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")

import jax

from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.bench.timing import Step
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.types import Kernel, Version

Prepare = Callable[[Problem, bool], tuple[Problem, Step] | str]
"""The problem with the cache in a contestant's own form, and the call; or why there is none. The flag is for a dry
run."""

AUTO = RaggedPageConfig()


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A contestant. ``label`` and ``color`` are those of the picture."""

    name: str
    version: Version
    label: str
    color: str
    prepare: Prepare


def of_kernel(
    kernel: Kernel,
    config: RaggedPageConfig = AUTO,
    *,
    interpreted: Kernel | None = None,
    dry_config: RaggedPageConfig | None = None,
    prepared: bool = False,
) -> Prepare:
    """How a kernel of this package is called.

    Args:
        kernel: the kernel.
        config: its configuration.
        interpreted: what takes its place in a dry run.
        dry_config: what takes the configuration's place there.
        prepared: whether what the kernel computes of the rows alone is there before the call, as where a loop over
            layers gets it from ``easydel_ragged_plugin.prepare``.
    """

    def prepare(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
        chosen = interpreted if dry and interpreted is not None else kernel
        how = dry_config if dry and dry_config is not None else config
        request = problem.request
        refusal = chosen.refuses(request)
        if refusal is not None:
            return refusal
        if prepared:
            work = jax.jit(lambda operands: chosen.prepare(request, how, operands))(problem.operands)
            problem = dataclasses.replace(problem, operands=problem.operands._replace(work=work))
        return problem, lambda operands: chosen.forward(request, how, operands)[:2]

    return prepare
