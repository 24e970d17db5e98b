"""What trials of the kernel have found on this machine. ``easydel-ragged tune`` makes them, selection reads them.

A kernel whose barriers are wrong never ends, and takes its process with it. Nothing but a run on a card shows that
they are right, so nothing else lets the kernel be chosen: a trial, in a process of its own, on a card of this name,
with these heads and dtypes, and with the versions of this process.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from easydel_ragged_plugin import entries
from easydel_ragged_plugin.config import cache_dir
from easydel_ragged_plugin.kernels import pallas_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.types import AttentionRequest, Kernel

from . import assembler

__all__ = ["FORMAT", "HopperTrial", "Verdict", "against", "file", "here", "made_with", "read"]

FORMAT = 1
"""Raised whenever the fields of :class:`Verdict` change."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial has found.

    Attributes:
        reason: why the kernel has not passed; None where it has.
        date: when, as YYYY-MM-DD.
        made_with: :func:`made_with` of the process that kept it.
    """

    reason: str | None
    date: str
    made_with: Mapping[str, str]

    def __post_init__(self) -> None:
        wanted = {"reason": (str, type(None)), "date": (str,), "made_with": (dict,)}
        for name, types in wanted.items():
            if not isinstance(getattr(self, name), types):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, wanted {' or '.join(t.__name__ for t in types)}"
                )

    @property
    def stale(self) -> str | None:
        """What has changed since, so that it does not hold for this process; or None."""
        for what, now in made_with().items():
            before = self.made_with.get(what)
            if before != now:
                return f"with {what} {before or 'unknown'}, and here is {now or 'none'}"
        return None

    @property
    def in_force(self) -> bool:
        """Whether the kernel may be chosen by it."""
        return self.reason is None and self.stale is None

    def __str__(self) -> str:
        when = self.date if self.stale is None else f"{self.date} {self.stale}"
        return f"passed on {when}" if self.reason is None else f"did not pass on {when}: {self.reason}"


@functools.cache
def made_with() -> dict[str, str]:
    """What the programs of a process are made with: its JAX, the assemblers that it may get, and these sources."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(pallas_gpu.__file__).parent):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    # The same ptxas may lie elsewhere.
    found = {f"ptxas {version}" if Path(name).is_absolute() else name for name, version in assembler.versions().items()}
    return {
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
        "assembler": ", ".join(sorted(found)),
        "sources of the kernel": digest.hexdigest()[:12],
    }


def file() -> Path:
    """Where verdicts are kept."""
    return cache_dir() / "pallas_mosaic_gpu.json"


@functools.cache
def read() -> dict[str, Verdict]:
    """Verdicts by key, read once in a process. A file that can't be used is named in a warning, and ignored."""
    return entries.read(file(), FORMAT, "trials", lambda entry: Verdict(*(entry[name] for name in _FIELDS)))


_FIELDS = tuple(field.name for field in dataclasses.fields(Verdict))


def here() -> dict[str, Verdict]:
    """Those of :func:`read` that are about this process's GPU, by geometry; empty where there is none."""
    name, _ = tiles.card()
    before = f"{name} head_dim="  # a card's name may begin with another one's
    if not name:
        return {}
    return {key.removeprefix(f"{name} "): verdict for key, verdict in read().items() if key.startswith(before)}


def against(request: AttentionRequest) -> str | None:
    """Why the verdict about such calls on this card, or that there is none, keeps the kernel from being chosen."""
    name, _ = tiles.card()
    verdict = read().get(tiles.tuned_key(name, request)) if name else None
    remedy = f"'{command_for(request)}' tries it"
    if verdict is None:
        return f"it has not been tried on this card: {remedy}"
    if verdict.in_force:
        return None
    return f"its trial {verdict}" if verdict.stale is None else f"its trial {verdict}; {remedy} again"


def command_for(request: AttentionRequest) -> str:
    """The command line that tunes and tries such calls."""
    options = {
        "q-heads": request.num_q_heads,
        "kv-heads": request.num_kv_heads,
        "head-dim": request.head_dim,
        "page-size": request.page_size,
        "dtype": request.query_dtype.name,
    }
    return " ".join(["easydel-ragged tune", *(f"--{name} {value}" for name, value in options.items())])


@dataclasses.dataclass(frozen=True)
class HopperTrial:
    """See :class:`easydel_ragged_plugin.types.Trial`.

    Attributes:
        beside: the kernel of all other rows.
        interpreted: the kernel in JAX's interpreter for GPUs.
        interpret: whether that one is tried: its verdict is no card's.
    """

    beside: Kernel
    interpreted: Kernel
    interpret: bool

    def save(self, request: AttentionRequest, reason: str | None, measured: Mapping[str, Any]) -> Path:
        """Put the verdict into the file of this user; the file."""
        name = "interpreter" if self.interpret else tiles.card()[0]
        verdict = Verdict(reason, datetime.date.today().isoformat(), made_with())
        entry = {**measured, "passed": reason is None, **dataclasses.asdict(verdict)}
        entries.write(file(), FORMAT, tiles.tuned_key(name, request), entry)
        return file()
