"""All that is wanted of a first half hour on a card, as commands of their own: see first_half_hour.md.

    python -m benchmarks.gpu.half_hour --out FOLDER

Each command is a process with a time limit, so one that hangs or crashes leaves the others. What each prints and finds
is written when it ends. Run it again with the same folder: commands that have ended well are left out.

Commands about a kernel that this machine can't run are skipped, and so are those that follow from one that failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import NOT_HERE, ended

from .table import MOSAIC, OURS, TABLE, TABLES

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480.0
FIRST_LIMIT_S = 120.0
"""For one case of a kernel that may never end."""
GEOMETRIES = (("32", "8", "128"), ("64", "8", "64"))
"""Query heads, kv heads and head_dim that are tuned. The Mosaic kernel is tried with the first."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its name, its arguments after Python's, and its environment variables. ``needs``: the command that
    has to have ended well before it."""

    name: str
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    needs: str | None = None
    limit_s: float = LIMIT_S


def commands(out: Path, dry: bool) -> Iterator[Command]:
    """All commands, in their order. Those that follow from results come when these are there."""
    dry_run = ("--dry-run",) if dry else ()
    tuned = (("EASYDEL_RAGGED_CACHE", str(out / "tuned")),)
    for part in ("Results", "Laws"):
        for version in ("v3", "v2"):
            yield _contract(f"contract-{part}-{version}", f"Test{part} and {version}", out, dry)
    names = [entry.case.name for entry in TABLE]
    for name in names[:1] if dry else names:
        yield Command(f"table-{name}", (*_table(name, out / f"table-{name}.json"), *dry_run))
    trace = ("--out", str(out / "trace"), *dry_run)
    yield Command("profile", ("-m", "benchmarks.gpu.profile", "--case", "decode-64x2k", *trace))
    for q_heads, kv_heads, head_dim in GEOMETRIES[:1] if dry else GEOMETRIES:
        tune = _tune(OURS, ("4", "2", "32") if dry else (q_heads, kv_heads, head_dim), dry)
        yield Command(f"tune-{q_heads}-{kv_heads}-{head_dim}", tune, tuned)
    yield from _mosaic(out, dry, tuned)
    for name in names:
        if missed(out / f"table-{name}.json"):
            yield Command(f"again-{name}", _table(name, out / f"again-{name}.json"), tuned)


def _mosaic(out: Path, dry: bool, tuned: tuple[tuple[str, str], ...]) -> Iterator[Command]:
    """Those about the Mosaic kernel. No card has run it, so one case comes first: the others wait for its end.

    Then it is tried as users try it. The contract and the workloads tell what is wrong where it does not pass.
    """
    first = "mosaic-first"
    which = "TestMosaicResults and v3 and " + ("mixed" if dry else "several-blocks-plain")
    yield dataclasses.replace(_contract(first, which, out, dry), limit_s=LIMIT_S if dry else FIRST_LIMIT_S)
    trial = _tune(MOSAIC, ("4", "2", "64") if dry else GEOMETRIES[0], dry)
    yield Command(f"mosaic-trial-{'-'.join(GEOMETRIES[0])}", trial, tuned, needs=first)
    contracts, tables = [], []
    for part, version in (("Results", "v3"), ("Results", "v2"), ("Laws", "v3")):
        which = f"TestMosaic{part} and {version}"
        contracts.append(_contract(f"mosaic-contract-{part}-{version}", which, out, dry))
    for entry in TABLES[MOSAIC][: 1 if dry else None]:
        name = f"mosaic-{entry.case.name}"
        how = ("--kernel", MOSAIC, *(("--dry-run",) if dry else ()))
        tables.append(Command(name, (*_table(entry.case.name, out / f"{name}.json"), *how)))
    for command in (*contracts[:1], *tables, *contracts[1:]):
        yield dataclasses.replace(command, needs=first)


def _tune(kernel: str, geometry: tuple[str, str, str], dry: bool) -> tuple[str, ...]:
    """Tune a kernel, or try it, with so many query heads and kv heads, and this head_dim."""
    options = zip(("--q-heads", "--kv-heads", "--head-dim"), geometry, strict=True)
    how = ("--interpret", "--page-size", "16") if dry else ()
    shape = (part for option in options for part in option)
    return ("-m", "easydel_ragged_plugin", "tune", "--kernel", kernel, *shape, *how)


def _contract(name: str, which: str, out: Path, dry: bool) -> Command:
    """Tests of contract.py. ``which``: pytest's ``-k``."""
    how = ("-q", "-rfE", "-p", "no:cacheprovider", "-k", which, f"--junitxml={out / f'{name}.xml'}")
    # XLA has a thread for each processor, or so many; those of Mosaic's interpreter wait for one another.
    variables = (("EASYDEL_RAGGED_DRY_RUN", "1"), ("NPROC", "8")) if dry else (("EASYDEL_RAGGED_DRY_RUN", "0"),)
    return Command(name, ("-m", "pytest", str(ROOT / "benchmarks" / "gpu" / "contract.py"), *how), variables)


def _table(case: str, file: Path) -> tuple[str, ...]:
    return (str(ROOT / "benchmarks" / "gpu"), "--case", case, "--json", str(file))


def missed(file: Path) -> bool:
    """Whether a workload was timed, and its target was not reached."""
    if not file.exists():
        return False
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return any(timing["met"] is False for result in results for timing in result["timings"])


def run(command: Command, out: Path, limit_s: float) -> dict[str, Any]:
    """What became of a command: its status, seconds and last lines. Its output is in ``NAME.log``."""
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, **dict(command.variables)}
    line = (sys.executable, *command.arguments)
    limit_s = min(limit_s, command.limit_s)
    code, lines = ended(line, out / f"{command.name}.log", limit_s, variables=variables, folder=out)
    known = {None: "timed out", 0: "ok", NOT_HERE: "skipped"}
    return {
        "status": known.get(code, f"exit code {code}"),
        "seconds": round(time.monotonic() - begin, 1),
        "last": lines[-3:],
    }


def skipped(command: Command, done: dict[str, Any]) -> dict[str, Any] | None:
    """What becomes of a command without what it needs; None where it can run, or what it needs has not been tried."""
    before = done.get(command.needs or "")
    if before is None or before["status"] == "ok":
        return None
    return {"status": "skipped", "seconds": 0.0, "last": [f"{command.needs}: {before['status']}", *before["last"][-1:]]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All that is wanted of a first half hour on a card.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for what is found; what has ended well there is left out"
    )
    parser.add_argument("--only", help="commands whose names contain this")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each command")
    parser.add_argument("--dry-run", action="store_true", help="the same way on any machine, interpreted: no times")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "done.json"
    done: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for command in commands(out, options.dry_run):
        if (options.only or "") not in command.name or done.get(command.name, {}).get("status") == "ok":
            continue
        print(f"{command.name} ...", flush=True)
        done[command.name] = found = skipped(command, done) or run(command, out, options.limit)
        beside = file.with_suffix(".new")
        beside.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        beside.replace(file)
        print(f"{command.name}: {found['status']}, {found['seconds']:.0f} s", *found["last"], sep="\n    ", flush=True)
    passed_over = [name for name, found in done.items() if found["status"] == "skipped"]
    bad = [name for name, found in done.items() if found["status"] not in ("ok", "skipped")]
    well = len(done) - len(bad) - len(passed_over)
    others = [f"{what} {', '.join(names)}" for what, names in (("not", bad), ("skipped", passed_over)) if names]
    print("; ".join([f"{well} of {len(done)} commands ended well", *others]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
