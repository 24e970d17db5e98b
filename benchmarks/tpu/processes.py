"""A process of its own for each thing that may hang or crash: what it is asked goes in as JSON, so does its answer."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ended

__all__ = ["answer", "started"]

LAST_LINES = 15
"""Of the output of a process that gives no answer: kept."""


def started(
    asked: Mapping[str, Any], limit_s: float, *, command: str | None = None, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The answer of a process that is ``asked`` something.

    Args:
        asked: what it is asked.
        limit_s: seconds after which it is ended.
        command: the subcommand of ``benchmarks/tpu`` that answers.
        variables: environment variables beside those of this process.

    Returns:
        Its answer. Of a process that gives none: ``status`` "timed out" or "failed", ``why``, and the last lines of
        its output as ``log``.
    """
    with tempfile.TemporaryDirectory(prefix="ragged-tpu-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        request = json.dumps({**asked, "result": str(result)})
        line = [sys.executable, str(Path(__file__).parent), *([command] if command else []), "--one", request]
        code, lines = ended(line, log, limit_s, variables=variables)
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        last = lines[-LAST_LINES:]
        if code is None:
            return {"status": "timed out", "why": f"no answer in {limit_s:g} s", "log": last}
        return {"status": "failed", "why": f"exit code {code}: {reason(last)}", "log": last}


def reason(lines: Sequence[str]) -> str:
    """The line of a process's output that says most: that of an exception, else the last one."""
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Unsupported|Exit)\b", line)]
    return (raised or list(lines) or ["no message"])[-1][:200]


def answer(request: str, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In that process: call ``function`` with what was asked, and leave its result as the answer."""
    asked = json.loads(request)
    found = json.dumps(function(asked))
    file = Path(asked["result"])
    beside = file.with_suffix(".new")
    beside.write_text(found, encoding="utf-8")
    beside.replace(file)
