"""Runs the command line, in this process or in a new one."""

from __future__ import annotations

import os
import subprocess
import sys

from typer.testing import CliRunner, Result

from easydel_ragged_plugin.cli import app


def invoke(*arguments: str, columns: int = 200) -> Result:
    """In this process."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns), "TERM": "dumb"})


def run_command(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a new process; ``code`` is run in place of the command's own start."""
    command = ["-m", "easydel_ragged_plugin"] if code is None else ["-c", code]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
