"""The matrix of docs/models.md: every family of the zoo, served by EasyDeL and compared with transformers.

In ``tests/``, ``python -m zoo.matrix`` serves our operations, and fails where their answers differ for another reason
than a fault of EasyDeL: one that its own forward pass without a cache has, too, or that ``families.py`` states. With
``--write`` it measures EasyDeL's own classes, too, and writes the matrix into that page, between its markers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_model
from zoo import scenarios, serve
from zoo.families import FAMILIES, Family

from easydel_ragged_plugin.demo.engine import import_host
from easydel_ragged_plugin.demo.workers import Workers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- matrix: written by `nox -s zoo -- --write` -->", "<!-- end of the matrix -->"
COLUMNS = {"ours-v2": "v2", "ours-v3": "v3", "host-v2": "EasyDeL's v2", "host-v3": "EasyDeL's v3"}

CONTROLLED = "Mistral"
"""The family that is also served by an operation with a mistake, which must be found."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA optimizes little: most of the time goes into compiling programs that run a dozen times."""

Task = Callable[[str], dict[str, Any]]
"""Takes a folder of its own, and returns what JSON can hold."""


def forked(target: Callable[[], Any], log: Path) -> int:
    """Run ``target`` in a copy of this process, its output in ``log``; returns the id of the copy.

    Each family has a process of its own, so that a crash ends that family alone. A copy, because importing EasyDeL
    takes longer than serving a tiny model: this process has imported it, and never touches a device.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        target()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def tokenizer_processes(scratch: Path) -> Iterator[Endpoints]:
    """EasyDeL's two tokenizer processes, for all families: they have one tokenizer."""
    folder, written, leave = scratch / "tokenizer", scratch / "endpoints", scratch / "leave"
    folder.mkdir()
    tiny_model.save_tokenizer(folder)

    def keep() -> None:
        with Workers(str(folder)) as workers:
            (scratch / "half").write_text(json.dumps(workers.endpoints))
            (scratch / "half").rename(written)
            while not leave.exists() and os.getppid() == parent:
                time.sleep(0.5)

    parent = os.getpid()
    process = forked(keep, scratch / "tokenizer.log")
    try:
        while not written.exists():
            if os.waitpid(process, os.WNOHANG)[0]:
                raise RuntimeError((scratch / "tokenizer.log").read_text()[-2000:])
            time.sleep(0.2)
        yield Endpoints(json.loads(written.read_text()))
    finally:
        leave.touch()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


class Endpoints(Workers):
    """Tokenizer processes that another process keeps."""

    def __init__(self, endpoints: dict[str, str]) -> None:
        self._endpoints = endpoints

    @property
    def endpoints(self) -> dict[str, str]:
        """Arguments of the engine that make it use these processes."""
        return self._endpoints


