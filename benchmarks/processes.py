"""A process that may hang or crash, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import easydel_ragged_plugin

__all__ = ["NOT_HERE", "ended"]

NOT_HERE = 77
"""Exit code of a program that is not for the machine that it runs on."""


def ended(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    *,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[int | None, list[str]]:
    """Run ``command`` to its end, or end it, with all that it has started.

    Args:
        command: program and arguments. A Python among them imports the same package as this one.
        log: file for what it prints.
        limit_s: seconds after which it is ended.
        variables: environment variables beside those of this process.
        folder: where it runs; None for where this process does.

    Returns:
        Its exit code, None where it was ended, and the lines of its output.
    """
    own = str(Path(easydel_ragged_plugin.__file__).parents[1])
    before = os.environ.get("PYTHONPATH")
    path = own + (os.pathsep + before if before else "")
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **(variables or {})},
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # its own group: what it has started, too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
