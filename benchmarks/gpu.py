"""Ragged page attention on a GPU: is the answer right, and what share of the card's limits is reached.

    python benchmarks/gpu.py --json gpu.json --figure gpu.png

Needs JAX for the GPU and this package; EasyDeL only for its own kernels, which are reported as missing without it.
Every answer is compared with a float64 oracle, in samples, before it is timed. The limits are measured in the same
run: copying 2 GiB, and a bfloat16 product of 8192 x 8192 matrices.

Times are of many calls inside one compiled program (see ``easydel_ragged_plugin/cli/workload.py``): a call's output
is the next call's query, and each call reads pages that the one before it has not touched. JAX gives no access to
CUDA events; a program of 50 ms or more makes the cost of starting it small instead. Work that XLA can share between
the calls of a program (the lists made from row lengths) is shared, as the layers of a model share it.

``--dry-run`` walks the whole way on any machine, with short contexts in Pallas' interpreter. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# ejkernel would time 100 runs of each of its candidates inside of the first call.
os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.cli import workload as workloads
from easydel_ragged_plugin.cli.workload import Floor, Problem, Step, workload
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.kernels import ejkernel, xla
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles
from easydel_ragged_plugin.rows import plausible_rows
from easydel_ragged_plugin.testing.cases import Case, Row

OURS = "pallas_gpu"
VERSIONS = ("easydel-ragged-plugin", "jax", "jaxlib", "easydel", "ejkernel")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A workload and what is wanted of this package's kernel on it.

    ``share``: of the limit that binds, at least. ``us``: microseconds, at most. ``floors``: multiples of the least
    time of its row kinds one after the other, at most.
    """

    case: Case
    share: float | None = None
    us: float | None = None
    floors: float | None = None
    update_only: bool = False

    def target(self) -> str:
        if self.share is not None:
            return f">= {100 * self.share:.0f} %"
        return f"<= {self.us:.0f} us" if self.us is not None else f"<= {self.floors} floors"

    def met(self, seconds: float, share: float, sum_of_floors: float) -> bool:
        if self.share is not None:
            return share >= self.share
        return 1e6 * seconds <= self.us if self.us is not None else seconds <= (self.floors or 0) * sum_of_floors


def decodes(count: int, context: int) -> tuple[Row, ...]:
    return (Row(context, 1),) * count


def heads(q_heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}


K = 1024
GQA = heads(32, 8, 128)
OSS = {**heads(64, 8, 64), "sinks": "heads"}
TABLE = (
    Entry(workload("decode-64x2k", decodes(64, 2 * K), **GQA), share=0.80),
    Entry(workload("decode-16x4k-mha", decodes(16, 4 * K), **heads(32, 32, 128)), share=0.80),
    Entry(workload("decode-64x8k-mqa", decodes(64, 8 * K), **heads(8, 1, 128)), share=0.80),
    Entry(workload("decode-32x4k-d256", decodes(32, 4 * K), **heads(8, 4, 256)), share=0.80),
    Entry(workload("decode-1x128k", decodes(1, 128 * K), **GQA), share=0.70),
    Entry(workload("decode-64k-and-31x1k", decodes(1, 64 * K) + decodes(31, K), **GQA), share=0.70),
    Entry(workload("decode-1x8k", decodes(1, 8 * K), **GQA), us=20),
    Entry(workload("decode-64x8k-sinks", decodes(64, 8 * K), **OSS), share=0.75),
    Entry(workload("decode-64x8k-sinks-window", decodes(64, 8 * K), sliding_window=128, **OSS), us=15),
    Entry(workload("prefill-8k", (Row(8 * K, 8 * K),), **GQA), share=0.36),
    Entry(workload("chunk-2k-on-32k", (Row(34 * K, 2 * K),), **GQA), share=0.36),
    Entry(workload("mixed-63x4k-and-1k", (*decodes(63, 4 * K), Row(5 * K, K)), **GQA), floors=1.3),
    Entry(workload("update-8k", (Row(8 * K, 8 * K),), **GQA), floors=2.0, update_only=True),
)
WIDER = 8
MOST_WIDER = 1.05
"""The same work with a block table ``WIDER`` times as wide may take this much longer."""


