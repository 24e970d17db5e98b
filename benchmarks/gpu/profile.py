"""A profile of one workload on a GPU: the trace that TensorBoard and Perfetto read, and what each kernel took.

python -m benchmarks.gpu.profile --case decode-64x2k --out FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.workloads import shortened
from easydel_ragged_plugin.bench.problem import build
from easydel_ragged_plugin.bench.timing import copies_beyond_cache

from .rivals import CONTESTANTS
from .table import OURS, TABLE

CALLS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A profile of one workload on a GPU.")
    names = [entry.case.name for entry in TABLE if not entry.update_only]
    parser.add_argument("--case", choices=names, default=names[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trace")
    parser.add_argument("--dry-run", action="store_true", help="short contexts in Pallas' interpreter, on any machine")
    options = parser.parse_args(arguments)
    (entry,) = (each for each in TABLE if each.case.name == options.case)
    if options.dry_run:
        entry = dataclasses.replace(entry, case=shortened(entry.case))
    elif jax.default_backend() != "gpu":
        print(f"got JAX's backend {jax.default_backend()!r}, wanted gpu, or --dry-run", file=sys.stderr)
        return 2
    contestant = CONTESTANTS[OURS][0]
    copies = 1 if options.dry_run else copies_beyond_cache(entry.case)
    problem = build(entry.case, contestant.version, copies=copies, platform=jax.default_backend())
    prepared = contestant.prepare(problem, options.dry_run)
    if isinstance(prepared, str):
        print(prepared, file=sys.stderr)
        return 1
    adapted, step = prepared
    call = jax.jit(step)
    jax.block_until_ready(call(adapted.operands))  # compiled before the trace
    options.out.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(options.out)):
        for index in range(1 if options.dry_run else CALLS):
            operands = adapted.operands._replace(block_tables=adapted.tables[index % len(adapted.tables)])
            output, _ = call(operands)
        jax.block_until_ready(output)
    print(f"the trace is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
