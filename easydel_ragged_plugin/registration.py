"""Registers the operations of entry-point group ``easydel.operations`` in the host's ``OperationRegistry``.

``startup.py`` calls this when the host's operations package has been executed. Each entry point is loaded on
its own and its class takes its name in the registry. The class that held the name before is kept.

An entry point that can't be used is an ``EntryPointWarning`` naming distribution, entry and reason, and the
host's import goes on. When two distributions claim one name, this distribution's claim comes first, then the
others in the order of their names; the first that loads wins and the rest are warned about.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import threading
import time
import warnings
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from . import host, startup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import EntryPoint
    from types import ModuleType

__all__ = ["DISTRIBUTION", "ENTRY_POINT_GROUP", "SLOW_ENTRY_SECONDS", "Failure", "Registration", "Status"]

ENTRY_POINT_GROUP = "easydel.operations"
"""Entry points of this group: name = the operation's name in the host's registry, value = ``module:Class``."""

SLOW_ENTRY_SECONDS = 5.0
"""An entry point that takes longer to load is warned about: it delays every import of the host."""

DISTRIBUTION = "easydel-ragged-plugin"
"""This package's distribution, in its normalized form."""

_log = logging.getLogger(__package__)


@dataclasses.dataclass(frozen=True)
class Registration:
    """One operation that was registered.

    Attributes:
        name: the operation's name in the host.
        cls: the class that serves it.
        distribution: who ships the class.
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
    """One entry point that was left out, and why."""

    distribution: str
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.distribution}: entry point {self.name} = {self.value} of group {ENTRY_POINT_GROUP} was left out: "
            f"{self.reason}"
        )


@dataclasses.dataclass(frozen=True)
class Status:
    """What ``status()`` saw. ``str()`` gives a readable account.

    Attributes:
        armed: whether the finder waits for the host's operations package.
        active: whether the host is loaded and every operation of this distribution serves its name.
        disabled_by_environment: whether ``EASYDEL_RAGGED_PLUGIN=0`` is set and nothing has overruled it.
        deactivated: whether ``deactivate()`` was called last.
        host_version: version of the installed EasyDeL, or None.
        host_loaded: whether the host's operations package has been imported in this process.
        registrations: operations that serve their names now.
        pending: entry points whose module is being imported right now; they are taken up afterwards.
        failures: entry points that were left out.
        error: what went wrong in start-up itself, or None.
    """

    armed: bool
    active: bool
    disabled_by_environment: bool
    deactivated: bool
    host_version: str | None
    host_loaded: bool
    registrations: tuple[Registration, ...]
    pending: tuple[str, ...]
    failures: tuple[Failure, ...]
    error: str | None

    def __str__(self) -> str:
        where = f"EasyDeL {self.host_version}" if self.host_version else "no EasyDeL installed"
        lines = [f"{DISTRIBUTION} is {self._state()} ({where})"]
        for entry in self.registrations:
            before = "read by the host itself" if entry.by_host else f"was {_path(entry.previous)}"
            lines.append(f"  {entry.name}: {_path(entry.cls)} from {entry.distribution}, {before}")
        lines += [f"  {name}: waits until its module has been imported" for name in self.pending]
        lines += [f"  {failure}" for failure in self.failures]
        if self.error is not None:
            lines.append(f"  start-up failed: {self.error}")
        return "\n".join(lines)

    def _state(self) -> str:
        if self.active:
            return "active"
        if self.deactivated:
            return "off: deactivate() was called; activate() switches it on"
        if self.disabled_by_environment:
            return f"off: {startup.SWITCH}=0; unset it or call activate()"
        if self.host_loaded:
            return "NOT active, although the host's operations are loaded"
        if self.armed:
            return "armed: registers when the host's operations are imported"
        return f"not armed: {__package__}.pth did not run; reinstall the package or call activate()"


class _Book:
    """What this process has registered. ``lock`` is held for assignments, never while anything is imported."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.base: type | None = None
        self.registry: dict[str, type] | None = None
        self.built_in: dict[str, type] = {}
        self.registrations: dict[str, Registration] = {}
        self.failures: list[Failure] = []
        self.pending: list[tuple[str, EntryPoint]] = []
        self.half_imported_host: str | None = None


