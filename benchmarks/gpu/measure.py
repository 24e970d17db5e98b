"""What the card gives, and how near each contestant comes to it. No answer is timed before it is checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from benchmarks.contestants import AUTO, Contestant
from benchmarks.limits import Limits
from benchmarks.workloads import geometry
from easydel_ragged_plugin.bench.problem import Problem, build, check, few_rows
from easydel_ragged_plugin.bench.timing import Step, copies_beyond_cache, seconds_per_call
from easydel_ragged_plugin.bench.work import Work, work
from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles

from .rivals import CONTESTANTS
from .table import OURS, WIDER, Entry


def update_step(problem: Problem, dry: bool) -> tuple[Problem, Step]:
    kernel = PallasGPU(interpret=dry)
    work = jax.jit(lambda operands: kernel.prepare(problem.request, AUTO, operands))(problem.operands)
    sizes = tiles.choose(problem.request, AUTO)

    def step(operands: Any) -> Any:
        return operands.queries, kernel.update(problem.request, sizes, operands.work, operands)

    return dataclasses.replace(problem, operands=problem.operands._replace(work=work)), step


def floors(entry: Entry, found: Limits) -> tuple[Work, float]:
    """(what the workload needs, seconds of its kinds of rows one after the other)."""
    case = entry.case
    if entry.update_only:
        moved = 2 * 2 * case.num_tokens * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
        needed = Work(cache_bytes=0, token_bytes=moved, flops=0.0)
        return needed, needed.seconds(*dataclasses.astuple(found))
    kinds = [tuple(row for row in case.rows if (row.new == 1) == short) for short in (True, False)]
    parts = [work(dataclasses.replace(case, rows=rows)) for rows in kinds if rows]
    return work(case), sum(part.seconds(*dataclasses.astuple(found)) for part in parts)


def measure(
    entry: Entry, contestant: Contestant, kernel: str, found: Limits, repeats: int, dry: bool
) -> dict[str, Any] | str:
    """Figures of one contestant, or why there are none. ``kernel`` is whom the entry's targets are for."""
    case, platform = entry.case, jax.default_backend()
    needed, apart = floors(entry, found)
    copies = 1 if dry else copies_beyond_cache(case)
    problem = build(case, contestant.version, copies=copies, platform=platform)
    # Whatever another kernel raises is what this script is to report.
    try:
        if entry.update_only:
            adapted, step = update_step(problem, dry)
        else:
            prepared = contestant.prepare(problem, dry)
            if isinstance(prepared, str):
                return prepared
            adapted, step = prepared
        output, pages = jax.block_until_ready(jax.jit(step)(adapted.operands))
        error, right = None, True
        if entry.update_only:  # its pages, as an attention of another kernel sees them
            answer, *_ = xla.KERNEL.forward(problem.request, AUTO, problem.operands._replace(pages=pages))
            error, right = check(problem, answer, pages, few_rows(case))
        else:
            unchanged = problem.operands.pages
            own_pages = adapted.operands.pages is unchanged
            error, right = check(problem, output, pages if own_pages else unchanged, few_rows(case))
        del output, pages
        expected = 1.0 if dry else max(needed.seconds(*dataclasses.astuple(found)), 2e-6)
        seconds, samples = seconds_per_call(adapted, step, expected_s=expected, repeats=repeats)
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
        "met": None if dry or contestant.name != kernel else entry.met(seconds, share, apart),
        "samples_us": [1e6 * each for each in samples],
    }


def run_entry(entry: Entry, kernel: str, found: Limits, repeats: int, dry: bool) -> dict[str, Any]:
    """Figures of a kernel of this package on a workload, and of all that it is compared with."""
    timings, notes = [], []
    for contestant in CONTESTANTS[kernel]:
        if entry.update_only and (contestant.name, contestant.version) != (OURS, "v3"):
            continue
        result = measure(entry, contestant, kernel, found, repeats, dry)
        label = f"{contestant.name} {contestant.version}"
        if isinstance(result, str):
            notes.append(f"{label}: {result}")
        elif not result["right"]:
            notes.append(f"{label}: WRONG, off by up to {result['error']:.3g}; {result['us']:.1f} us do not count")
        else:
            timings.append(result)
    wider = None
    ours = next((each for each in timings if each["kernel"] == kernel), None)
    if ours is not None and not entry.update_only and not dry:
        case = dataclasses.replace(entry.case, pages_per_row=WIDER * entry.case.pages_per_row)
        again = measure(dataclasses.replace(entry, case=case), CONTESTANTS[kernel][0], kernel, found, repeats, dry)
        if isinstance(again, str):
            notes.append(f"a table {WIDER} times as wide: {again}")
        else:
            wider = again["us"] / ours["us"]
    needed, apart = floors(entry, found)
    case = entry.case
    return {
        "case": case.name,
        "kernel": kernel,
        "geometry": geometry(case),
        "dtype": case.dtype,
        "version": "v2",
        "bound": "read" if needed.moved_bytes / found.copy_bytes_per_s >= needed.flops / found.matmul_flops_per_s
        else "gemm",
        "limit_us": 1e6 * needed.seconds(*dataclasses.astuple(found)),
        "sum_of_floors_us": 1e6 * apart,
        "target": entry.target(),
        "wider_table": wider,
        "timings": timings,
        "notes": notes,
    }  # fmt: skip
