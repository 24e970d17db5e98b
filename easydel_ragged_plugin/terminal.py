"""What the commands show: stages with progress, errors, and a place for the host's own log lines.

EasyDeL, XLA, tqdm and the tokenizer processes write to the terminal as they please, from Python, from C++ and
from other processes. :func:`hushed` sends all of it to one file, while the command's own console keeps the
terminal; when something fails, the file's last lines are shown.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from easydel_ragged_plugin import interrupt
from easydel_ragged_plugin.config import CACHE_VARIABLE, cache_dir
from easydel_ragged_plugin.encoding import PLAIN_ERRORS

__all__ = [
    "CommandError",
    "Update",
    "count_compilations",
    "facts_as_text",
    "fields_as_text",
    "full_disk",
    "hushed",
    "in_unit",
    "markdown_block",
    "require_writable",
    "stage",
    "usable_cache_dir",
]


class CommandError(Exception):
    """A command can't do what was requested. The text says why, and what to do.

    Attributes:
        exit_code: of the process: 2 for a request that can't be met, 1 for a finding.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def full_disk(error: OSError) -> bool:
    """Whether ``error`` says that there is no room: on the disk, or in what the user may have of it."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def usable_cache_dir(*, make: bool = True) -> Path:
    """The cache folder, after a check that files can be made in it.

    Args:
        make: make it where it is missing. Otherwise the check takes the folder that it would be made in.

    Raises:
        CommandError: it can't be made, or no file can be made in it.
    """
    folder = cache_dir()
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.absolute().parents) if each.exists())):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else _why(error)
        raise CommandError(
            f"the cache folder {folder} can't be used: {reason}. Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    return folder


def require_writable(option: str, file: Path) -> None:
    """Raise CommandError where ``file`` can't be written later. Creates nothing, and leaves a present file as it is.

    Args:
        option: the one that names the file, for the message.
    """
    try:
        if file.is_file() or file.is_dir():
            with file.open("ab"):
                pass
        elif not file.exists():  # otherwise a pipe or a device, which opening may stop or end
            with tempfile.TemporaryFile(dir=file.parent):
                pass
    except OSError as error:
        raise CommandError(f"{option} {file}: can't be written: {_why(error)}.") from error


Update = Callable[[int, int], None]
"""``update(done, total)``: turns a stage's spinner into a bar."""

_COUNT = re.compile(r"\[(\d+)/(\d+)\]")

_MEANS_NOTHING = re.compile(r"cpu_aot_loader\.cc.* Target machine feature \+prefer-no-(gather|scatter) ")
"""XLA's complaint about each program that it reads on a CPU with AVX-512: docs/troubleshooting.md."""


@contextlib.contextmanager
def stage(console: Console, text: str, *, in_bytes: bool = False) -> Iterator[Update]:
    """Show ``text`` with a spinner and the time it takes; a bar once the amount is known.

    Where the output is no terminal, one line at the end says what was done and how long it took.
    """
    started = time.perf_counter()
    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = progress.add_task(text, total=None)

    def update(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    finished = False
    live = console.is_terminal
    if live:
        progress.start()
    try:
        yield update
        finished = True
    finally:
        if live:
            progress.stop()
        elapsed = time.perf_counter() - started
        if finished and elapsed >= 0.5:
            console.print(f"[green]✓[/green] {text} [dim]{elapsed:.1f} s[/dim]", highlight=False)


def in_unit(size_bytes: int) -> str:
    """A number of bytes as text: in GB, MB, kB or bytes, powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} bytes"


def fields_as_text(fields: Mapping[str, Any]) -> str:
    """One line: ``name value; name value``. What is None or empty is left out, sizes have a unit."""
    shown = []
    for name, value in fields.items():
        if value is None or value in ([], ()):
            continue
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), in_unit(value)
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        shown.append(f"{name.replace('_', ' ')} {text}")
    return "; ".join(shown)


def facts_as_text(facts: Mapping[str, Any]) -> str:
    """One line for what :meth:`.types.Kernel.facts` gives."""
    if not facts["available"]:
        return f"not available: {facts['reason']}"
    further = fields_as_text({name: value for name, value in facts.items() if name != "available"})
    return f"available; {further}" if further else "available"


def markdown_block(sections: Mapping[str, list[str]], home: str) -> str:
    """Titles with their lines, as a block of Markdown that is shown as it is: no marks, links or colors are made of it.

    Args:
        home: the user's home folder, in whose place ``~`` is written.
    """
    parts = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()]
    text = Text.from_ansi("\n\n".join(parts)).plain  # what others write into their errors may have colors
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


class _CompilationCounter(logging.Handler):
    """Reads ``[2/5]`` in the engine's log lines."""

    def __init__(self, update: Update) -> None:
        super().__init__(logging.INFO)
        self._update = update

    def emit(self, record: logging.LogRecord) -> None:
        found = _COUNT.search(record.getMessage())
        if found:
            self._update(int(found[1]) - 1, int(found[2]))


@contextlib.contextmanager
def count_compilations(update: Update) -> Iterator[None]:
    """Feed ``update`` from the engine's log while it compiles. Without such lines the spinner just goes on."""
    counter = _CompilationCounter(update)
    loggers = [logging.getLogger(name) for name in ("eSurge-ExecutionManager", "eSurge")]
    for logger in loggers:
        logger.addHandler(counter)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(counter)


@contextlib.contextmanager
def hushed(log: Path | None) -> Iterator[Console]:
    """Send both output streams of the process, and of those it starts, to ``log``; yields a console on the terminal.

    What the process dies of shows the log's last lines. A CommandError says all itself.

    Args:
        log: file to write, in a folder that exists; None leaves the streams alone.
    """
    if log is None:
        yield Console()
        return
    try:
        sys.stdout.fileno()
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # captured by a test runner or a notebook: nothing to redirect
        yield Console()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved_out, saved_err = os.dup(1), os.dup(2)
    encoding = sys.stdout.encoding
    failed = False
    with (
        log.open("w", encoding="utf-8") as file,
        os.fdopen(os.dup(saved_out), "w", encoding=encoding, errors=PLAIN_ERRORS) as terminal,
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        interrupt.error_output = saved_err
        try:
            yield Console(file=terminal, width=_width(saved_out))
        except (CommandError, KeyboardInterrupt):
            raise
        except BaseException:
            failed = True
            raise
        finally:
            interrupt.error_output = 2
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_out, 1)
            os.dup2(saved_err, 2)
            os.close(saved_out)
            os.close(saved_err)
            if failed:
                _show_tail(log)


def _width(descriptor: int) -> int | None:
    """Columns of the terminal behind ``descriptor``. Rich would look at the streams, which lead to a file now."""
    try:
        # One that nobody gave a size, as in containers, says 0: rich would show nothing.
        return os.get_terminal_size(descriptor).columns or 80
    except OSError:  # a pipe or a file
        return None if "COLUMNS" in os.environ else 120


def _show_tail(log: Path, lines: int = 15) -> None:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    text = [line for line in text if line and "%|" not in line and not _MEANS_NOTHING.search(line)]  # no progress bars
    if text:
        print("\n".join([f"last lines of {log}:", *(f"  {line[:300]}" for line in text[-lines:])]), file=sys.stderr)
