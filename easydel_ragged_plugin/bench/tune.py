"""``easydel-ragged tune``: which sizes of a kernel are fastest on this machine, and which kernels can be chosen on it.

Every candidate must give the right answer before it is timed. Decoding and prefill are measured apart. What can be
tuned of a kernel, and where the winners are kept for later processes, is the kernel's: see ``types.Tuning``. So is what
must be tried before it is chosen: see ``types.Trial``, and ``trial.py``.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from easydel_ragged_plugin import select
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.terminal import CommandError, usable_cache_dir
from easydel_ragged_plugin.testing.batches import Row
from easydel_ragged_plugin.types import Kernel, Trial, Tuning

from .geometry import Geometry
from .problem import Problem, build, check, few_rows
from .timing import LEAST_GAIN, seconds_per_call, step_of
from .trial import try_kernel
from .work import work

__all__ = ["Geometry", "run"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate: microseconds of a call, or why it has none."""

    sizes: Any
    us: float | None
    problem: str | None = None


def measure(kernel: Kernel, problem: Problem, sizes: Any, interpret: bool) -> Measured:
    """Check a candidate's answer, then time it."""
    step = step_of(kernel, problem, RaggedPageConfig(kernel_config=sizes))
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


def _found(names: Sequence[str], interpret: bool) -> list[Kernel]:
    """The kernels that can be tuned or tried on this machine, of ``names`` where any are given.

    Raises:
        CommandError: there is none, or a name is not one of theirs.
    """
    platform = jax.default_backend()
    every = [kernel for kernel in select.kernels().values() if kernel.tuning() or kernel.trial()]
    unknown = [name for name in names if name not in [kernel.name for kernel in every]]
    if unknown:
        known = ", ".join(kernel.name for kernel in every)
        raise CommandError(f"--kernel: got {', '.join(unknown)}, wanted some of {known}.")
    if names:
        every = [kernel for kernel in every if kernel.name in names]
    if interpret:
        stand_ins = [what.interpreted for kernel in every if (what := kernel.tuning() or kernel.trial()) is not None]
        every = [kernel for kernel in stand_ins if kernel is not None]
    found = [kernel for kernel in every if platform in kernel.platforms]
    if not found:
        listing = ", ".join(f"{kernel.name} on {', '.join(sorted(kernel.platforms))}" for kernel in every)
        raise CommandError(
            f"There is nothing to tune: JAX's default backend is {platform!r}, and what can be tuned or tried is "
            f"{listing}. On a machine with a GPU, install JAX for it (pip install 'jax[cuda12]') and see what "
            "'easydel-ragged doctor' finds.",
            exit_code=1,
        )
    return found


def run(geometry: Geometry, *, kernels: Sequence[str] = (), interpret: bool = False) -> None:
    """See ``easydel-ragged tune --help``."""
    console = Console()
    with interruptible(at_once=True):
        # Before JAX starts: a kernel that is tried has a process of its own, which needs some of the card's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        found = _found(kernels, interpret)
        usable_cache_dir(make=False)  # the winners go there
        for kernel in found:
            if (tuning := kernel.tuning()) is not None:
                file = _tune(console, kernel, tuning, geometry, interpret)
                console.print(f"[green]✓[/green] {kernel.name}: written to {file}", highlight=False, soft_wrap=True)
        for kernel in found:  # beside tuned ones
            if (trial := kernel.trial()) is not None:
                _try(console, kernel, trial, geometry, named=kernel.name in kernels, interpret=interpret)
    if interpret:
        console.print("  timed in an interpreter: these sizes say nothing about a GPU, and no GPU takes them")


def _try(console: Console, kernel: Kernel, trial: Trial, geometry: Geometry, *, named: bool, interpret: bool) -> None:
    """Try a kernel where it can run; where it can't, say why."""
    request = build(geometry.workload("trial", (Row(128, 128),)), "v3").request
    refusal = select.why_not(kernel, request, RaggedPageConfig())
    if refusal is not None and named and not interpret:
        raise CommandError(f"{kernel.name} does not take this: {refusal}", exit_code=1)
    if refusal is not None:
        console.print(f"  {kernel.name} is not tried: {escape(refusal)}", highlight=False, soft_wrap=True)
        return
    file, reason = try_kernel(console, kernel, trial, request, geometry, interpret)
    mark, outcome = ("[green]✓[/green]", "passed,") if reason is None else ("[red]✗[/red]", f"{escape(reason)};")
    console.print(f"{mark} {kernel.name}: {outcome} written to {file}", highlight=False, soft_wrap=True)


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
