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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.layout import page_shape
from easydel_ragged_plugin.testing.cases import Case, Row

from . import bench_engine, figure
from .machine import Limits, Machine, facts

__all__ = ["BENCH_CASES", "ENGINE_CASE", "Result", "Timing", "run"]

HOST = "ejkernel"
"""Name of the kernel that is EasyDeL's own call."""

ENGINE_CASE = "engine"
"""The case that is no single call; see ``bench_engine.py``."""

Version = Literal["v2", "v3"]


def _decodes(*contexts: int) -> tuple[Row, ...]:
    return tuple(Row(context, 1) for context in contexts)


def _case(name: str, about: str, rows: tuple[Row, ...], **changes: Any) -> Case:
    """A case of the common geometry: 32 q heads, 8 kv heads, head_dim 128, pages of 128, table for 8192 tokens."""
    fields: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 128, "pages_per_row": 64}
    fields |= {
        "num_tokens": sum(row.new for row in rows),
        "num_rows": len(rows),
        "num_pages": None,
        "dtype": "bfloat16",
    }
    return Case(name, rows, about, **(fields | changes))


BENCH_CASES = (
    _case("decode-1x4k", "one request, 4096 tokens of context", _decodes(4096)),
    _case("decode-1x16k", "one request, 16384 tokens of context", _decodes(16384), pages_per_row=128),
    _case("decode-8x2k", "8 requests, 2048 tokens each", _decodes(*[2048] * 8)),
    _case("decode-skewed", "one long request among short ones", _decodes(8000, 100, 300, 50, 900, 20, 700, 333)),
    _case("decode-8x4k-window128", "sliding window of 128 on 4096 tokens", _decodes(*[4096] * 8), sliding_window=128),
    _case("prefill-1k", "one prompt of 1024 tokens", (Row(1024, 1024),)),
    _case("prefill-4k", "one prompt of 4096 tokens", (Row(4096, 4096),)),
    _case("prefill-256-on-4k", "a chunk of 256 tokens after 3840", (Row(4096, 256),)),
    _case(
        "mixed-7-decodes-256-prefill", "7 decodes at 1024, a prompt of 256", (*_decodes(*[1024] * 7), Row(1024, 256))
    ),
    _case(
        "decode-8x2k-d64",
        "head_dim 64, 9/3 heads",
        _decodes(*[2048] * 8),
        q_heads=9,
        kv_heads=3,
        head_dim=64,
    ),
    _case("decode-4x1k-mha", "a kv head for each q head", _decodes(*[1024] * 4), kv_heads=32),
    _case("decode-8x2k-wide-table", "decode-8x2k, table for 65536 tokens", _decodes(*[2048] * 8), pages_per_row=512),
    _case(
        "tiny",
        "2 requests, 16 tokens each: what a call costs, many in one jit",
        _decodes(16, 16),
        q_heads=4,
        kv_heads=2,
        head_dim=128,
        page_size=16,
        pages_per_row=4,
    ),
    _case(
        "smoke",
        "seconds, for trying the command out; not part of 'all'",
        (Row(40, 1), Row(24, 8)),
        q_heads=4,
        kv_heads=2,
        head_dim=32,
        page_size=16,
        pages_per_row=4,
    ),
)


SCALED = {"decode-8x2k-wide-table": "decode-8x2k"}
"""Cases that are the same work as another: both are timed in turns, and the ratio is shown."""

