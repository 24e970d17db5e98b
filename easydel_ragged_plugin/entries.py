"""Files of the cache folder that hold what was measured on this machine: one entry for each card and geometry.

The kernel that an entry is about says what is in it. A file has a number of its form, which readers compare.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read", "write"]

logger = logging.getLogger("easydel_ragged_plugin")

T = TypeVar("T")


def read(file: Path, form: int, what: str, parse: Callable[[dict[str, Any]], T]) -> dict[str, T]:
    """The entries of ``file`` by key; none where it does not exist.

    A file that can't be used is named in a warning, and ignored.

    Args:
        file: what :func:`write` wrote.
        form: the number of its form that is wanted.
        what: what the entries are, in the plural, for the warning.
        parse: makes a value of an entry; ValueError, KeyError, TypeError or AttributeError where it can't.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        logger.warning("%s are ignored: %s", what, error)
        return {}
    try:
        content = json.loads(text)
        if content["format"] != form:
            raise ValueError(f"format {content['format']}, this version of the package reads {form}")
        return {key: parse(fields) for key, fields in content["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s of %s are ignored: %r. Run 'easydel-ragged tune' to write them anew.", what, file, error)
        return {}


def write(file: Path, form: int, key: str, entry: Mapping[str, Any]) -> None:
    """Add an entry to ``file``, or replace it. The file appears whole or not at all; other entries stay."""
    entries: dict[str, Any] = {}
    if file.exists():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] == form:
                entries = dict(content["entries"])
        except (ValueError, KeyError, TypeError):
            entries = {}  # unreadable, which readers have been warning of: replaced
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": form, "entries": {**entries, key: entry}}, indent=2, sort_keys=True)
    descriptor, staged = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        os.replace(staged, file)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
