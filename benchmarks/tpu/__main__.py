"""Ragged page attention on a TPU: is the answer right, and what share of the machine's limits is reached.

    python -m benchmarks.tpu --json tpu.json
    python -m benchmarks.tpu report tpu.json --figure tpu.png
    python -m benchmarks.tpu schedules

The first command needs a TPU, JAX for it and this package; EasyDeL only for its own kernels, which are reported as
refused without it. Every contestant runs on every workload in a process of its own, with a time limit, so a hang or a
crash costs one line. Answers are compared with a float64 oracle, in samples, before they are timed; wrong ones are not
timed. The limits are measured in the same run: copying 2 GiB, and a bfloat16 product of 8192 x 8192 matrices.

Times are of many calls inside one compiled program (see ``easydel_ragged_plugin/bench/timing.py``): a call's output
is the next call's query.

``--dry-run`` walks the whole way on any machine, with short contexts and the kernel interpreted. It reports no time.

The third command compiles for described TPUs, on any machine with libtpu: see ``schedules.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# `python benchmarks/tpu` finds the package, too.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.tpu import report as reports
from benchmarks.tpu import schedules
from benchmarks.tpu.processes import answer
from benchmarks.tpu.run import child, run
from benchmarks.tpu.table import CONTESTANTS, TABLE

KERNELS = tuple(dict.fromkeys(each.name for each in CONTESTANTS))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.tpu", description="Ragged page attention on a TPU: answers, times, limits."
    )
    parser.add_argument("--case", action="append", help="a workload by name; repeat it for several (default: all)")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="a kernel (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for one process (default: 600)")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument("--dry-run", action="store_true", help="short contexts, interpreted, on any machine: no times")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", title="other commands")
    shown = commands.add_parser("report", help="show a report")
    shown.add_argument("file", type=Path, help="what --json has written")
    shown.add_argument("--figure", type=Path, help="draw it into this file (needs matplotlib)")
    schedules.add_arguments(commands.add_parser("schedules", help="bundles of the kernels' inner loops, without a TPU"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.command == "schedules":
        return schedules.main(options)
    if options.command == "report":
        report = json.loads(options.file.read_text(encoding="utf-8"))
        print(reports.text(report))
        if options.figure:
            reports.figure(report, options.figure)
        return 0
    if options.one:
        answer(options.one, child)
        return 0
    names = [entry.case.name for entry in TABLE]
    if options.list:
        print("\n".join(names))
        return 0
    unknown = sorted(set(options.case or ()) - set(names))
    if unknown:
        print(f"--case: got {', '.join(unknown)}, wanted some of {', '.join(names)}.", file=sys.stderr)
        return 2
    report = run(
        [entry for entry in TABLE if not options.case or entry.case.name in options.case],
        options.kernel or KERNELS,
        repeats=options.repeats,
        limit_s=options.limit,
        dry=options.dry_run,
        file=options.json,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if "refused" in report:
        print(report["refused"], file=sys.stderr)
        return 2
    print(reports.text(report))
    wrong = reports.unmet(report)
    for each in wrong:
        print(f"No right answer: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
