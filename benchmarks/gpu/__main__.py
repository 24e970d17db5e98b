"""Ragged page attention on a GPU: is the answer right, and what share of the card's limits is reached.

    python benchmarks/gpu --json gpu.json --figure gpu.png

Needs JAX for the GPU and this package; EasyDeL only for its own kernels, which are reported as missing without it.
Every answer is compared with a float64 oracle, in samples, before it is timed. The limits are measured in the same
run: copying 2 GiB, and a bfloat16 product of 8192 x 8192 matrices.

Times are of many calls inside one compiled program (see ``easydel_ragged_plugin/bench/timing.py``): a call's output
is the next call's query, and each call reads pages that the one before it has not touched. JAX gives no access to
CUDA events; a program of 50 ms or more makes the cost of starting it small instead. The lists that are made from row
lengths are made before the program, as layers share them; the contestants "and lists" make them in each call.

``--kernel`` names whom the targets are for; that for Hopper is measured on the workloads with long rows. Where it
can't run, the program says why and ends with exit code 77.

``--dry-run`` walks the whole way on any machine, with short contexts in Pallas' interpreter. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

# `python benchmarks/gpu` finds the package, too.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu.measure import run_entry
from benchmarks.gpu.report import driver, show
from benchmarks.gpu.rivals import CONTESTANTS
from benchmarks.gpu.table import MOSAIC, OURS, TABLES
from benchmarks.limits import limits
from benchmarks.processes import NOT_HERE
from benchmarks.workloads import draw, machine, ratio, shortened
from easydel_ragged_plugin.bench import figure
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.kernels import pallas_gpu, pallas_mosaic_gpu
from easydel_ragged_plugin.terminal import CommandError, require_writable


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ragged page attention on a GPU: answers, times, limits.")
    parser.add_argument("--case", action="append", help="a workload by name; repeat it for several (default: all)")
    parser.add_argument("--kernel", choices=TABLES, default=OURS, help=f"whose targets these are (default: {OURS})")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="short contexts in Pallas' interpreter, on any machine: no times"
    )
    options = parser.parse_args(arguments)
    ours, table = options.kernel, TABLES[options.kernel]
    names = [entry.case.name for entry in table]
    if options.list:
        print("\n".join(names))
        return 0
    unknown = sorted(set(options.case or ()) - set(names))
    if unknown:
        print(f"--case: got {', '.join(unknown)}, wanted some of {', '.join(names)}.", file=sys.stderr)
        return 2
    dry = options.dry_run
    if dry:  # an interpreted kernel is a large program that runs once; JAX has not looked at these variables yet
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        os.environ.setdefault("NPROC", "8")  # threads of XLA: in Mosaic's interpreter they wait for one another
    backend = jax.default_backend()
    if backend != "gpu" and not dry:
        print(
            f"This benchmark needs a GPU, and JAX's default backend is {backend!r}. Install JAX for it "
            "(pip install 'jax[cuda12]'), or see the way it goes with --dry-run.",
            file=sys.stderr,
        )
        return 2
    if ours == MOSAIC:
        reason = pallas_mosaic_gpu.PallasMosaicGPU(interpret=dry).facts()["reason"]
        if reason is not None:
            print(f"{MOSAIC}: {reason}", file=sys.stderr)
            return NOT_HERE
    try:
        if options.figure:
            figure.require(options.figure)
        for option, file in (("--json", options.json), ("--figure", options.figure)):
            if file:
                require_writable(option, file)
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    report: dict[str, Any] = {
        "dry_run": dry,
        "machine": machine({OURS: pallas_gpu, MOSAIC: pallas_mosaic_gpu}[ours].KERNEL, driver()),
    }
    first = limits(dry)
    facts = report["machine"]
    about = f"{facts['device']}, driver {facts['driver'] or 'unknown'}, JAX {facts['versions']['jax']}, {facts['date']}"
    print(about)
    if dry:
        print("DRY RUN: short contexts, interpreted. Answers are checked; no time or rate in here means anything.")
    else:
        print(f"limits: {first.text()}")
    results, contestants = [], CONTESTANTS[ours]
    for entry in table:
        if options.case and entry.case.name not in options.case:
            continue
        chosen = dataclasses.replace(entry, case=shortened(entry.case)) if dry else entry
        results.append(run_entry(chosen, ours, first, options.repeats, dry))
        show(results[-1], dry)
    report["limits"] = [dataclasses.asdict(each) for each in (first, limits(dry))]  # before and after
    report["ratios"] = {
        f"{each.name} {each.version}": ratio(results, each, ours) for each in contestants if each.name != ours
    }
    report["results"] = results
    wrong = [each["case"] for each in results if not any(t["kernel"] == ours for t in each["timings"])]
    if not dry:
        for name, value in report["ratios"].items():
            print(f"{name}: {'no figure' if value is None else f'{value:.2f} times the time of {ours}, median'}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(results, contestants, facts, first, dry, options.figure)
    if wrong:
        print(f"{ours} has no right answer for: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    with interruptible(at_once=True):
        sys.exit(main())
