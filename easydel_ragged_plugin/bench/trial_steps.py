"""The steps of a kernel's trial, in a process of their own: a kernel that never ends takes its process with it.

    python -m easydel_ragged_plugin.bench.trial_steps '{"kernel": "a_kernel", "geometry": {}, "interpret": false}'

On its standard output it writes one object of JSON before each step and one after it; ``trial.py`` reads them and
decides. It ends at the first step that shows something wrong, and when its standard input is closed: with the process
that started it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from easydel_ragged_plugin import select
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.batches import FAULTS, Batch, Case, Fault, Row, Version, build_batch, spoil_row
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver, KernelOutcome
from easydel_ragged_plugin.testing.tolerances import tolerance_for
from easydel_ragged_plugin.types import Kernel, Trial

from .geometry import Geometry
from .problem import build, check, few_rows
from .timing import copies_beyond_cache, step_of, timer
from .work import work

__all__ = ["Check", "Step", "checks", "main", "steps", "what_is_wrong"]

CHECK_LIMIT_S, TIME_LIMIT_S = 120.0, 300.0
"""For a step, the compilation of its programs included. On a card they take seconds."""
INTERPRETED_LIMIT_S = 900.0

# Several blocks of keys, the last one with a tail, and rows that begin within a tile; a row that is decoded.
ROWS = (Row(600, 70), Row(300, 33), Row(40, 40), Row(57, 1))
SMALL_ROWS = (Row(70, 40), Row(33, 20), Row(20, 1))
OPTIONS: dict[str, Any] = {
    "sliding_window": 200,
    "attention_chunk_size": 178,
    "logits_soft_cap": 5.0,
    "softmax_scale": 0.11,
    "k_scale": 1.25,
    "v_scale": 0.5,
}
"""A value of each option that can change a result. What else a kernel declares has a case of its own below."""
SMALL_OPTIONS = {**OPTIONS, "sliding_window": 30, "attention_chunk_size": 24}

WORKLOADS = {
    "prompt-4k": (Row(4095, 4095),),
    "chunk-256-on-4k": (Row(4219, 256),),
    "mixed-31x2k-and-1k": (*(Row(2047 - 17 * row, 1) for row in range(31)), Row(1023, 1023)),
}
SMALL_WORKLOADS = {"prompt-48": (Row(48, 48),)}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: what it is about.
        limit_s: seconds after which it counts as one that does not end.
        run: does it; what it has found. ``problem`` is what is wrong, or None.
    """

    name: str
    limit_s: float
    run: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Check:
    """What is compared with the oracle: a case, and the same one with a malformed row of each of ``faults``."""

    version: Version
    case: Case
    faults: tuple[Fault, ...] = ()
    return_lse: bool = False


def steps(kernel: Kernel, beside: Kernel, geometry: Geometry, small: bool) -> Iterator[Step]:
    """All steps, the shortest first. ``small``: few of them, for an interpreter."""
    check_s, time_s = (INTERPRETED_LIMIT_S, INTERPRETED_LIMIT_S) if small else (CHECK_LIMIT_S, TIME_LIMIT_S)
    for each in checks(kernel, geometry, small):
        yield Step(f"{each.version} {each.case.name}", check_s, functools.partial(_check, kernel, each))
    for name, rows in (SMALL_WORKLOADS if small else WORKLOADS).items():
        workload = geometry.workload(name, rows)
        yield Step(name, time_s, functools.partial(_time, kernel, beside, workload, small))


def checks(kernel: Kernel, geometry: Geometry, small: bool) -> Iterator[Check]:
    """One row, several, each option that the kernel declares, and all of them."""
    declared, lse = kernel.features.options, "lse" in kernel.features.results
    values = {name: value for name, value in (SMALL_OPTIONS if small else OPTIONS).items() if name in declared}
    sinks: Any = "heads" if "sinks" in declared else None

    def case(name: str, rows: tuple[Row, ...] = SMALL_ROWS if small else ROWS, **fields: Any) -> Case:
        made = geometry.workload(name, rows)
        # Tokens of no row, a dead row, and a table that is wider than any row needs.
        room: dict[str, Any] = {
            "num_tokens": made.num_tokens + 9,
            "num_rows": len(rows) + 1,
            "pages_per_row": made.pages_per_row + 2,
        }
        return dataclasses.replace(made, table="stale", query_gain=2.0, **room, **fields)

    every = case("with every option", options=Options(**values), sinks=sinks)
    if small:
        yield Check("v3", every, FAULTS[:1], lse)
        return
    yield Check("v3", case("with one row", (Row(300, 40),)))
    yield Check("v3", case("with several rows"), FAULTS)
    yield Check("v2", case("with several rows"))
    for name, value in values.items():
        yield Check("v3", case(f"with {name}", options=Options(**{name: value})))
    if sinks is not None:
        yield Check("v3", case("with sinks", sinks=sinks))
    if "scale_arrays" in declared:
        yield Check("v3", case("with scale_arrays", options=Options(scale_arrays=("k_scale", "v_scale"))))
    if "update_pages" in declared:
        yield Check("v3", case("with update_pages off", options=Options(update_pages=False)))
    yield Check("v3", every, return_lse=lse)
    yield Check("v2", every, return_lse=lse)


