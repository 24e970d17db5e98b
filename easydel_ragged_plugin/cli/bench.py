"""``easydel-ragged bench``: is the answer right, and how far from the machine's limit is it found.

Every case is checked before it is timed. The two candidates then take turns, so that a slow moment of the machine
hits both, and the machine's own limits are measured in the same run: absolute times mean little on a shared machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

__all__ = ["BENCH_CASES", "Limits", "Result", "measure_limits", "run"]

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
    _case("decode-8x2k", "8 requests, 2048 tokens each", _decodes(*[2048] * 8)),
    _case("decode-skewed", "one long request among short ones", _decodes(8000, 100, 300, 50, 900, 20, 700, 333)),
    _case("decode-8x4k-window128", "sliding window of 128 on 4096 tokens", _decodes(*[4096] * 8), sliding_window=128),
    _case("prefill-1k", "one prompt of 1024 tokens", (Row(1024, 1024),)),
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this machine can do, measured in this run."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table. Times are medians in microseconds; None where a candidate does not run.

    Attributes:
        kernel: what this package's selection chose.
        error: largest deviation of this package's answer from the float64 oracle, over the sampled queries.
        limit_us: the time that the machine's limit would allow, and ``bound`` which limit that is.
        share: ``limit_us / ours_us``.
        note: why a candidate is missing.
    """

    case: str
    version: str
    dtype: str
    kernel: str
    error: float
    ours_us: float
    host_us: float | None
    speedup: float | None
    bound: str
    limit_us: float
    share: float
    host_share: float | None
    host_error: float | None
    note: str


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
    """One way to answer: a jitted call, its pages threaded through (and donated) for v3."""

    def __init__(self, problem: _Problem, config: Any) -> None:
        import jax
        import jax.numpy as jnp

        from easydel_ragged_plugin import api

        self._problem = problem
        is_v3 = problem.version == "v3"
        index = [jnp.asarray(a) for a in (problem.context_lens, problem.block_tables, problem.query_start_loc)]
        options: dict[str, Any] = dict(problem.case.options)
        if is_v3:
            new = [jnp.asarray(a) for a in (problem.queries, problem.keys, problem.values)]
            rest = (*index, jnp.asarray(problem.distribution))

            def call(pages: Any, new: Any, rest: Any) -> Any:
                arguments: Any = (*new, pages, *rest)
                return api.ragged_page_attention_v3(*arguments, config=config, **options)

            self._call = jax.jit(call, donate_argnums=0)
            self._arguments: tuple[Any, tuple[Any, ...]] = (new, rest)
            self._pages = jnp.array(problem.pages)  # a copy: donating must not touch the problem's array
        else:
            rest = (*index, jnp.asarray([len(problem.case.rows)], jnp.int32))

            def call(pages: Any, new: Any, rest: Any) -> Any:
                return api.ragged_page_attention_v2(new, pages, *rest, config=config, **options), None

            self._call = jax.jit(call)
            self._arguments = (jnp.asarray(problem.queries), rest)
            self._pages = jnp.array(problem.updated)
        self.explain = lambda: api.explain(
            api.ragged_page_attention_v3 if is_v3 else api.ragged_page_attention_v2,
            *((*self._arguments[0], self._pages, *rest) if is_v3 else (self._arguments[0], self._pages, *rest)),
            config=config,
            **options,
        )

    def __call__(self) -> Any:
        output, pages = self._call(self._pages, *self._arguments)
        if pages is not None:
            self._pages = pages
        return output

    def check(self) -> float:
        """Largest deviation from the oracle over the sampled queries; infinite when v3's pages are not right."""
        output = np.asarray(self()).astype(np.float64)
        tokens, heads, expected = _sampled_answer(self._problem)
        if self._problem.version == "v3":
            written = np.asarray(self._pages)
            if written.tobytes() != self._problem.updated.tobytes():
                return math.inf
        error = np.abs(output[tokens][:, heads] - expected).max()
        return float(error) if np.isfinite(error) else math.inf

    def time_us(self, calls: int) -> float:
        """Mean microseconds of ``calls`` calls."""
        started = time.perf_counter()
        for _ in range(calls):
            output = self()
        output.block_until_ready()
        return (time.perf_counter() - started) / calls * 1e6


def _best_rate(work: Callable[[], None], amount: float, rounds: int = 5) -> float:
    work()
    fastest = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return amount / fastest


def _exhaust(pool: ThreadPoolExecutor, function: Callable[[Any], Any], parts: Sequence[Any]) -> None:
    for _ in pool.map(function, parts):
        pass


def measure_limits() -> Limits:
    """Read bandwidth over an array far larger than any cache, and float32 GEMM rate at 2048 x 2048 x 2048."""
    import jax
    import jax.numpy as jnp

    size = 1 << 28 if jax.default_backend() == "cpu" else 1 << 31
    ones = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    rate = _best_rate(lambda: total(ones).block_until_ready(), size)
    if jax.default_backend() == "cpu":
        # XLA may sum on one thread; NumPy releases the GIL, so threads show what the memory gives.
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        parts = np.array_split(np.ones(size // 4, np.float32), threads)
        with ThreadPoolExecutor(threads) as pool:
            for reduce in (np.max, np.sum):
                rate = max(rate, _best_rate(partial(_exhaust, pool, reduce, parts), size))
    matrix = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST))
    return Limits(rate, _best_rate(lambda: product(matrix).block_until_ready(), 2 * 2048**3))


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