LOOPED = {"tiny": 500}
"""Cases of so little work that the call itself is what counts: this many calls run in one jitted loop."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One kernel on one case.

    Attributes:
        us: median microseconds of a call.
        share: time at the machine's limit / time taken; None where the limit says nothing.
        error: largest deviation of the answer from the float64 oracle, over the sampled queries; None: not finite.
        ratio: time / time on the case of the same work that ``Result.scaled_from`` names.
        samples_us: the timed runs.
    """

    kernel: str
    us: float
    share: float | None
    error: float | None
    ratio: float | None
    samples_us: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        bound: which limit binds: "read", "gemm", or "call" (none: the call's own cost counts).
        limit_us: the time that the machine's limit would allow; None for "call".
        read_bytes_per_s, gemm_flops_per_s: medians measured between the timed runs; the binding one alone.
        timings: this package's kernels, then EasyDeL's.
        notes: why a candidate is missing, or wrong.
    """

    case: str
    version: str
    dtype: str
    bound: str
    limit_us: float | None
    read_bytes_per_s: float | None
    gemm_flops_per_s: float | None
    scaled_from: str | None
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Result:
        """What :func:`dataclasses.asdict` and JSON made of one."""
        timings = (Timing(**{**each, "samples_us": tuple(each["samples_us"])}) for each in fields["timings"])
        return cls(**{**fields, "timings": tuple(timings), "notes": tuple(fields["notes"])})


@dataclasses.dataclass
class _Problem:
    """Arrays of one case. Pages hold random numbers everywhere, so reading a wrong slot shows as an error."""

    case: Case
    version: Version
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    pages: np.ndarray
    updated: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    query_start_loc: np.ndarray

    @property
    def distribution(self) -> np.ndarray:
        """Decode rows come first in every case."""
        decodes = sum(row.new == 1 for row in self.case.rows)
        return np.array([decodes, decodes, len(self.case.rows)], np.int32)


def _build(case: Case, version: Version) -> _Problem:
    random = np.random.default_rng(0)
    dtype = case.np_dtype

    def normal(*shape: int) -> np.ndarray:
        # A period prime to every stride here: values repeat, but never in step with pages or heads.
        period = random.standard_normal(min(math.prod(shape), 1_000_003)).astype(dtype)
        return np.resize(period, shape)

    needed = [-(-row.context // case.page_size) for row in case.rows]
    num_pages = 1 + sum(needed)
    order = 1 + random.permutation(num_pages - 1)
    tables = np.zeros((len(case.rows), case.pages_per_row), np.int32)
    for index, (count, end) in enumerate(zip(needed, np.cumsum(needed), strict=True)):
        tables[index, :count] = order[end - count : end]
    starts = np.concatenate([[0], np.cumsum([row.new for row in case.rows])]).astype(np.int32)
    keys = normal(case.num_tokens, case.kv_heads, case.head_dim)
    values = normal(case.num_tokens, case.kv_heads, case.head_dim)
    pages = normal(*page_shape(version, num_pages, case.page_size, case.kv_heads, case.head_dim, dtype))
    updated = pages.copy()
    for index, row in enumerate(case.rows):
        new = slice(starts[index], starts[index + 1])
        reference.write_tokens(updated, tables[index], row.context - row.new, keys[new], values[new])
    return _Problem(
        case=case,
        version=version,
        queries=normal(case.num_tokens, case.q_heads, case.head_dim),
        keys=keys,
        values=values,
        pages=pages,
        updated=updated,
        context_lens=np.array([row.context for row in case.rows], np.int32),
        block_tables=tables,
        query_start_loc=starts,
    )


def _sampled_answer(problem: _Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, q heads, oracle's answer ``[tokens, heads, head_dim]``) for a few queries of every row.

    Each sampled query becomes a row of its own whose context ends at it, so the oracle does no more than asked for.
    """
    case = problem.case
    tokens, contexts, rows = [], [], []
    for r, row in enumerate(case.rows):
        for offset in sorted({0, row.new // 2, row.new - 1}):
            tokens.append(int(problem.query_start_loc[r]) + offset)
            contexts.append(row.context - row.new + offset + 1)
            rows.append(r)
    heads = np.arange(case.kv_heads) * (case.q_heads // case.kv_heads)
    queries = problem.queries[tokens][:, heads]
    index = (np.array(contexts), problem.block_tables[rows], np.arange(len(tokens) + 1))
    options: dict[str, Any] = dict(case.options)
    if problem.version == "v2":
        answer = reference.ragged_page_attention_v2(queries, problem.updated, *index, len(tokens), **options)
    else:
        new = (problem.keys[tokens], problem.values[tokens])  # written again where they are already
        distribution = np.array([0, 0, len(tokens)])
        answer, _ = reference.ragged_page_attention_v3(queries, *new, problem.updated, *index, distribution, **options)
    return np.array(tokens), heads, answer


class _Candidate:
    """One way to answer: a compiled call, its pages threaded through (and donated) for v3."""

    def __init__(self, problem: _Problem, config: str | None) -> None:
        import jax
        import jax.numpy as jnp

        from easydel_ragged_plugin import api

        self._problem = problem
        is_v3 = problem.version == "v3"
        index = [jnp.asarray(a) for a in (problem.context_lens, problem.block_tables, problem.query_start_loc)]
        options: dict[str, Any] = dict(problem.case.options)
        new: tuple[Any, ...]
        if is_v3:
            new = (jnp.asarray(problem.keys), jnp.asarray(problem.values))
            rest = (*index, jnp.asarray(problem.distribution))
            self._pages = jnp.array(problem.pages)  # a copy: donating must not touch the problem's array
        else:
            new = ()
            rest = (*index, jnp.asarray([len(problem.case.rows)], jnp.int32))
            self._pages = jnp.array(problem.updated)
        queries = jnp.asarray(problem.queries)

        def call(pages: Any, queries: Any, new: Any, rest: Any) -> Any:
            arguments: Any = (queries, *new, pages, *rest)
            if is_v3:
                return api.ragged_page_attention_v3(*arguments, config=config, **options)
            return api.ragged_page_attention_v2(*arguments, config=config, **options), pages

        def loop(pages: Any, queries: Any, new: Any, rest: Any) -> Any:
            def step(_: Any, carry: Any) -> Any:
                output, pages = call(carry[1], carry[0], new, rest)
                return output, pages  # the next call's queries: no call can be left out or moved

            return jax.lax.fori_loop(0, LOOPED[problem.case.name], step, (queries, pages))

        function = api.ragged_page_attention_v3 if is_v3 else api.ragged_page_attention_v2
        arguments: Any = (queries, *new, self._pages, *rest)
        self.kernel = str(api.explain(function, *arguments, config=config, **options).kernel)
        self._arguments = (queries, new, rest)

        def once(pages: Any, queries: Any, new: Any, rest: Any) -> Any:
            output, written = call(pages, queries, new, rest)
            return output, written if is_v3 else None  # v2's pages would come out as a copy

        self._call = jax.jit(once, donate_argnums=0 if is_v3 else ()).lower(self._pages, *self._arguments).compile()
        self._loop = None
        if problem.case.name in LOOPED:
            self._loop = jax.jit(loop, donate_argnums=0).lower(self._pages, *self._arguments).compile()
        self.checked_us = math.nan
        """Microseconds of the call that :meth:`check` made."""

    def __call__(self) -> Any:
        output, pages = self._call(self._pages, *self._arguments)
        if pages is not None:
            self._pages = pages
        return output

    def check(self) -> float:
        """Largest deviation from the oracle over the sampled queries; infinite when v3's pages are not right."""
        started = time.perf_counter()
        answer = self().block_until_ready()
        self.checked_us = (time.perf_counter() - started) * 1e6
        output = np.asarray(answer).astype(np.float64)
        tokens, heads, expected = _sampled_answer(self._problem)
        if self._problem.version == "v3":
            written = np.asarray(self._pages)
            if written.tobytes() != self._problem.updated.tobytes():
                return math.inf
        error = np.abs(output[tokens][:, heads] - expected).max()
        return float(error) if np.isfinite(error) else math.inf

    def time_us(self, calls: int) -> float:
        """Mean microseconds of ``calls`` calls, or of the calls of one jitted loop."""
        if self._loop is not None:
            started = time.perf_counter()
            output, self._pages = self._loop(self._pages, *self._arguments)
            output.block_until_ready()
            return (time.perf_counter() - started) / LOOPED[self._problem.case.name] * 1e6
        started = time.perf_counter()
        for _ in range(calls):
            output = self()
        output.block_until_ready()
        return (time.perf_counter() - started) / calls * 1e6


def _work(case: Case) -> tuple[float, float]:
    """(bytes of keys and values that must be read once, floating-point operations of the two products)."""
    window = case.window
    tokens_read, pairs = 0, 0
    for row in case.rows:
        first = row.context - row.new
        visible = np.arange(first + 1, row.context + 1)
        pairs += int((visible if window is None else np.minimum(visible, window)).sum())
        tokens_read += row.context if window is None else min(row.context, window + row.new - 1)
    data = 2.0 * tokens_read * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
    return data, 4.0 * pairs * case.q_heads * case.head_dim


def _tolerance(case: Case) -> float:
    """Bound on the deviation: values are of size 1, averaged; bfloat16 rounds probabilities and the result."""
    return 2e-4 if case.dtype == "float32" else 3e-2


@dataclasses.dataclass
class _Series:
    """The timed runs of one candidate."""

    candidate: _Candidate
    samples_us: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1
    rounds: int = 1

    def plan(self, repeats: int) -> None:
        """How often to time it: 50 ms a sample, so that clock and dispatch don't matter; slow ones less often."""
        first = self.candidate.checked_us
        if first > SLOW_US:
            self.samples_us, self.rounds = [first], 0
            return
        once = self.candidate.time_us(1)
        self.calls = max(1, min(1000, math.ceil(50_000 / once)))
        self.rounds = repeats if once < SLOW_US / 10 else max(1, min(repeats, int(SLOW_US / once)))

    @property
    def median(self) -> float:
        return statistics.median(self.samples_us)


SLOW_US = 20e6
"""What a candidate may take in all, about; one that needs longer for a single call is not called again."""


def _prepare(problem: _Problem, kernel: str | None, notes: list[str]) -> tuple[_Series, float] | None:
    """A checked candidate and its error, or a note about why there is none."""
    label = "EasyDeL's kernel" if kernel == HOST else kernel or "this package"
    try:
        candidate = _Candidate(problem, kernel)
        error = candidate.check()
    except (Unsupported, ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as failure:
        # Whatever keeps a kernel from running is a finding, not a failure of this benchmark.
        notes.append(f"{label} does not run: {str(failure).splitlines()[0][:160]}")
        return None
    if not error <= _tolerance(problem.case):
        if kernel != HOST:
            raise SystemExit(
                f"{problem.case.name} {problem.version} {problem.case.dtype}: {candidate.kernel} is WRONG (largest "
                f"error {error:.3g}, allowed {_tolerance(problem.case):.3g}); not timed. "
                "Please report this with the output of 'easydel-ragged doctor'."
            )
        notes.append(f"EasyDeL's kernel is wrong here: largest error {error:.2g}")
    return _Series(candidate), error


def _run_case(
    case: Case,
    version: Version,
    kernels: Sequence[str | None],
    repeats: int,
    machine: Machine,
    say: Callable[[str], None],
) -> Result:
    label = f"{case.name} {version} {case.dtype}"
    say(f"{label}: building")
    problem = _build(case, version)
    notes: list[str] = []
    series: dict[str, _Series] = {}
    errors: dict[str, float] = {}
    for kernel in kernels:
        say(f"{label}: compiling and checking {kernel or 'what selection chooses'}")
        prepared = _prepare(problem, kernel, notes)
        if prepared is not None and prepared[0].candidate.kernel not in series:
            series[prepared[0].candidate.kernel], errors[prepared[0].candidate.kernel] = prepared
    same_work: dict[str, _Series] = {}
    scaled_from = SCALED.get(case.name)
    if scaled_from is not None:
        say(f"{label}: compiling {scaled_from}, for comparison")
        other = _build(dataclasses.replace(_by_name()[scaled_from], dtype=case.dtype), version)
        for kernel in series:
            prepared = None if kernel == HOST else _prepare(other, kernel, notes)
            if prepared is not None:
                same_work[kernel] = prepared[0]
    data, flops = _work(case)
    bound = "read" if data / machine.limits.read_bytes_per_s >= flops / machine.limits.gemm_flops_per_s else "gemm"
    if case.name in LOOPED:
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
                run.samples_us.append(run.candidate.time_us(run.calls))
    rate = statistics.median(rates) if rates else None
    limit_us = None if rate is None else (data if bound == "read" else flops) / rate * 1e6
    timings = tuple(
        Timing(
            kernel=kernel,
            us=run.median,
            share=None if limit_us is None else limit_us / run.median,
            error=errors[kernel] if math.isfinite(errors[kernel]) else None,
            ratio=run.median / same_work[kernel].median if kernel in same_work else None,
            samples_us=tuple(run.samples_us),
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


def _time(microseconds: float | None) -> str:
    """Three digits and a unit."""
    if microseconds is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.9995 * size:
            amount = microseconds / size
            return f"{amount:.{max(0, 2 - int(math.log10(max(amount, 1))))}f} {unit}"
    return f"{microseconds:.1f} µs"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _display(kernel: str) -> str:
    return "EasyDeL" if kernel == HOST else kernel


def _table(results: Sequence[Result]) -> Table:
    kernels = list(dict.fromkeys(timing.kernel for result in results for timing in result.timings))
    kernels.sort(key=lambda kernel: kernel == HOST)
    with_host = HOST in kernels and len(kernels) > 1
    table = Table(title="medians; share: time at the machine's limit / time taken", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    for kernel in kernels:
        table.add_column(_display(kernel), justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
        if with_host and kernel != HOST:
            table.add_column("faster", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for result in results:
        timings = {timing.kernel: timing for timing in result.timings}
        host = timings.get(HOST)
        limit = f"{_time(result.limit_us)} {result.bound}" if result.limit_us is not None else "-"
        cells = [f"{result.case} {result.version} {result.dtype.replace('float', 'f')}", limit]
        for kernel in kernels:
            timing = timings.get(kernel)
            cells += ["-", "-"] if timing is None else [_time(timing.us), _percent(timing.share)]
            if with_host and kernel != HOST:
                cells.append("-" if timing is None or host is None else f"{host.us / timing.us:.1f}x")
        errors = [timing.error for timing in result.timings if timing.error is not None and timing.kernel != HOST]
        table.add_row(*cells, f"{max(errors):.0e}" if errors else "-")
    return table


def _show(console: Console, report: Mapping[str, Any]) -> None:
    """Print what ``--json`` holds, the engine's part excepted."""
    machine, limits = report["machine"], report["limits"]
    cache = machine["last_level_cache_bytes"]
    parts = [
        f"{machine['device']}, {machine['processors']} processors",
        *([f"{cache >> 20} MiB last-level cache"] if cache else []),
        *([f"reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s"] if limits else []),
        *([f"float32 GEMM {limits['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"] if limits else []),
    ]
    console.print(", ".join(parts), highlight=False, soft_wrap=True)
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    if machine["native_isa"]:
        versions.append(f"native kernel on {machine['native_isa']}")
    console.print(", ".join([*versions, machine["date"]]), highlight=False, soft_wrap=True)
    results = [Result.from_json(each) for each in report["results"]]
    if results:
        console.print(_table(results))
    for result in results:
        for timing in result.timings:
            if timing.ratio is not None:
                text = f"{timing.ratio:.3f} x the time of {result.scaled_from}, timed in turns"
                console.print(f"{result.case} {result.dtype} {timing.kernel}: {text}", highlight=False, soft_wrap=True)
        for note in result.notes:
            console.print(f"{result.case} {result.dtype}: {note}", highlight=False, soft_wrap=True)


def _by_name() -> dict[str, Case]:
    return {case.name: case for case in BENCH_CASES}


def _chosen_cases(names: Sequence[str]) -> list[Case]:
    known = _by_name()
    unknown = [name for name in names if name not in known and name != ENGINE_CASE]
    if unknown:
        raise typer.BadParameter(
            f"--case: got {', '.join(unknown)}, wanted some of {', '.join([*known, ENGINE_CASE])}. "
            "'easydel-ragged bench --list' describes them."
        )
    if names:
        return [known[name] for name in names if name != ENGINE_CASE]
    return [case for case in BENCH_CASES if case.name != "smoke"]


def _chosen_kernels(names: Sequence[str], every: bool, with_host: bool) -> list[str | None]:
    """Kernels to time; None is what selection chooses. EasyDeL's own comes last."""
    import jax

    from easydel_ragged_plugin import select

    known = select.kernels()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"--kernel: got {', '.join(map(repr, unknown))}, wanted one of {', '.join(known)}.")
    chosen: list[str | None] = [*names] or [None]
    if every:
        platform = jax.default_backend()
        chosen = [name for name, kernel in known.items() if platform in kernel.platforms and name != HOST]
    if with_host:
        chosen.append(HOST)
    return list(dict.fromkeys(chosen))


def _write_figure(console: Console, report: Mapping[str, Any], file: Path) -> None:
    try:
        figure.draw(report, file)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"figure written to {file}", highlight=False)


def _read_report(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        for each in report["results"]:
            Result.from_json(each)
        _ = report["machine"]["versions"], report["limits"]
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f"--from-json {file}: not a result of this command ({type(error).__name__}: {error}). "
            "Write one with 'easydel-ragged bench --json FILE'."
        ) from error
    return dict(report)


def run(
    *,
    names: Sequence[str],
    version: Version,
    kernels: Sequence[str],
    all_kernels: bool,
    dtypes: Sequence[str],
    repeats: int,
    json_file: Path | None,
    figure_file: Path | None,
    from_json: Path | None,
    with_host: bool,
    list_only: bool,
    engine: bench_engine.Plan,
) -> None:
    """See ``easydel-ragged bench --help``."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no width; the table does
    if list_only:
        for case in BENCH_CASES:
            console.print(f"[bold]{case.name:28}[/bold] {case.about}", highlight=False)
        console.print(f"[bold]{ENGINE_CASE:28}[/bold] {bench_engine.ABOUT}; not part of 'all'", highlight=False)
        return
    if figure_file is not None:
        try:
            figure.require()
        except figure.MissingMatplotlib as error:
            Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
    if from_json is not None:
        report = _read_report(from_json)
        _show(console, report)
        if "engine" in report:
            bench_engine.show(console, report["engine"])
        if figure_file is not None:
            _write_figure(console, report, figure_file)
        return
    cases = [dataclasses.replace(case, dtype=dtype) for case in _chosen_cases(names) for dtype in dtypes]
    if ENGINE_CASE in names:
        bench_engine.check_environment()
    # Left alone, ejkernel tunes itself on the first call of every shape: hundreds of runs of each candidate.
    os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    results: list[Result] = []
    limits: Limits | None = None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("importing JAX", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        chosen = _chosen_kernels(kernels, all_kernels, with_host)
        if cases:
            say("measuring the machine")
            with Machine() as machine:
                limits = machine.limits
                results = [_run_case(case, version, chosen, repeats, machine, say) for case in cases]
        report = {
            "machine": facts(),
            "repeats": repeats,
            "limits": None if limits is None else dataclasses.asdict(limits),
            "results": [dataclasses.asdict(result) for result in results],
        }
    _show(console, report)
    if ENGINE_CASE in names:
        report["engine"] = bench_engine.run(engine, repeats=repeats, with_host=with_host)
        bench_engine.show(console, report["engine"])
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {json_file}", highlight=False)
    if figure_file is not None:
        _write_figure(console, report, figure_file)
    if cases and not any(result.timings for result in results):
        raise typer.Exit(1)  # the notes tell why nothing ran