def _check(kernel: Kernel, asked: Check) -> dict[str, Any]:
    """Compare the answers with the oracle's. A malformed row changes no program."""
    driver = KernelDriver(kernel, asked.version)
    batch = build_batch(asked.case, asked.version)
    spoiled = {f", with a malformed row ({fault})": spoil_row(batch, fault) for fault in asked.faults}
    for which, each in {"": batch, **spoiled}.items():
        wrong = what_is_wrong(each, driver.call(each, return_lse=asked.return_lse))
        if wrong is not None:
            return {"problem": f"{wrong}{which}"}
    return {"problem": None}


def what_is_wrong(batch: Batch, outcome: KernelOutcome) -> str | None:
    """How an answer differs from the oracle's, or None."""
    expected, pages, lse = batch.expected_with_lse()
    bound = tolerance_for(batch.case)

    def off(actual: np.ndarray, wanted: np.ndarray) -> str | None:
        exact = actual.astype(np.float64)
        with np.errstate(invalid="ignore"):  # of two infinities
            difference = np.where(exact == wanted, 0.0, np.abs(exact - wanted))
            close = difference <= np.where(np.isfinite(wanted), bound.atol + bound.rtol * np.abs(wanted), 0.0)
        return None if close.all() else f"off by up to {difference.max():.3g}"

    if (found := off(outcome.output, expected)) is not None:
        return f"wrong answer, {found}"
    if outcome.output[~batch.live_tokens].any():
        return "wrong answer, tokens of no row are not zero"
    if outcome.lse is not None and (found := off(outcome.lse, lse)) is not None:
        return f"wrong logsumexp, {found}"
    if outcome.pages.tobytes() != pages.tobytes():
        return "wrong pages after the call"
    return None


def _time(kernel: Kernel, beside: Kernel, case: Case, small: bool) -> dict[str, Any]:
    """Check a workload's answer, then time both kernels in turns: microseconds of a call."""
    problem = build(case, "v3", copies=1 if small else copies_beyond_cache(case))
    expected_s = 1.0 if small else max(work(case).seconds(1e12, 1e14), 1e-5)
    clocks = []
    for each in (kernel, beside):
        step = step_of(each, problem, RaggedPageConfig())
        output, pages = jax.block_until_ready(jax.jit(step)(problem.operands))
        error, right = check(problem, output, pages, few_rows(case))
        if not right:
            of_whom = "" if each is kernel else f" of {each.name}"
            return {"problem": f"wrong answer{of_whom}, off by up to {error:.3g}"}
        clocks.append(timer(problem, step, expected_s=expected_s))
    turns = [[clock() for clock in clocks] for _ in range(1 if small else 7)]
    ours, theirs = (1e6 * statistics.median(times) for times in zip(*turns, strict=True))
    return {"problem": None, "us": ours, "beside_us": theirs}


def _asked_for(name: str, interpret: bool) -> tuple[Kernel, Trial]:
    """The kernel, or it in its interpreter, and its trial: ``tune.py`` has found both."""
    kernel = select.kernels()[name]
    trial = kernel.trial()
    if interpret and trial is not None and trial.interpreted is not None:
        kernel = trial.interpreted
        trial = kernel.trial()
    assert trial is not None
    return kernel, trial


def _end_with_parent() -> None:
    """End this process when its standard input is closed, in whatever call it is."""

    def wait() -> None:
        while os.read(0, 1024):  # a stream of Python's would be locked when the process ends by itself
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(told: str) -> None:
    """Run the steps for what ``trial.py`` has told."""
    # Whatever else writes to the standard output writes to the log, which is the error stream.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_parent()

    def say(**fields: Any) -> None:
        lines.write(json.dumps(fields) + "\n")
        lines.flush()

    given = json.loads(told)
    if jax.default_backend() != given["platform"]:
        say(unable=f"its process got JAX's backend {jax.default_backend()!r}, wanted {given['platform']!r}")
        return
    kernel, trial = _asked_for(given["kernel"], given["interpret"])
    for step in steps(kernel, trial.beside, Geometry(**given["geometry"]), given["interpret"]):
        say(begin=step.name, limit_s=step.limit_s)
        # Whatever the kernel raises here is what the trial is to find.
        try:
            found = step.run()
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        say(end=step.name, **found)
        if found["problem"] is not None:
            return
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1])
