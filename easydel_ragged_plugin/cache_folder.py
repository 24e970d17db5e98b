"""``easydel-ragged cache``: what lies in the cache folder, and how to get rid of it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from easydel_ragged_plugin.config import CACHE_VARIABLE, cache_dir
from easydel_ragged_plugin.demo.model import GGUF_NAME, MODEL_NAME
from easydel_ragged_plugin.terminal import CommandError, in_unit

__all__ = ["Entry", "as_fields", "clear", "entries", "run"]

LOGS = ("bench.log", "demo.log")
CONVERTED = re.compile(rf"{re.escape(MODEL_NAME.lower())}-\d+")
UNFINISHED = re.compile(r"\.staging-.+|\..+\.json-.+")
"""What is moved to its place when it is whole. A process that was killed leaves it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file, folder or link directly in the cache folder.

    Attributes:
        name: in that folder.
        kind: what it is; None for something that this package did not make, which ``--clear`` leaves.
        size_bytes: of all files in it. What a link leads to does not count.
        modified: when it was changed last, in local time.
    """

    name: str
    kind: str | None
    size_bytes: int
    modified: datetime.datetime


def _kind(path: Path) -> str | None:
    """By the names that this package gives. Kernels choose those of tuned tiles and trials, which go by content."""
    if path.name == GGUF_NAME:
        return "downloaded model"
    if CONVERTED.fullmatch(path.name):
        return "converted model"
    if UNFINISHED.fullmatch(path.name):
        return "left by a run that was killed, or is at work"
    if path.name in LOGS:
        return "log of the last run"
    if path.suffix == ".json" and path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kept = content["entries"]
            what = "trials" if any("passed" in entry for entry in kept.values()) else "tuned tiles"
            return f"{what} for {len(kept)} geometries" if "format" in content else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
    return None


def _size_bytes(path: Path) -> int:
    size = path.lstat().st_size
    if path.is_symlink() or not path.is_dir():
        return size
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(path) for name in names)


def entries(folder: Path) -> list[Entry]:
    """What lies in ``folder``, in the order of the names; nothing where it does not exist.

    Raises:
        CommandError: ``folder`` can't be read.
    """
    try:
        return [
            Entry(
                path.name, _kind(path), _size_bytes(path), datetime.datetime.fromtimestamp(int(path.lstat().st_mtime))
            )
            for path in sorted(folder.iterdir())
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CommandError(
            f"the cache folder {folder} can't be read: {error.strerror}. {CACHE_VARIABLE} names another one."
        ) from error


def clear(folder: Path, found: list[Entry]) -> None:
    """Remove the entries that this package made, and ``folder`` where it is empty then.

    Raises:
        CommandError: one can't be removed.
    """
    try:
        for each in found:
            path = folder / each.name
            if each.kind is None:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise CommandError(f"{error.filename}: can't be removed: {error.strerror}.") from error


def as_fields(found: list[Entry]) -> list[dict[str, Any]]:
    """The entries as JSON has them, dates as text."""
    return [{**dataclasses.asdict(each), "modified": each.modified.isoformat()} for each in found]


def run(*, remove: bool, as_json: bool) -> None:
    """See ``easydel-ragged cache --help``."""
    folder = cache_dir()
    found = entries(folder)
    ours = [each for each in found if each.kind is not None]
    total = in_unit(sum(each.size_bytes for each in ours))
    if as_json:
        listed = {"folder": str(folder), "entries": as_fields(found), "cleared": remove}
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
    else:
        _show(Console(), folder, found)
    if remove and ours:
        clear(folder, found)
        if not as_json:
            Console().print(f"removed {total}", highlight=False)


def _show(console: Console, folder: Path, found: list[Entry]) -> None:
    if not found:
        console.print(f"{folder}: nothing there", highlight=False, soft_wrap=True)
        return
    console.print(f"{folder}", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("what", "size", "changed", "name"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for each in found:
        what = each.kind or "not made by this package: stays"
        table.add_row(what, in_unit(each.size_bytes), f"{each.modified:%Y-%m-%d %H:%M}", each.name)
    console.print(table)
