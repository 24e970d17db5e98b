"""Registers the operations of entry-point group ``easydel.operations`` in the host's ``OperationRegistry``.

Each entry point is loaded on its own and its class takes its name in the registry. The class that held the name
before is kept.

An entry point that can't be used is an :class:`EntryPointWarning` naming distribution, entry and reason, and the host's
import goes on. When two distributions claim one name, this distribution's claim comes first, then the others in the
order of their names; the first that loads wins and the rest are left out.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import threading
import time
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import EntryPoint

__all__ = [
    "DISTRIBUTION",
    "ENTRY_POINT_GROUP",
    "EntryPointWarning",
    "SLOW_ENTRY_SECONDS",
    "Failure",
    "Registrar",
    "Registration",
    "half_imported",
    "path_of",
    "warn",
]

ENTRY_POINT_GROUP = "easydel.operations"
"""Entry points of this group: name = the operation's name in the host's registry, value = ``module:Class``."""

SLOW_ENTRY_SECONDS = 5.0
"""An entry point that takes longer to load is warned about: it delays every import of the host."""

DISTRIBUTION = "easydel-ragged-plugin"
"""This package's distribution, in its normalized form."""

_log = logging.getLogger(__package__)


class EntryPointWarning(RuntimeWarning):
    """An entry point of group ``easydel.operations`` was left out, or is slow. The text says whose and why."""


@dataclasses.dataclass(frozen=True)
class Registration:
    """One operation that was registered.

    Attributes:
        name: the operation's name in the host.
        cls: the class that serves it.
        distribution: the distribution that ships the class.
        previous: the class that held the name before; None when nobody did, or when the host read the group.
        by_host: whether the host read the entry-point group itself, so that nothing was left to do here.
    """

    name: str
    cls: type
    distribution: str
    previous: type | None
    by_host: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """One entry point that was left out, and why.

    Attributes:
        distribution: the distribution that has it.
        name: what it claims: an operation's name in the host.
        value: what it loads, as ``module:Class``.
        reason: why it was left out.
    """

    distribution: str
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.distribution}: entry point {self.name} = {self.value} of group {ENTRY_POINT_GROUP} was left out: "
            f"{self.reason}"
        )


class Registrar:
    """Registers the entry points in one registry of the host.

    Args:
        registry: the registry, with the host's own operations in it.
        base: the host's base class of operations.

    Attributes:
        registrations: what was registered, by name; a class that is registered later may hold the name by now.
        failures: entry points that were left out.
        pending: entry points whose module was half imported, with their distributions.
    """

    def __init__(self, registry: dict[str, type], base: type) -> None:
        self.registry = registry
        self.registrations: dict[str, Registration] = {}
        self.failures: list[Failure] = []
        self.pending: list[tuple[str, EntryPoint]] = []
        self._base = base
        self._built_in = dict(registry)
        self._lock = threading.RLock()  # held for assignments, never while anything is imported

    def register(self) -> list[str]:
        """Load every entry point, those that failed before included. Returns texts of warnings."""
        with self._lock:
            self.failures, self.pending = [], []
        notes: list[str] = []
        for name, claims in sorted(_claims(notes).items()):
            winner: str | None = None
            for owner, entry in claims:
                if winner is not None:
                    reason = f"{winner} provides this operation already; uninstall one of the two"
                    self._leave_out(Failure(owner, name, entry.value, reason), notes)
                elif self._register_entry(owner, entry, notes):
                    winner = owner
        return notes

    def register_pending(self) -> list[str]:
        """Load the pending entry points whose module has been imported. Returns texts of warnings."""
        with self._lock:
            ready = [claim for claim in self.pending if not _is_pending(claim[1])]
            self.pending = [claim for claim in self.pending if claim not in ready]
        notes: list[str] = []
        for owner, entry in ready:
            self._register_entry(owner, entry, notes)
        return notes

    def give_back(self) -> None:
        """Put the previous classes back where the registered ones still hold the names."""
        with self._lock:
            self.pending = []
            for entry in self.held():
                if entry.by_host:
                    continue
                if entry.previous is None:
                    del self.registry[entry.name]
                else:
                    self.registry[entry.name] = entry.previous

    def held(self) -> tuple[Registration, ...]:
        """The registrations whose classes hold their names now, in the order of the names."""
        with self._lock:
            entries = sorted(self.registrations.items())
            return tuple(entry for name, entry in entries if self.registry.get(name) is entry.cls)

    def original(self, name: str) -> type | None:
        """The class that held ``name`` before registration; that holds it, where nothing was registered."""
        entry = self.registrations.get(name)
        return self.registry.get(name) if entry is None else entry.previous

    def _register_entry(self, owner: str, entry: EntryPoint, notes: list[str]) -> bool:
        """Whether the entry point's class holds its name, or will when its half imported module is imported."""
        before = dict(self.registry)
        started = time.perf_counter()
        try:
            cls = _held_already(entry, before) or entry.load()
            _check(cls, entry.name, self._base)
        except BaseException as error:  # SystemExit too: a module must not end the host's process
            _undo(self.registry, before)
            if isinstance(error, KeyboardInterrupt):
                raise
            if isinstance(error, (AttributeError, ImportError)) and half_imported(_module_of(entry)):
                self.pending.append((owner, entry))
                return True
            self._leave_out(Failure(owner, entry.name, entry.value, _reason(error)), notes)
            return False
        elapsed_s = time.perf_counter() - started
        if elapsed_s > SLOW_ENTRY_SECONDS:
            notes.append(
                f"{owner}: entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} is slow: it took "
                f"{elapsed_s:.1f} s to load, in every process that imports EasyDeL's operations"
            )
        self._take_name(owner, entry.name, cls, before.get(entry.name))
        return True

    def _leave_out(self, failure: Failure, notes: list[str]) -> None:
        self.failures.append(failure)
        notes.append(str(failure))

    def _take_name(self, owner: str, name: str, cls: type, previous: type | None) -> None:
        with self._lock:
            known = self.registrations.get(name)
            entry = Registration(name, cls, owner, previous)
            if previous is cls:  # there already: by us, by a decorator in its module, or by the host
                built_in = self._built_in.get(name)
                if known is not None and known.cls is cls:
                    entry = known
                elif built_in is cls:
                    entry = Registration(name, cls, owner, previous=None, by_host=True)
                else:
                    entry = Registration(name, cls, owner, previous=built_in)
            # Not OperationRegistry.register: it would log a warning for each name, in every process.
            self.registry[name] = cls
            self.registrations[name] = entry
        _log.info("%s: %s from %s, was %s", name, path_of(cls), owner, path_of(entry.previous))