def shortened(case: Case) -> Case:
    """A workload of the same kind that an interpreter can do: tens of tokens, and a row or two of each kind."""
    rows = [Row(max(2, row.context // 256), max(1, row.new // 256)) for row in case.rows]
    rows = rows[:1] + (rows[-1:] if len(rows) > 1 else [])
    lanes = {"head_dim": min(case.head_dim, 64), "q_heads": min(case.q_heads, 4), "kv_heads": min(case.kv_heads, 2)}
    window = None if case.sliding_window is None else 20
    return workload(case.name, tuple(rows), **lanes, page_size=16, sliding_window=window, sinks=case.sinks)


# Who answers.


@dataclasses.dataclass(frozen=True)
class Contestant:
    """``prepare`` gives the problem in the form of cache that it wants, and the call; or says why it can't."""

    name: str
    version: Any
    prepare: Callable[[Problem, bool], tuple[Problem, Step] | str]


def of_kernel(kernel: Any, config: RaggedPageConfig) -> Callable[[Problem, bool], tuple[Problem, Step] | str]:
    def prepare(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
        chosen = PallasGPU(interpret=True) if dry and isinstance(kernel, PallasGPU) else kernel
        refusal = chosen.refuses(problem.request)
        return refusal or (problem, lambda operands: chosen.forward(problem.request, config, operands))

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
            softmax_scale=case.scale, sliding_window=case.sliding_window, platform="xla" if dry else "triton",
        )  # fmt: skip
        return output, operands.pages

    return dataclasses.replace(problem, operands=problem.operands._replace(pages=apart)), step


def jax_paged_attention(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """JAX's own example of a paged decode kernel, in Triton, too. It does not scale the logits."""
    case = problem.case
    if any(row.new != 1 for row in case.rows) or case.sliding_window or case.sinks:
        return "takes decode rows without window and sinks"
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pages = problem.operands.pages
    apart: Any = tuple(jnp.moveaxis(pages[:, :, first::2], 2, 0) for first in (0, 1))
    width = case.pages_per_row
    splits = max(size for size in (1, 2, 4, 8, 16) if width % size == 0)
    block = max(size for size in (1, 2, 4, 8) if (width // splits) % size == 0)

    def step(operands: Any) -> Any:
        keys, values = operands.pages
        queries = (operands.queries * case.scale).astype(operands.queries.dtype)
        output = paged_attention(
            queries, keys, values, operands.block_tables, operands.context_lens,
            k_splits=splits, pages_per_compute_block=block, interpret=dry,
        )  # fmt: skip
        return output.astype(operands.queries.dtype), operands.pages

    return dataclasses.replace(problem, operands=problem.operands._replace(pages=apart)), step


def cudnn(problem: Problem, dry: bool) -> tuple[Problem, Step] | str:
    """cuDNN's attention over dense keys and values: what paging costs, and what the card gives a prompt."""
    case = problem.case
    if len(case.rows) != 1 or case.rows[0].context != case.rows[0].new or case.sliding_window or case.sinks:
        return "dense: takes one whole prompt without window and sinks"
    flat = problem.operands.pages[problem.tables[0][0]].reshape(-1, 2 * case.kv_heads, case.head_dim)
    dense: Any = tuple(flat[: case.num_tokens, first::2] for first in (0, 1))

    def step(operands: Any) -> Any:
        output = jax.nn.dot_product_attention(
            operands.queries[None], *(each[None] for each in operands.pages), scale=case.scale, is_causal=True,
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


# Measuring.


@dataclasses.dataclass(frozen=True)
class Limits:
    copy_bytes_per_s: float
    matmul_flops_per_s: float


def rate(function: Callable[[Any], Any], start: jax.Array, trips: int, amount: float) -> float:
    """Amount per second of ``function`` applied ``trips`` times in one program; the best of five."""
    program = jax.jit(lambda value: jax.lax.fori_loop(0, trips, lambda _, carry: function(carry), value))
    jax.block_until_ready(program(start))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(program(start))
        seconds.append(time.perf_counter() - started)
    return trips * amount / min(seconds)


def limits(dry: bool) -> Limits:
    """What the card gives: bytes copied (read and written), and bfloat16 operations, in a second."""
    size = 1 << (16 if dry else 30)
    copied = rate(lambda array: -array, jnp.ones(size, jnp.bfloat16), 20, 2 * 2 * size)
    side = 64 if dry else 8192
    # Columns of norm 1, so that products neither grow nor vanish: their numbers decide what power a card draws.
    matrix = (jax.random.normal(jax.random.key(0), (side, side)) * side**-0.5).astype(jnp.bfloat16)
    start = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = rate(lambda array: jnp.dot(array, matrix).astype(jnp.bfloat16), start, 20, 2.0 * side**3)
    return Limits(copied, product)


def update_step(problem: Problem, dry: bool) -> Step:
    kernel = PallasGPU(interpret=dry)
    sizes = tiles.choose(problem.request, RaggedPageConfig())

    def step(operands: Any) -> Any:
        rows = plausible_rows(problem.request, operands)
        return operands.queries, kernel.update(problem.request, sizes, rows, operands)

    return step


def floors(entry: Entry, found: Limits) -> tuple[Floor, float]:
    """(what the workload needs, seconds of its kinds of rows one after the other)."""
    case = entry.case
    if entry.update_only:
        moved = 2 * 2 * case.num_tokens * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
        needed = Floor(moved, 0.0)
        return needed, needed.seconds(*dataclasses.astuple(found))
    kinds = [tuple(row for row in case.rows if (row.new == 1) == short) for short in (True, False)]
    apart = [workloads.floor(case, rows).seconds(*dataclasses.astuple(found)) for rows in kinds if rows]
    return workloads.floor(case), sum(apart)


def measure(entry: Entry, contestant: Contestant, found: Limits, repeats: int, dry: bool) -> dict[str, Any] | str:
    """Figures of one contestant, or why there are none."""
    case, platform = entry.case, jax.default_backend()
    needed, apart = floors(entry, found)
    problem = workloads.build(case, contestant.version, copies=2 if dry else None, platform=platform)
    # Whatever another kernel raises is what this script is to report.
    try:
        if entry.update_only:
            adapted, step = problem, update_step(problem, dry)
        else:
            prepared = contestant.prepare(problem, dry)
            if isinstance(prepared, str):
                return prepared
            adapted, step = prepared
        output, pages = jax.block_until_ready(jax.jit(step)(adapted.operands))
        error, right = None, True
        if entry.update_only:  # its pages, as an attention of another kernel sees them
            answer, _ = xla.KERNEL.forward(problem.request, RaggedPageConfig(), problem.operands._replace(pages=pages))
            error, right = workloads.check(problem, answer, pages)
        else:
            error, right = workloads.check(problem, output, pages if adapted is problem else problem.operands.pages)
        del output, pages
        expected = 1.0 if dry else max(needed.seconds(*dataclasses.astuple(found)), 2e-6)
        seconds, samples = workloads.seconds_per_call(adapted, step, expected_s=expected, repeats=repeats)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    share = needed.seconds(*dataclasses.astuple(found)) / seconds
    return {
        "kernel": contestant.name,
        "version": contestant.version,
        "us": 1e6 * seconds,
        "share": share,
        "error": error,
        "right": right,
        "met": None if dry or contestant.name != OURS else entry.met(seconds, share, apart),
        "samples_us": [1e6 * each for each in samples],
    }


def run_entry(entry: Entry, found: Limits, repeats: int, dry: bool) -> dict[str, Any]:
    timings, notes = [], []
    for contestant in CONTESTANTS:
        if entry.update_only and (contestant.name, contestant.version) != (OURS, "v3"):
            continue
        result = measure(entry, contestant, found, repeats, dry)
        label = f"{contestant.name} {contestant.version}"
        if isinstance(result, str):
            notes.append(f"{label}: {result}")
        elif not result["right"]:
            notes.append(f"{label}: WRONG, off by up to {result['error']:.3g}; {result['us']:.1f} us do not count")
        else:
            timings.append(result)
    wider = None
    ours = next((each for each in timings if each["kernel"] == OURS), None)
    if ours is not None and not entry.update_only:
        case = dataclasses.replace(entry.case, pages_per_row=WIDER * entry.case.pages_per_row)
        again = measure(dataclasses.replace(entry, case=case), CONTESTANTS[0], found, repeats, dry)
        if isinstance(again, str):
            notes.append(f"a table {WIDER} times as wide: {again}")
        else:
            wider = again["us"] / ours["us"]
    needed, apart = floors(entry, found)
    case = entry.case
    return {
        "case": case.name,
        "geometry": f"{case.q_heads}/{case.kv_heads}/{case.head_dim}, pages of {case.page_size}",
        "dtype": case.dtype,
        "version": "v2",
        "bound": "read" if needed.read_bytes / found.copy_bytes_per_s >= needed.flops / found.matmul_flops_per_s
        else "gemm",
        "limit_us": 1e6 * needed.seconds(*dataclasses.astuple(found)),
        "sum_of_floors_us": 1e6 * apart,
        "target": entry.target(),
        "wider_table": wider,
        "timings": timings,
        "notes": notes,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Card, driver, versions and date."""
    driver = None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        driver = asked.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        pass  # no NVIDIA driver: the device's name says what there is
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": driver,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "tuned": str(tiles.tuned_file()) if tiles.read_tuned() else None,
    }


def ratio_to(results: Sequence[dict[str, Any]], kernel: str, version: str) -> float | None:
    """Median of (its time / ours), over the workloads where both are right."""
    found = []
    for each in results:
        us = {(t["kernel"], t["version"]): t["us"] for t in each["timings"]}
        if (kernel, version) in us and (OURS, version) in us:
            found.append(us[kernel, version] / us[OURS, version])
    return statistics.median(found) if found else None


def show(result: dict[str, Any], dry: bool) -> None:
    figures = ""
    if not dry:
        wider = "" if result["wider_table"] is None else f", table x{WIDER}: {result['wider_table']:.2f}"
        figures = f": floor {result['limit_us']:.1f} us, wanted {result['target']}{wider}"
    print(f"{result['case']} ({result['geometry']}){figures}")
    for each in result["timings"]:
        verdict = {None: "", True: "  reached", False: "  MISSED"}[each["met"]]
        times = "" if dry else f"{each['us']:10.1f} us {100 * each['share']:5.0f} %"
        print(f"  {each['kernel'] + ' ' + each['version']:24}{times}  error {each['error']:.1e}{verdict}")
    for note in result["notes"]:
        print(f"  - {note}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ragged page attention on a GPU: answers, times, limits.")
    parser.add_argument("--case", action="append", help="a workload by name; repeat it for several (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="short contexts in Pallas' interpreter, on any machine: no times"
    )
    options = parser.parse_args(arguments)
    names = [entry.case.name for entry in TABLE]
    if options.list:
        print("\n".join(names))
        return 0
    unknown = sorted(set(options.case or ()) - set(names))
    if unknown:
        print(f"--case: got {', '.join(unknown)}, wanted some of {', '.join(names)}.", file=sys.stderr)
        return 2
    dry = options.dry_run
    backend = jax.default_backend()
    if backend != "gpu" and not dry:
        print(
            f"This benchmark needs a GPU, and JAX's default backend is {backend!r}. Install JAX for it "
            "(pip install 'jax[cuda12]'), or see the way it goes with --dry-run.",
            file=sys.stderr,
        )
        return 2
    if options.figure:
        from easydel_ragged_plugin.cli import figure

        figure.require()

    report: dict[str, Any] = {"dry_run": dry, "machine": machine()}
    first = limits(dry)
    facts = report["machine"]
    about = f"{facts['device']}, driver {facts['driver'] or 'unknown'}, JAX {facts['versions']['jax']}, {facts['date']}"
    print(about)
    if dry:
        print("DRY RUN: short contexts, interpreted. Answers are checked; no time or rate in here means anything.")
    else:
        rates = f"{first.copy_bytes_per_s / 1e9:.0f} GB/s copied, {first.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
        print(f"limits: {rates} (bfloat16, 8192^3)")
    results = []
    for entry in TABLE:
        if options.case and entry.case.name not in options.case:
            continue
        chosen = dataclasses.replace(entry, case=shortened(entry.case)) if dry else entry
        results.append(run_entry(chosen, first, options.repeats, dry))
        show(results[-1], dry)
    report["limits"] = [dataclasses.asdict(each) for each in (first, limits(dry))]  # before and after
    report["ratios"] = {
        f"{name} {version}": ratio_to(results, name, version)
        for name, version in (("unified_attention", "v2"), ("ejkernel", "v2"), ("ejkernel", "v3"), ("xla", "v2"))
    }
    report["results"] = results
    wrong = [each["case"] for each in results if not any(t["kernel"] == OURS for t in each["timings"])]
    if not dry:
        for name, value in report["ratios"].items():
            print(f"{name}: {'no figure' if value is None else f'{value:.2f} times our time, median'}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(report, options.figure)
    if wrong:
        print(f"pallas_gpu has no right answer for: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def draw(report: dict[str, Any], file: Path) -> None:
    """The picture: for each workload, the share of the limit that each contestant reaches."""
    from easydel_ragged_plugin.cli import figure

    facts, found = report["machine"], report["limits"][0]
    versions = " · ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = f"{found['copy_bytes_per_s'] / 1e9:.0f} GB/s, bfloat16 {found['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    subtitle = f"{facts['device']}, driver {facts['driver'] or 'unknown'}: copies {rates}\n{versions} · {facts['date']}"
    if report["dry_run"]:
        subtitle = "DRY RUN in an interpreter: these bars mean nothing\n" + versions
    results = [
        {**each, "timings": [{**t, "kernel": f"{t['kernel']} {t['version']}"} for t in each["timings"]]}
        for each in report["results"]
    ]
    figure.draw({"results": results, "subtitle": subtitle, "limit_names": {"read": "copy", "gemm": "matmul"}}, file)


if __name__ == "__main__":
    sys.exit(main())