_book = _Book()


def register(module: ModuleType, *, by_hand: bool = False) -> None:
    """Load the entry-point group and put its classes into the registry of ``module``, once for each registry.

    Args:
        module: the host's operations package, executed.
        by_hand: the user asks, so do it again, and let a warning that was turned into an error be one.

    Raises:
        TypeError: the host is none that this package knows.
    """
    registry = getattr(getattr(module, "OperationRegistry", None), "_registry", None)
    base = getattr(module, "OperationImpl", None)
    if not isinstance(registry, dict) or not isinstance(base, type):
        raise TypeError(
            f"{module.__name__} has no OperationRegistry._registry (dict) and OperationImpl (class): this EasyDeL is "
            f"not supported yet; upgrade {DISTRIBUTION}, or set {startup.SWITCH}=0"
        )
    with _book.lock:
        if _book.registry is not registry:
            _book.registry, _book.base, _book.built_in = registry, base, dict(registry)
            _book.registrations.clear()
        elif not by_hand:
            return
        _book.failures, _book.pending = [], []
        startup._State.error = None

    notes: list[str] = []
    for name, claims in sorted(_claims(notes).items()):
        winner: str | None = None
        for owner, entry in claims:
            if winner is None:
                failure = _register_entry(owner, entry, notes)
                if failure is None:
                    winner = owner
                    continue
            else:
                reason = f"{winner} provides this operation already; uninstall one of the two"
                failure = Failure(owner, name, entry.value, reason)
            _book.failures.append(failure)
            notes.append(str(failure))
    _warn(notes, by_hand=by_hand)


def register_loaded_host(*, by_hand: bool = False) -> None:
    """:func:`register` for a host that is imported already, or is being imported by this very thread."""
    for name in host.OPERATIONS_PACKAGES:
        if name in sys.modules:
            module = import_module(name)  # waits for another thread that is importing it
            if _half_imported(name):
                _book.half_imported_host = name
                startup._State.unfinished = True
            else:
                register(module, by_hand=by_hand)
            return


def take_up() -> None:
    """Continue with what was half imported when its turn came."""
    with _book.lock:
        name = _book.half_imported_host
        if name is not None and not _half_imported(name):
            _book.half_imported_host = None
        else:
            name = None
        ready = [claim for claim in _book.pending if not _waits(claim[1])]
        _book.pending = [claim for claim in _book.pending if _waits(claim[1])]
        startup._State.unfinished = bool(_book.pending) or _book.half_imported_host is not None
    if name is not None and name in sys.modules:
        register(sys.modules[name])
    notes: list[str] = []
    for owner, entry in ready:
        failure = _register_entry(owner, entry, notes)
        if failure is not None:
            _book.failures.append(failure)
            notes.append(str(failure))
    _warn(notes, by_hand=False)


def give_back() -> None:
    """Put the previous classes back where ours still hold the names."""
    with _book.lock:
        _book.pending, _book.half_imported_host = [], None
        startup._State.unfinished = False
        registry = _book.registry
        if registry is None:
            return
        for name, entry in _book.registrations.items():
            if registry.get(name) is not entry.cls or entry.by_host:
                continue
            if entry.previous is None:
                del registry[name]
            else:
                registry[name] = entry.previous


def original(name: str) -> type | None:
    """See :func:`startup.original`."""
    entry = _book.registrations.get(name)
    if entry is not None:
        return entry.previous
    if _book.registry is not None:
        return _book.registry.get(name)
    for package in host.OPERATIONS_PACKAGES:
        registry = getattr(getattr(sys.modules.get(package), "OperationRegistry", None), "_registry", None)
        if isinstance(registry, dict):
            return registry.get(name)
    return None


