"""Starts a process for each contestant on each workload, one after the other, and writes what they find as it comes.

A TPU belongs to one process at a time, so this one never starts JAX's backend. A process that hangs is ended, one that
crashes leaves its last line; either way the others are measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.workloads import geometry
from easydel_ragged_plugin.bench.work import work

from .processes import started
from .table import CONTESTANTS, TABLE, Entry

__all__ = ["child", "run", "write"]

TIMES = frozenset({"us", "samples_us", "first_call_s"})
"""What a dry run does not claim."""


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """What a started process does."""
    dry = asked["dry"]
    if dry:  # an interpreted kernel is a large program that runs once; JAX has not looked at this variable yet
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    from .measure import describe, measure

    if asked["case"] is None:
        return describe(dry)
    (entry,) = (each for each in TABLE if each.case.name == asked["case"])
    (contestant,) = (each for each in CONTESTANTS if (each.name, each.version) == tuple(asked["contestant"]))
    return measure(entry, contestant, Limits(**asked["limits"]), asked["repeats"], dry)


def write(report: dict[str, Any], file: Path | None) -> None:
    """Replace ``file`` as a whole: a run that is cut off leaves a report that can be read."""
    if file is None:
        return
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(file)


def about(entry: Entry) -> dict[str, Any]:
    """What a report says of a workload."""
    case, needed = entry.case, work(entry.case)
    return {
        "case": case.name,
        "geometry": geometry(case),
        "cache": case.cache_dtype or case.dtype,
        "moved_bytes": needed.moved_bytes,
        "flops": needed.flops,
    }


def run(
    entries: Sequence[Entry],
    kernels: Sequence[str],
    *,
    repeats: int,
    limit_s: float,
    dry: bool,
    file: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The report of ``entries`` for the contestants named ``kernels``. Without a TPU it has only ``refused``.

    In a dry run the report holds no time and no rate.
    """
    common = {"dry": dry, "repeats": repeats, "case": None}
    variables = {"JAX_PLATFORMS": "cpu"} if dry else {}
    say("the machine")
    first = started(common, limit_s, variables=variables)
    if "machine" not in first:
        why = first.get("refused") or "\n".join([*first["log"], first["why"]])
        return {"refused": why}
    report: dict[str, Any] = {
        "dry_run": dry,
        "machine": first["machine"],
        "limits": [] if dry else [first["limits"]],
        "workloads": [about(entry) for entry in entries],
        "results": [],
    }
    write(report, file)
    for entry in entries:
        for contestant in CONTESTANTS:
            if contestant.name not in kernels or contestant.version not in entry.versions:
                continue
            identity = {"case": entry.case.name, "kernel": contestant.name, "version": contestant.version}
            say(" ".join(identity.values()))
            pair = (contestant.name, contestant.version)
            asked = {**common, "case": entry.case.name, "contestant": pair, "limits": first["limits"]}
            answer = started(asked, limit_s, variables=variables)
            if dry:
                answer = {name: value for name, value in answer.items() if name not in TIMES}
            report["results"].append({**identity, **answer})
            write(report, file)
    if not dry:
        last = started(common, limit_s)  # a machine that has slowed down shows
        report["limits"] += [last["limits"]] if "limits" in last else []
        write(report, file)
    return report
