"""``easydel-ragged bench``: is the answer right, and how far from the machine's limit is it found.

Every case is checked before it is timed. The candidates then take turns, so that a slow moment of the machine hits
all, and the machine's own limits are measured between them: absolute times mean little on a shared machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from easydel_ragged_plugin import select
from easydel_ragged_plugin.demo.model import MODEL_NAME
from easydel_ragged_plugin.demo.run import check_environment
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.formats import PLAIN
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.terminal import CommandError, require_writable
from easydel_ragged_plugin.testing.batches import Case, Version
from easydel_ragged_plugin.testing.tolerances import tolerance_for

from . import engine_case, figure, soak_case
from . import report as reports
from .cases import BENCH_CASES, CALL_BOUND, SCALED, by_name, with_dtype
from .contestants import Contestant, Entry, OfKernel
from .machine import Limits, Machine, facts
from .peers import PEERS
from .problem import Problem, build
from .report import Result, Timing
from .work import work

__all__ = ["ENGINE_CASE", "SOAK_CASE", "run"]

ENGINE_CASE, SOAK_CASE = "engine", "soak"
"""The cases that serve a model; see ``engine_case.py`` and ``soak_case.py``."""

SERVING = {ENGINE_CASE: engine_case.ABOUT, SOAK_CASE: soak_case.ABOUT}

SLOW_US = 20e6
"""What a candidate may take in all, about; one that needs longer for a single call is not called again."""


@dataclasses.dataclass
class _Series:
    """The timed runs of one contestant."""

    entry: Entry
    error: float
    samples_us: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1
    rounds: int = 1

    def plan(self, repeats: int) -> None:
        """How often to time it: 50 ms a sample, so that starting it does not count; slow ones less often."""
        first = self.entry.checked_us
        if first > SLOW_US:
            self.samples_us, self.rounds = [first], 0
            return
        once = self.entry.choose()
        self.calls = max(1, min(5000, math.ceil(50_000 / once)))
        self.rounds = repeats if once < SLOW_US / 10 else max(1, min(repeats, int(SLOW_US / once)))

    @property
    def median(self) -> float:
        return statistics.median(self.samples_us)


def _prepare(problem: Problem, contestant: Contestant, notes: list[str]) -> _Series | None:
    """A checked contestant, or a note about why there is none."""
    try:
        entry = contestant.enter(problem)
        error, right = entry.check()
    except (Unsupported, ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as failure:
        # Whatever keeps it from running is a finding, not a failure of this benchmark.
        notes.append(f"{contestant.label} does not run: {str(failure).splitlines()[0][:160]}")
        return None
    if not right:
        if contestant.is_own:
            bound = tolerance_for(problem.case)
            raise CommandError(
                f"{problem.case.name} {problem.version} {problem.case.dtype}: {entry.kernel} is WRONG (largest "
                f"error {error:.3g}, allowed {bound.atol:.2g} + {bound.rtol:.2g} of the answer); not timed. "
                "Please report this with the output of 'easydel-ragged doctor'.",
                exit_code=1,
            )
        notes.append(f"{contestant.label} is wrong here: largest error {error:.2g}")
    return _Series(entry, error)


def _run_case(
    case: Case,
    version: Version,
    contestants: Sequence[Contestant],
    repeats: int,
    machine: Machine,
    say: Callable[[str], None],
) -> Result:
    label = f"{case.name} {version} {case.dtype}"
    say(f"{label}: building")
    problem = build(case, version)
    notes: list[str] = []
    series: dict[str, _Series] = {}
    own: dict[str, Contestant] = {}
    for contestant in contestants:
        say(f"{label}: compiling and checking {contestant.label}")
        prepared = _prepare(problem, contestant, notes)
        if prepared is not None and prepared.entry.kernel not in series:
            series[prepared.entry.kernel] = prepared
            if contestant.is_own:
                own[prepared.entry.kernel] = contestant
    same_work: dict[str, _Series] = {}
    scaled_from = SCALED.get(case.name)
    if scaled_from is not None:
        say(f"{label}: compiling {scaled_from}, for comparison")
        other = build(with_dtype(by_name()[scaled_from], case.dtype), version)
        for kernel, contestant in own.items():
            prepared = _prepare(other, contestant, notes)
            if prepared is not None:
                same_work[kernel] = prepared
    needed = work(case)
    data, flops = needed.cache_bytes, needed.flops
    bound = "read" if data / machine.limits.read_bytes_per_s >= flops / machine.limits.gemm_flops_per_s else "gemm"
    if case.name in CALL_BOUND:
        bound = "call"
    runs = [*series.values(), *same_work.values()]
    for run in runs:
        run.plan(repeats)
    rates: list[float] = []
    for repeat in range(repeats):
        say(f"{label}: timing {repeat + 1}/{repeats}")
        if bound != "call":
            rates.append(machine.read_rate_for(data) if bound == "read" else machine.gemm_rate())
        for run in runs:
            if repeat < run.rounds:
                run.samples_us.append(run.entry.time_us(run.calls))
    rate = statistics.median(rates) if rates else None
    limit_us = None if rate is None else (data if bound == "read" else flops) / rate * 1e6
    timings = tuple(
        Timing(
            kernel=kernel,
            us=run.median,
            share=None if limit_us is None else limit_us / run.median,
            error=run.error if math.isfinite(run.error) else None,
            ratio=run.median / same_work[kernel].median if kernel in same_work else None,
            samples_us=tuple(run.samples_us),
            form=run.entry.form,
        )
        for kernel, run in series.items()
    )
    return Result(
        case=case.name,
        version=version,
        dtype=case.dtype,
        bound=bound,
        limit_us=limit_us,
        read_bytes_per_s=rate if bound == "read" else None,
        gemm_flops_per_s=rate if bound == "gemm" else None,
        scaled_from=scaled_from,
        timings=timings,
        notes=tuple(notes),
    )


def _chosen_cases(names: Sequence[str]) -> list[Case]:
    known = by_name()
    unknown = [name for name in names if name not in known and name not in SERVING]
    if unknown:
        raise CommandError(
            f"--case: got {', '.join(unknown)}, wanted some of {', '.join([*known, *SERVING])}. "
            "'easydel-ragged bench --list' describes them."
        )
    if names:
        return [known[name] for name in names if name not in SERVING]
    return [case for case in BENCH_CASES if case.name != "smoke"]


def _contestants(names: Sequence[str], every: bool, peers: Sequence[str], with_host: bool) -> list[Contestant]:
    """Who is timed: this package's kernels, peers, and EasyDeL's own."""
    known = select.kernels()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CommandError(f"--kernel: got {', '.join(map(repr, unknown))}, wanted one of {', '.join(known)}.")
    chosen: list[str | None] = [*names] or [None]
    if every:
        platform = jax.default_backend()
        chosen = [
            name
            for name, kernel in known.items()
            if platform in kernel.platforms and PLAIN.name in kernel.features.cache_formats and not kernel.is_hosts
        ]
    hosts = [OfKernel(name) for name, kernel in known.items() if kernel.is_hosts and with_host and name not in chosen]
    ours = [OfKernel(name, is_named=not every) for name in dict.fromkeys(chosen)]
    return [*ours, *(PEERS[name] for name in peers), *hosts]


def _chosen_peers(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise CommandError(f"--peer: got {', '.join(map(repr, unknown))}, wanted one of {', '.join(PEERS)}.")
    return [name for name in PEERS if name in names]


def _write_figure(console: Console, report: Mapping[str, Any], file: Path) -> None:
    figure.draw(report, file)
    console.print(f"figure written to {file}", highlight=False)


def run(
    *,
    names: Sequence[str],
    version: Version,
    kernels: Sequence[str],
    all_kernels: bool,
    peers: Sequence[str],
    dtypes: Sequence[str],
    repeats: int,
    json_file: Path | None,
    figure_file: Path | None,
    from_json: Path | None,
    with_host: bool,
    list_only: bool,
    engine: engine_case.Plan,
    soak: soak_case.Plan,
) -> int:
    """See ``easydel-ragged bench --help``. The exit code is 1 where nothing ran (notes tell why), or for drift."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 190)  # a file or a pipe has no width; the table does
    if list_only:
        for case in BENCH_CASES:
            console.print(f"[bold]{case.name:28}[/bold] {case.about}", highlight=False)
        for name, about in SERVING.items():
            console.print(f"[bold]{name:28}[/bold] {about}; not part of 'all'", highlight=False)
        return 0
    if figure_file is not None:
        figure.require(figure_file)
    for option, file in (("--json", json_file), ("--figure", figure_file)):
        if file is not None:
            require_writable(option, file)
    if from_json is not None:
        report = reports.read(from_json)
        reports.show(console, report)
        if "engine" in report:
            engine_case.show(console, report["engine"])
        if "soak" in report:
            soak_case.show(console, report["soak"])
        if figure_file is not None:
            _write_figure(console, report, figure_file)
        return 0
    chosen_peers = _chosen_peers(peers)
    cases = [with_dtype(case, dtype) for case in _chosen_cases(names) for dtype in dtypes]
    if figure_file is not None and all(case.name in CALL_BOUND for case in cases):
        raise CommandError(
            f"--figure: got the cases {', '.join(names)}, none of which has a limit to draw, wanted one that has."
        )
    for name in SERVING.keys() & set(names):
        converts = name == ENGINE_CASE or soak.model == MODEL_NAME
        check_environment(f"--case {name}", converts=converts)
    # Left alone, EasyDeL's kernel tunes itself on the first call of every shape: hundreds of runs of each candidate.
    os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    results: list[Result] = []
    limits: Limits | None = None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting JAX", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        contestants = _contestants(kernels, all_kernels, chosen_peers, with_host)
        if cases:
            say("measuring the machine")
            with interruptible(at_once=True), Machine() as machine:
                limits = machine.limits
                results = [_run_case(case, version, contestants, repeats, machine, say) for case in cases]
        report = {
            "machine": facts(),
            "kernels": reports.describe_kernels(select.kernels().values(), map(PEERS.__getitem__, chosen_peers)),
            "repeats": repeats,
            "limits": None if limits is None else dataclasses.asdict(limits),
            "results": [dataclasses.asdict(result) for result in results],
        }
    reports.show(console, report)
    if ENGINE_CASE in names:
        report["engine"] = engine_case.run(engine, repeats=repeats, with_host=with_host)
        engine_case.show(console, report["engine"])
    if SOAK_CASE in names:
        report["soak"] = soak_case.run(dataclasses.replace(soak, mechanism=f"ragged_page_attention_{version}"))
        soak_case.show(console, report["soak"])
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {json_file}", highlight=False)
    if figure_file is not None:
        _write_figure(console, report, figure_file)
    nothing_ran = cases and not any(result.timings for result in results)
    return 1 if nothing_ran or report.get("soak", {}).get("verdict", {}).get("drift") else 0
