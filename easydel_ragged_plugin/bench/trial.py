"""The trial of a kernel that may never end: whether it is right and fast enough to be chosen on this machine.

The kernel runs in a process of its own (``trial_steps.py``), which is ended with all that it has started when a step
takes too long. This one reads what the steps have found, and has the kernel keep the verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from easydel_ragged_plugin.interrupt import at_leaving
from easydel_ragged_plugin.terminal import CommandError
from easydel_ragged_plugin.types import AttentionRequest, Kernel, Trial

from .geometry import Geometry
from .timing import LEAST_GAIN

__all__ = ["Child", "Tried", "try_kernel"]

STARTING = "the start"
START_LIMIT_S = 120.0
"""For a process that imports JAX and starts its backend."""
END_LIMIT_S = 20.0
"""For a process that has said its last word, or was killed."""


class Child:
    """A process that says what it does in lines of JSON, on its standard output. Ctrl-C ends it, too.

    Args:
        command: program and arguments.
        variables: environment variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
            errors="replace", env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip
        at_leaving.append(self.kill)
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # of somebody else
                found = json.loads(line)
                if isinstance(found, dict):
                    self._lines.put(found)
        self._lines.put(None)

    def line(self, limit_s: float) -> dict[str, Any] | None:
        """The next line; None at the end.

        Raises:
            TimeoutError: there is none after ``limit_s`` seconds.
        """
        try:
            return self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise TimeoutError from None

    def kill(self) -> None:
        """End it at once, with all that it has started. One that has ended is left alone."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def last_words(self) -> str:
        """How it has ended, and the last line of its log."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT_S)
        code = self._process.poll()
        if code is None:
            how = "closed its output and runs on"
        else:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1].strip()[:200]}" if lines else how

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT_S)
        at_leaving.remove(self.kill)
        self._reader.join(END_LIMIT_S)
        streams = [self._process.stdin, self._log, *([] if self._reader.is_alive() else [self._process.stdout])]
        for stream in streams:
            if stream is not None:
                stream.close()


@dataclasses.dataclass
class Tried:
    """What a trial has found.

    Attributes:
        checked: the steps that have ended well and are no timings.
        timed: microseconds of a call in each workload: ``us``, and ``beside_us`` of the other kernel.
        reason: why the kernel has not passed; None where it has.
    """

    checked: list[str] = dataclasses.field(default_factory=list)
    timed: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    reason: str | None = None

    def slower(self, beside: str) -> str | None:
        """Where the kernel is not faster than ``beside``, or None."""
        found = [
            f"{name}: {times['us']:.0f} us, and {beside} takes {times['beside_us']:.0f}"
            for name, times in self.timed.items()
            if not times["us"] <= LEAST_GAIN * times["beside_us"]  # so that a NaN is found
        ]
        return f"not faster in {'; '.join(found)}" if found else None


def command(kernel: Kernel, geometry: Geometry, interpret: bool) -> list[str]:
    """The command that runs the steps. Names of modules in the working directory are not taken for others."""
    told = {
        "kernel": kernel.name,
        "geometry": dataclasses.asdict(geometry),
        "interpret": interpret,
        "platform": jax.default_backend(),
    }
    return [sys.executable, "-P", "-m", "easydel_ragged_plugin.bench.trial_steps", json.dumps(told)]


def variables(interpret: bool) -> dict[str, str]:
    """Environment variables of that command."""
    own = str(Path(__file__).resolve().parents[2])  # where this package lies
    found = {
        "PYTHONPATH": os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH")))),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has some of the card's memory, too
    }
    # XLA has a thread for each processor, or so many; those of an interpreter for GPUs wait for one another.
    return found | {"NPROC": "8"} if interpret else found


def try_kernel(
    console: Console, kernel: Kernel, trial: Trial, request: AttentionRequest, geometry: Geometry, interpret: bool
) -> tuple[Path, str | None]:
    """Run the trial, show it, and have the kernel keep the verdict.

    Returns:
        The file that has it, and why the kernel has not passed; None where it has.

    Raises:
        CommandError: the process can't run the steps at all. No verdict is kept.
    """
    where = "an interpreter" if interpret else jax.local_devices()[0].device_kind
    console.print(f"{kernel.name} on {where}, in a process of its own", highlight=False)
    with Child(command(kernel, geometry, interpret), variables(interpret)) as child:
        tried = follow(console, child, trial.beside.name)
    if tried.reason is None and not tried.timed:
        tried.reason = "nothing was timed"
    elif tried.reason is None and not interpret:
        tried.reason = tried.slower(trial.beside.name)
    file = trial.save(request, tried.reason, {"checked": tried.checked, "timed": tried.timed})
    return file, tried.reason


def follow(console: Console, child: Child, beside: str) -> Tried:
    """What the steps find, shown as they end, until one of them shows something wrong, or does not end.

    Args:
        console: where it is shown.
        child: the process that runs them.
        beside: name of the other kernel that is timed.

    Raises:
        CommandError: the process says that it can't run them.
    """
    tried = Tried()
    name, limit_s, begun = STARTING, START_LIMIT_S, time.monotonic()
    with console.status(name) as status:
        while tried.reason is None:
            try:
                line = child.line(max(0.0, begun + limit_s - time.monotonic()))
            except TimeoutError:
                line = {"lost": f"{name} did not end within {limit_s:g} s"}
            if line is None:
                line = {"lost": f"its process ended in {name} ({child.last_words()})"}
            if "unable" in line or (name == STARTING and "lost" in line):  # which says nothing about the kernel
                why = line.get("unable") or line["lost"]
                raise CommandError(f"the trial can't run: {why}. Nothing is written.", exit_code=1)
            if "lost" in line:
                tried.reason = line["lost"]
            elif "begin" in line:
                name, limit_s, begun = line["begin"], line["limit_s"], time.monotonic()
                status.update(name)
            elif "end" in line:
                _note(console, tried, line, beside, time.monotonic() - begun)
                name, limit_s, begun = f"what follows {name}", START_LIMIT_S, time.monotonic()
            elif "done" in line:
                break
    return tried


def _note(console: Console, tried: Tried, line: Mapping[str, Any], beside: str, elapsed_s: float) -> None:
    """Keep and show what a step has found."""
    name, problem = line["end"], line["problem"]
    if problem is not None:
        tried.reason = f"{name}: {problem}"
        return
    told = ""
    if "us" in line:
        tried.timed[name] = {"us": line["us"], "beside_us": line["beside_us"]}
        told = f": {line['us']:.0f} us, {beside} {line['beside_us']:.0f} us"
    else:
        tried.checked.append(name)
    console.print(f"  [green]✓[/green] {name}{told} [dim]{elapsed_s:.1f} s[/dim]", highlight=False)