def warn(notes: list[str], *, may_raise: bool = False) -> None:
    """Issue an :class:`EntryPointWarning` for each text; where warnings are errors and none may be raised, log it."""
    for note in notes:
        try:
            warnings.warn(note, EntryPointWarning, stacklevel=3)
        except EntryPointWarning:
            if may_raise:
                raise
            _log.warning(note)


def half_imported(name: str) -> bool:
    """Whether the module ``name`` or one of its parents is being imported right now."""
    while name:
        # The import system's own mark. Without it nothing counts as half imported, and an entry fails by name.
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            return True
        name = name.rpartition(".")[0]
    return False


def path_of(cls: type | None) -> str:
    """``module:Class`` for a text."""
    return "nobody's" if cls is None else f"{cls.__module__}:{cls.__qualname__}"


def _claims(notes: list[str]) -> dict[str, list[tuple[str, EntryPoint]]]:
    """Every claim on each operation name: ``(distribution, entry point)``, the first in line first."""
    claims: dict[str, list[tuple[str, EntryPoint]]] = {}
    for owner, entry in _entry_points(notes):
        claims.setdefault(entry.name, []).append((owner, entry))
    for queue in claims.values():
        queue.sort(key=lambda claim: (claim[0] != DISTRIBUTION, claim[0], claim[1].value))
    return claims


def _entry_points(notes: list[str]) -> Iterator[tuple[str, EntryPoint]]:
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or ENTRY_POINT_GROUP not in text:
                continue
            owner = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
            entries = [entry for entry in distribution.entry_points if entry.group == ENTRY_POINT_GROUP]
        except Exception as error:  # one distribution with unreadable metadata must not hide the others
            where = getattr(distribution, "_path", distribution)
            notes.append(f"{where}: its entry points can't be read: {_reason(error)}")
            continue
        if owner not in seen:  # the first on sys.path hides the same distribution further down, as its modules do
            seen.add(owner)
            for entry in entries:
                yield owner, entry


def _held_already(entry: EntryPoint, before: dict[str, type]) -> type | None:
    """The class in the registry when it is the very one that ``entry`` names: then the host reads the group, too."""
    holder = before.get(entry.name)
    if holder is not None and f"{holder.__module__}:{holder.__qualname__}" == entry.value:
        return holder
    return None


def _check(cls: Any, name: str, base: type) -> None:
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise TypeError(f"got {cls!r}, wanted a subclass of {path_of(base)}")
    names: object = cls.get_impl_name()  # type: ignore[attr-defined]
    if name != names and not (isinstance(names, (tuple, list)) and name in names):
        raise ValueError(f"the class's get_impl_name() gives {names!r}, wanted the entry point's name {name!r}")


def _undo(registry: dict[str, type], before: dict[str, type]) -> None:
    """Take back what a module registered by decorator before it failed."""
    for name in [name for name in registry if registry[name] is not before.get(name)]:
        if name in before:
            registry[name] = before[name]
        else:
            del registry[name]


def _module_of(entry: EntryPoint) -> str:
    return entry.value.partition(":")[0].strip()


def _is_pending(entry: EntryPoint) -> bool:
    """Whether ``entry`` can't be loaded yet: its module is being imported and has not defined it."""
    name = _module_of(entry)
    return half_imported(name) and not hasattr(sys.modules.get(name), entry.attr)


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else f"{text[:500]} ..."
