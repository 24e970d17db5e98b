"""``easydel-ragged tune``: which sizes of a kernel are fastest on this machine.

Every candidate must give the right answer before it is timed. Decoding and prefill are measured apart. What can be
tuned of a kernel, and where the winners are kept for later processes, is the kernel's: see ``types.Tuning``.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from easydel_ragged_plugin import select
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.terminal import CommandError, usable_cache_dir
from easydel_ragged_plugin.testing.cases import Row
from easydel_ragged_plugin.types import Kernel, Tuning

from .cases import workload
from .problem import Problem, build, check, few_rows
from .timing import copies_beyond_cache, seconds_per_call
from .work import work

__all__ = ["Geometry", "run"]

LEAST_GAIN = 0.98
"""A candidate takes the place of the present sizes when it needs no more than this part of their time."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is tuned: the parts of a request that decide how a kernel runs."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def problem(self, part: str, small: bool) -> Problem:
        """A decode step of 32 requests of 500 to 8000 tokens, or a prompt of 4096. ``small``: for an interpreter."""
        if part == "decode":
            rows = tuple(Row(500 + 242 * index, 1) for index in range(32))
            rows = (Row(40, 1), Row(7, 1)) if small else rows
        else:
            rows = (Row(24, 20),) if small else (Row(4096, 4096),)
        case = workload(f"tune-{part}", rows, **dataclasses.asdict(self))
        return build(case, "v2", copies=1 if small else copies_beyond_cache(case))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate: microseconds of a call, or why it has none."""

    sizes: Any
    us: float | None
    problem: str | None = None


def measure(kernel: Kernel, problem: Problem, sizes: Any, interpret: bool) -> Measured:
    """Check a candidate's answer, then time it."""
    config = RaggedPageConfig(kernel_config=sizes)

    def step(operands: Any) -> Any:
        return kernel.forward(problem.request, config, operands)[:2]

    # A compiler may refuse a candidate in ways of its own (registers, shared memory): that is one that has lost.
    try:
        output, pages = jax.block_until_ready(jax.jit(step)(problem.operands))
        error, right = check(problem, output, pages, few_rows(problem.case))
        if not right:
            return Measured(sizes, None, f"wrong answer, off by up to {error:.3g}")
        expected = work(problem.case).seconds(1e12, 1e14)
        seconds, _ = seconds_per_call(
            problem, step, expected_s=1.0 if interpret else max(expected, 1e-5), repeats=1 if interpret else 3
        )
    except jax.errors.JaxRuntimeError as error:
        return Measured(sizes, None, str(error).splitlines()[0][:120])
    return Measured(sizes, 1e6 * seconds)


def _tunable(interpret: bool) -> list[tuple[Kernel, Tuning]]:
    """The kernels of this machine that can be tuned.

    Raises:
        CommandError: there is none.
    """
    platform = jax.default_backend()
    every = [(kernel, tuning) for kernel in select.kernels().values() if (tuning := kernel.tuning()) is not None]
    if interpret:
        kernels = [tuning.interpreted for _, tuning in every if tuning.interpreted is not None]
        every = [(kernel, tuning) for kernel in kernels if (tuning := kernel.tuning()) is not None]
    found = [(kernel, tuning) for kernel, tuning in every if platform in kernel.platforms]
    if not found:
        listing = ", ".join(f"{kernel.name} on {', '.join(sorted(kernel.platforms))}" for kernel, _ in every)
        raise CommandError(
            f"There is nothing to tune: JAX's default backend is {platform!r}, and what can be tuned is {listing}. On "
            "a machine with a GPU, install JAX for it (pip install 'jax[cuda12]') and see what 'easydel-ragged doctor' "
            "finds.",
            exit_code=1,
        )
    return found


def run(geometry: Geometry, *, interpret: bool = False) -> None:
    """See ``easydel-ragged tune --help``."""
    console = Console()
    with interruptible(at_once=True):
        found = _tunable(interpret)
        usable_cache_dir(make=False)  # the winners go there
        for kernel, tuning in found:
            file = _tune(console, kernel, tuning, geometry, interpret)
            console.print(f"[green]✓[/green] {kernel.name}: written to {file}", highlight=False, soft_wrap=True)
    if interpret:
        console.print("  timed in an interpreter: these sizes say nothing about a GPU, and no GPU takes them")


def _tune(console: Console, kernel: Kernel, tuning: Tuning, geometry: Geometry, interpret: bool) -> Path:
    """Measure every part and keep the winners; the file that has them."""
    where = "an interpreter" if interpret else jax.local_devices()[0].device_kind
    best: dict[str, Measured] = {}
    notes: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    for part in tuning.parts:
        problem = geometry.problem(part, interpret)
        refusal = select.why_not(kernel, problem.request, RaggedPageConfig())
        if refusal is not None:
            raise CommandError(f"{kernel.name} does not take this: {refusal}", exit_code=1)
        sizes = list(tuning.candidates(part, problem.request))
        results = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"{kernel.name}, {part} on {where}", total=len(sizes))
            for each in sizes:
                results.append(measure(kernel, problem, each, interpret))
                progress.advance(task)
        _show(console, part, results)
        first = results[0]
        if first.us is None:
            raise CommandError(f"the present sizes fail: {first.problem}. Nothing is written.", exit_code=1)
        fastest = min(results, key=lambda each: math.inf if each.us is None else each.us)
        best[part] = fastest if fastest.us is not None and fastest.us <= LEAST_GAIN * first.us else first
        notes[part] = {"us": best[part].us, "before_us": first.us, "case": problem.case.name}
    return tuning.save(problem.request, {part: each.sizes for part, each in best.items()}, notes)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dictionary of dictionaries as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for name, inner in fields.items():
        found |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return found


def _show(console: Console, part: str, results: Sequence[Measured], most: int = 8) -> None:
    """The fastest candidates, and some that failed; in the columns what differs between any two of all."""
    fields = [_flat(dataclasses.asdict(each.sizes)) for each in results]
    differing = [name for name in fields[0] if len({str(each[name]) for each in fields}) > 1]
    table = Table(title=part, title_justify="left")
    for column in (*(name.removeprefix(f"{part}.") for name in differing), "us", ""):
        table.add_column(column, justify="left" if not column else "right")
    rows = list(zip(results, fields, strict=True))
    done = sorted((row for row in rows if row[0].us is not None), key=lambda row: row[0].us or 0.0)
    failed = [row for row in rows if row[0].us is None]
    for each, shown in [*done[:most], *failed[:most]]:
        note = each.problem or ("present" if each is results[0] else "")
        us = "-" if each.us is None else f"{each.us:.1f}"
        table.add_row(*(str(shown[name]) for name in differing), us, note)
    console.print(table)
    if len(done) > most or len(failed) > most:
        console.print(f"  of {len(results)} candidates, {len(failed)} failed", highlight=False)
