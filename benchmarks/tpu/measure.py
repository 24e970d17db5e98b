"""What a process of its own does: the machine and its limits, or one contestant on one workload."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.contestants import Contestant
from benchmarks.limits import Limits, limits
from benchmarks.workloads import machine, shortened
from easydel_ragged_plugin.bench.problem import build, check, few_rows
from easydel_ragged_plugin.bench.timing import copies_beyond_cache, seconds_per_call
from easydel_ragged_plugin.bench.work import work
from easydel_ragged_plugin.kernels import pallas_tpu

from .table import Entry

__all__ = ["describe", "measure"]

LEAST_S = 2e-6
"""How long a call takes at least, for the number of calls that are timed together."""


def describe(dry: bool) -> dict[str, Any]:
    """Machine and limits; or, under ``refused``, why nothing can be measured here."""
    backend = jax.default_backend()
    if backend != "tpu" and not dry:
        return {
            "refused": f"This benchmark needs a TPU, and JAX's default backend is {backend!r}. Install JAX for it "
            "(pip install 'jax[tpu]'), or see the way it goes with --dry-run."
        }
    return {"machine": machine(pallas_tpu.KERNEL), "limits": dataclasses.asdict(limits(dry))}


def teach_interpreter() -> None:
    """Let Pallas' TPU interpreter run the kernel: of the refs that it uses, JAX's does not know all.

    What it takes are private modules of JAX. The tests have it, and they are needed for nothing else here.
    """
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from jax_private import teach_interpreter_reshaped_refs

    teach_interpreter_reshaped_refs()


def measure(entry: Entry, contestant: Contestant, found: Limits, repeats: int, dry: bool) -> dict[str, Any]:
    """One contestant on one workload: checked against the oracle, then timed.

    Returns:
        ``status``: "right"; "wrong", with the largest ``error`` and no time; or "refused", and ``why``. With "right",
        ``us`` is the median of ``samples_us``, and ``first_call_s`` the seconds of compiling and the first call.
    """
    if dry:
        teach_interpreter()
    case = shortened(entry.case) if dry else entry.case
    copies = 1 if dry else copies_beyond_cache(case)
    problem = build(case, contestant.version, copies=copies, platform=jax.default_backend())
    prepared = contestant.prepare(problem, dry)
    if isinstance(prepared, str):
        return {"status": "refused", "why": prepared}
    adapted, step = prepared
    started = time.perf_counter()
    output, pages = jax.block_until_ready(jax.jit(step)(adapted.operands))
    first_call_s = time.perf_counter() - started
    error, right = check(problem, output, pages, few_rows(case))
    if not right:
        return {"status": "wrong", "why": f"off by up to {error:.3g}", "error": error}
    del output, pages
    expected = max(work(case).seconds(*dataclasses.astuple(found)), LEAST_S)
    seconds, samples = seconds_per_call(adapted, step, expected_s=1.0 if dry else expected, repeats=repeats)
    return {
        "status": "right",
        "why": None,
        "error": error,
        "first_call_s": first_call_s,
        "us": 1e6 * seconds,
        "samples_us": [1e6 * each for each in samples],
    }