def status() -> Status:
    """See :func:`startup.status`."""
    armed = startup.armed()
    host_version = host.host_version()
    with _book.lock:
        registry = _book.registry or {}
        held = [entry for name, entry in sorted(_book.registrations.items()) if registry.get(name) is entry.cls]
        ours = {entry.name for entry in held if entry.distribution == DISTRIBUTION}
        return Status(
            armed=armed,
            active=ours >= set(host.OPERATION_NAMES),
            disabled_by_environment=os.environ.get(startup.SWITCH) == "0" and not armed,
            deactivated=startup._State.deactivated,
            host_version=host_version,
            host_loaded=any(name in sys.modules for name in host.OPERATIONS_PACKAGES),
            registrations=tuple(held),
            pending=tuple(entry.name for _, entry in _book.pending),
            failures=tuple(_book.failures),
            error=startup._State.error,
        )


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


def _register_entry(owner: str, entry: EntryPoint, notes: list[str]) -> Failure | None:
    """Put one entry point's class into the registry. None: done, or put off because its module is half imported."""
    registry, base = _book.registry, _book.base
    assert registry is not None
    assert base is not None
    before = dict(registry)
    started = time.perf_counter()
    try:
        cls = _held_already(entry, before) or entry.load()
        _check(cls, entry.name, base)
    except BaseException as error:  # SystemExit too: a module that exits must not take the host along
        _undo(registry, before)
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, (AttributeError, ImportError)) and _half_imported(_module_of(entry)):
            _book.pending.append((owner, entry))
            startup._State.unfinished = True
            return None
        return Failure(owner, entry.name, entry.value, _reason(error))
    elapsed_s = time.perf_counter() - started
    if elapsed_s > SLOW_ENTRY_SECONDS:
        notes.append(
            f"{owner}: entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} is slow: it took "
            f"{elapsed_s:.1f} s to load, in every process that imports EasyDeL's operations"
        )
    _take_name(owner, entry.name, cls, before)
    return None


def _held_already(entry: EntryPoint, before: dict[str, type]) -> type | None:
    """The class in the registry when it is the very one that ``entry`` names: then the host reads the group, too."""
    holder = before.get(entry.name)
    if holder is not None and f"{holder.__module__}:{holder.__qualname__}" == entry.value:
        return holder
    return None


def _check(cls: Any, name: str, base: type) -> None:
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise TypeError(f"got {cls!r}, wanted a subclass of {_path(base)}")
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


def _take_name(owner: str, name: str, cls: type, before: dict[str, type]) -> None:
    registry = _book.registry
    assert registry is not None
    with _book.lock:
        known = _book.registrations.get(name)
        entry = Registration(name, cls, owner, before.get(name))
        if entry.previous is cls:  # there already: by us, by a decorator in its module, or by the host
            if known is not None and known.cls is cls:
                entry = known
            elif _book.built_in.get(name) is cls:
                entry = dataclasses.replace(entry, previous=None, by_host=True)
            else:
                entry = dataclasses.replace(entry, previous=_book.built_in.get(name))
        # Not OperationRegistry.register: it would log a warning for each name, in every process.
        registry[name] = cls
        _book.registrations[name] = entry
    _log.info("%s: %s from %s, was %s", name, _path(cls), owner, _path(entry.previous))


def _module_of(entry: EntryPoint) -> str:
    return entry.value.partition(":")[0].strip()


def _waits(entry: EntryPoint) -> bool:
    """Whether ``entry`` can't be loaded yet: its module is being imported and has not defined it."""
    name = _module_of(entry)
    return _half_imported(name) and not hasattr(sys.modules.get(name), entry.attr)


def _half_imported(name: str) -> bool:
    """Whether ``name`` or one of its parents is being imported right now."""
    while name:
        # The import system's own mark. Without it nothing counts as half imported, and an entry fails by name.
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            return True
        name = name.rpartition(".")[0]
    return False


def _path(cls: type | None) -> str:
    return "nobody's" if cls is None else f"{cls.__module__}:{cls.__qualname__}"


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else f"{text[:500]} ..."


def _warn(notes: list[str], *, by_hand: bool) -> None:
    for note in notes:
        try:
            warnings.warn(note, startup.EntryPointWarning, stacklevel=4)
        except startup.EntryPointWarning:  # the user turned warnings into errors; an import still goes on
            if by_hand:
                raise
            _log.warning(note)