def _run_case(
    case: Case,
    version: Version,
    kernel: str | None,
    repeats: int,
    with_host: bool,
    limits: Limits,
    say: Callable[[str], None],
) -> Result:
    label = f"{case.name} {version} {case.dtype}"
    say(f"{label}: building")
    problem = _build(case, version)
    ours = _Candidate(problem, kernel)
    chosen = str(ours.explain().kernel)
    say(f"{label}: compiling and checking {chosen}")
    error = ours.check()
    if not error <= _tolerance(case):
        raise SystemExit(
            f"{label}: {chosen} is WRONG (largest error {error:.3g}, allowed {_tolerance(case):.3g}); not timed. "
            "Please report this with the output of 'easydel-ragged doctor'."
        )
    theirs, note, host_error = None, "", None
    if with_host and chosen != "ejkernel":
        say(f"{label}: compiling and checking EasyDeL's kernel")
        try:
            theirs = _Candidate(problem, "ejkernel")
            host_error = theirs.check()
        except (Unsupported, ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as failure:
            # Whatever keeps the other kernel from running is a finding, not a failure of this benchmark.
            theirs, note = None, f"EasyDeL's kernel does not run: {str(failure).splitlines()[0][:160]}"
        else:
            if not host_error <= _tolerance(case):
                note = f"EasyDeL's kernel is wrong here: largest error {host_error:.2g}"
    candidates = [ours] if theirs is None else [ours, theirs]
    times: list[list[float]] = [[] for _ in candidates]
    # Enough calls for 50 ms a sample, so that the clock and the dispatch don't matter.
    calls = [max(1, min(1000, math.ceil(50_000 / each.time_us(1)))) for each in candidates]
    for repeat in range(repeats):
        say(f"{label}: timing {repeat + 1}/{repeats}")
        for index, each in enumerate(candidates):
            times[index].append(each.time_us(calls[index]))
    medians = [statistics.median(each) for each in times]
    data, flops = _work(case)
    read_us, gemm_us = data / limits.read_bytes_per_s * 1e6, flops / limits.gemm_flops_per_s * 1e6
    limit = max(read_us, gemm_us)
    host_us = medians[1] if len(medians) > 1 else None
    return Result(
        case=case.name,
        version=version,
        dtype=case.dtype,
        kernel=chosen,
        error=error,
        ours_us=medians[0],
        host_us=host_us,
        speedup=None if host_us is None else host_us / medians[0],
        bound="read" if read_us >= gemm_us else "gemm",
        limit_us=limit,
        share=limit / medians[0],
        host_share=None if host_us is None else limit / host_us,
        host_error=host_error if host_error is None or math.isfinite(host_error) else None,
        note=note,
    )


def _milliseconds(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1000:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="medians in ms; share: time at the machine's limit / time taken", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for heading in ("ms", "EasyDeL", "faster", "share", "EasyDeL", "limit", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            f"{result.case} {result.version} {result.dtype.replace('float', 'f')}",
            result.kernel,
            _milliseconds(result.ours_us),
            _milliseconds(result.host_us),
            "-" if result.speedup is None else f"{result.speedup:.1f}x",
            _percent(result.share),
            _percent(result.host_share),
            result.bound,
            f"{result.error:.0e}",
        )
    return table


def _chosen_cases(names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in BENCH_CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"--case: got {', '.join(unknown)}, wanted some of {', '.join(known)}. "
            "'easydel-ragged bench --list' describes them."
        )
    return [known[name] for name in names] if names else [case for case in BENCH_CASES if case.name != "smoke"]


def _check_kernel(kernel: str | None) -> None:
    from easydel_ragged_plugin import select

    known = select.kernels()
    if kernel is not None and kernel not in known:
        raise typer.BadParameter(f"--kernel: got {kernel!r}, wanted one of {', '.join(known)}.")


def run(
    *,
    names: Sequence[str],
    version: Version,
    kernel: str | None,
    dtypes: Sequence[str],
    repeats: int,
    json_file: Path | None,
    with_host: bool,
    list_only: bool,
) -> None:
    """See ``easydel-ragged bench --help``."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width; the table does
    if list_only:
        for case in BENCH_CASES:
            console.print(f"[bold]{case.name:28}[/bold] {case.about}", highlight=False)
        return
    cases = [dataclasses.replace(case, dtype=dtype) for case in _chosen_cases(names) for dtype in dtypes]
    # Left alone, ejkernel tunes itself on the first call of every shape: hundreds of runs of each candidate.
    os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("importing JAX", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        import jax

        _check_kernel(kernel)
        say("measuring the machine")
        limits = measure_limits()
        results = [_run_case(case, version, kernel, repeats, with_host, limits, say) for case in cases]
    console.print(
        f"{jax.devices()[0].device_kind} ({jax.default_backend()}), jax {jax.__version__}: reads "
        f"{limits.read_bytes_per_s / 1e9:.1f} GB/s, float32 GEMM {limits.gemm_flops_per_s / 1e9:.0f} GFLOP/s",
        highlight=False,
    )
    console.print(_table(results))
    for result in results:
        if result.note:
            console.print(f"{result.case} {result.dtype}: {result.note}", highlight=False, soft_wrap=True)
    if json_file is not None:
        report = {
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "jax": jax.__version__,
            "repeats": repeats,
            "limits": dataclasses.asdict(limits),
            "results": [dataclasses.asdict(result) for result in results],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {json_file}", highlight=False)