def run(tasks: dict[str, Task], jobs: int, logs: Path) -> Iterator[tuple[str, Any]]:
    """The results of ``tasks``, ``jobs`` at a time, as they come; a string says how a process ended without one."""
    waiting = list(tasks.items())
    running: dict[int, tuple[str, Path, Path]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, task = waiting.pop(0)
            log = logs / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.log"
            result = log.with_suffix(".json")

            def child(task: Task = task, result: Path = result) -> None:
                with tempfile.TemporaryDirectory() as folder, serve.no_parsers():
                    result.write_text(json.dumps(task(folder)))

            result.unlink(missing_ok=True)
            running[forked(child, log)] = (name, log, result)
        process, status = os.waitpid(-1, 0)
        if process not in running:  # the tokenizer processes
            raise RuntimeError("EasyDeL's tokenizer processes have ended")
        name, log, result = running.pop(process)
        if os.waitstatus_to_exitcode(status) == 0:
            yield name, json.loads(result.read_text())
        else:
            yield name, f"the process ended with {os.waitstatus_to_exitcode(status)}, see {log}"


def cell(entry: dict[str, Any] | None) -> str:
    """What the matrix says about one engine."""
    if entry is None:
        return "not measured"
    text = str(entry["outcome"])
    if entry.get("rounded"):
        text += " (1)"
    if entry["outcome"] == serve.DIFFERS and entry["as_plain_forward"] is True:
        text += " (2)"
    if "operation" in entry:
        text += f"; operation {entry['operation'].partition(':')[0]}"
    return text


def remarks(family: Family, engines: dict[str, dict[str, Any]]) -> str:
    """What a reader must know about the family, and what the engines said that are not equal."""
    parts = [f"{each}." for each in ("; ".join(filter(None, (family.remark, family.fault))),) if each]
    said: dict[str, list[str]] = {}
    for label, entry in engines.items():
        if entry["outcome"] != serve.EQUAL:
            one = entry.get("one_at_a_time")
            detail = entry["detail"] + (f"; one request at a time: {one}" if one else "")
            said.setdefault(detail, []).append(COLUMNS[label])
    parts += [f"{' and '.join(who)}: {detail.rstrip('.')}." for detail, who in said.items()]
    return " ".join(parts)


def page(results: dict[str, Any]) -> str:
    """The matrix in Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    told = []
    for family in FAMILIES:
        engines = results["families"].get(family.name, {})
        lines.append(f"| {family.name} | {' | '.join(cell(engines.get(label)) for label in COLUMNS)} |")
        if remark := remarks(family, engines):
            told.append(f"- {family.name}: {remark}")
    lines += ["", *told, ""]
    played = results["scenarios"]
    lines += [f"| | {' | '.join(played)} |", "|---" * (len(played) + 1) + "|"]
    for scenario in scenarios.SCENARIOS:
        lines.append(f"| {scenario} | {' | '.join(each.get(scenario, 'not measured') for each in played.values())} |")
    return "\n".join(lines)


def faults(results: dict[str, Any]) -> list[str]:
    """What is not as it should be: of our operations, each in a line."""
    found = []
    for family in FAMILIES:
        for label, entry in results["families"].get(family.name, {}).items():
            if not label.startswith("ours") or entry["outcome"] == serve.EQUAL:
                continue
            where = f"{family.name}, {label}: {cell(entry)}: {entry['detail']}"
            stated = family.fault and label.partition("-")[2] in family.faulty
            if not stated and entry.get("as_plain_forward") is not True:
                found.append(f"{where}. Wanted: equal, or a fault of EasyDeL stated in families.py")
            elif "WRONG" in entry["operation"]:
                found.append(f"{where}. Wanted: answers of the operation as the reference's; {entry['operation']}")
    for engine, verdicts in results["scenarios"].items():
        for scenario, verdict in verdicts.items():
            if scenario != scenarios.WRONG_IN_EASYDEL and not verdict.startswith("equal"):
                found.append(f"{engine}, {scenario}: {verdict}. Wanted: equal")
    for name, control in results["controls"].items():
        for what, entry in control.items():
            if entry["outcome"] != serve.DIFFERS:
                found.append(f"{name}: {what}: {cell(entry)}: {entry['detail']}. Wanted: a difference that is found")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="families: their names, or how some begin")
    parser.add_argument(
        "--engines", nargs="*", choices=serve.LABELS, help="columns: ours, and with --write all; none if none is named"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--results", type=Path, help="file to keep results in; those that it has are kept")
    parser.add_argument("--logs", type=Path, help="folder for what the processes print")
    parser.add_argument("--no-scenarios", action="store_true", help="families alone")
    parser.add_argument("--write", nargs="?", type=Path, const=PAGE, help="page to write the matrix into")
    given = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    labels = given.engines
    if labels is None:
        labels = serve.LABELS if given.write else serve.LABELS[:2]
    results: dict[str, Any] = {"families": {}, "scenarios": {}, "controls": {}}
    if given.results and given.results.exists():
        results |= json.loads(given.results.read_text())
    with tempfile.TemporaryDirectory() as name:
        logs = given.logs or Path(name, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        for kind, task, result in measured(given, labels, Path(name), logs):
            if isinstance(result, str):  # the process ended
                failed = result if kind == "scenarios" else {"outcome": serve.FAILS, "detail": result}
                parts = {"families": labels, "scenarios": scenarios.SCENARIOS, "controls": ("no answer",)}[kind]
                result = dict.fromkeys(parts, failed)
            results[kind].setdefault(task, {}).update(result)
            for label, entry in result.items():
                said = entry if isinstance(entry, str) else f"{cell(entry)}: {entry['detail']}"
                print(f"{task} | {label} | {said}", flush=True)
            if given.results:
                given.results.write_text(json.dumps(results, indent=1))
    if given.write:
        before, _, rest = given.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        given.write.write_text(f"{before}{BEGIN}\n\n{page(results)}\n\n{END}{after}")
    wrong = faults(results)
    print("\n".join(wrong) or "Our operations: all as they should be")
    return bool(wrong)


def measured(
    given: argparse.Namespace, labels: Sequence[str], scratch: Path, logs: Path
) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, result) of each family and scenario that the command line asks for."""
    names = {each.name for each in FAMILIES}
    beginnings = tuple(set(given.only) - names)
    families = [
        each for each in FAMILIES if not given.only or each.name in given.only or each.name.startswith(beginnings)
    ]
    tasks: dict[str, tuple[str, Task]] = {}
    if not labels and given.no_scenarios:
        return
    import_host()  # and with it torch and transformers: the copies have them
    with tokenizer_processes(scratch) as workers:
        for family in families:
            if labels:
                tasks[family.name] = "families", functools.partial(serve.serve, family, labels=labels, workers=workers)
            if family.name in scenarios.FAMILIES and not given.no_scenarios:
                for version in ("v2", "v3"):
                    play = functools.partial(scenarios.play, family, version=version, workers=workers)
                    tasks[f"{family.name}, {version}"] = "scenarios", play
            if family.name == CONTROLLED and not given.no_scenarios:
                control = functools.partial(serve.with_a_window_too_short, family, workers=workers)
                tasks[f"{family.name}, control"] = "controls", control
        for name, result in run({name: task for name, (_, task) in tasks.items()}, given.jobs, logs):
            yield tasks[name][0], name, result


if __name__ == "__main__":
    sys.exit(main())
