"""Start-up: waits until EasyDeL's own operations are registered, then has this package's registered.

``easydel_ragged_plugin.pth`` (``.start`` on Python 3.15 and later) calls :func:`arm` in every interpreter of
the environment. That puts a finder on ``sys.meta_path`` which finds nothing itself: it lends the loader of the
host's operations package a callback, so that ``registration.py`` runs when the package has been executed. Never
earlier: the host's built-ins would overwrite what they found.

Every interpreter pays for this file, also where no bytecode can be cached, so it is short and imports built-in
modules alone; not ``__future__`` either.
"""

import _thread
import sys

TYPE_CHECKING = False  # what type checkers take for typing.TYPE_CHECKING
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from .registration import Status

__all__ = ["SWITCH", "EntryPointWarning", "activate", "arm", "deactivate", "original", "status"]

SWITCH = "EASYDEL_RAGGED_PLUGIN"
"""Environment variable: ``0`` keeps :func:`arm` from doing anything."""

_OPERATIONS_MODULE = f"{__package__}.operations"


class EntryPointWarning(RuntimeWarning):
    """An entry point of group ``easydel.operations`` was left out, or is slow. The text says whose and why."""


class _State:
    """Start-up's part of what this process knows; the rest is in ``registration.py``."""

    deactivated = False
    unfinished = False  # something was half imported when its turn came: ask again at the next import
    error: "str | None" = None


class _Finder:
    """Lends the host's operations package a loader that calls back; every other import passes by."""

    def __init__(self) -> None:
        self._asking: set[tuple[str, int]] = set()

    def find_spec(self, fullname: str, path: "Any" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        if _State.unfinished:
            _guarded("take_up")
        # Our own operations may be imported first: they import the host, whose callback then finds them half done.
        if fullname != _OPERATIONS_MODULE:
            if not fullname.startswith("easydel."):
                return None
            from .host import OPERATIONS_PACKAGES

            if fullname not in OPERATIONS_PACKAGES:
                return None
        # Other finders of this kind ask sys.meta_path in turn, this one included.
        question = (fullname, _thread.get_ident())
        if question in self._asking:
            return None
        self._asking.add(question)
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.discard(question)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def _ask_others(self, fullname: str, path: "Any", target: "ModuleType | None") -> "ModuleSpec | None":
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until the module runs; everything but ``exec_module`` is the loader's own."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # asked of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        # The module must see its real loader: importlib.resources, inspect, pickle and reload ask for it.
        loader = self._loader
        for holder, attribute in ((module, "__loader__"), (module.__spec__, "loader")):
            if getattr(holder, attribute, None) is self:
                setattr(holder, attribute, loader)
        loader.exec_module(module)
        if module.__name__ == _OPERATIONS_MODULE:
            _guarded("take_up")
        else:
            _guarded("register", module)


_finder = _Finder()


def arm() -> None:
    """Wait for the host's operations package, and register when it has been imported.

    The start-up files call this, twice on some Pythons. It raises nothing, does nothing when
    ``EASYDEL_RAGGED_PLUGIN=0`` is set or after :func:`deactivate`, and never changes its name.
    """
    try:
        import os

        if _State.deactivated or os.environ.get(SWITCH) == "0" or _finder in sys.meta_path:
            return
        _install_finder()
        if "easydel" in sys.modules:
            _guarded("register_loaded_host")
    except BaseException as error:  # an interpreter must start, whatever happens here
        _State.error = f"{type(error).__name__}: {error}"


def activate() -> None:
    """Register now, or as soon as the host is imported; also where the environment says no.

    Calling it again changes nothing, except that entry points that failed are tried again, and that a class
    registered meanwhile under one of the names gives way.

    Warns:
        EntryPointWarning: an entry point can't be used.
    """
    from . import registration

    _State.deactivated = False
    _install_finder()
    registration.register_loaded_host(by_hand=True)


def deactivate() -> None:
    """Give the host its previous classes back, and stop waiting for it.

    A name that somebody else has taken since stays with them. Models that are already built keep the classes
    they were built with.
    """
    from . import registration

    _State.deactivated = True
    while _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    registration.give_back()


def original(name: str) -> "type | None":
    """The class that serves ``name`` without this package.

    After registration that is the class that held the name before, also when :func:`deactivate` has put it
    back. For a name that was never taken it is the host's own. None: nobody's, or the host is not imported.
    """
    from . import registration

    return registration.original(name)


def status() -> "Status":
    """What is registered, by whom, and what failed and why. Imports nothing of the host."""
    from . import registration

    return registration.status()


def armed() -> bool:
    """Whether the finder is in place."""
    return _finder in sys.meta_path


def _install_finder() -> None:
    if _finder in sys.meta_path:
        return
    # One that a purged copy of this module left behind would register twice.
    kind = (type(_finder).__module__, type(_finder).__qualname__)
    others = [each for each in sys.meta_path if (type(each).__module__, type(each).__qualname__) != kind]
    sys.meta_path[:] = [_finder, *others]


def _guarded(step: str, *args: object) -> None:
    """Run a step of ``registration`` inside somebody's import, which must not fail because of it."""
    try:
        from . import registration

        getattr(registration, step)(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the host's import goes on; status() and the log tell
        import logging

        _State.error = f"{type(error).__name__}: {error}"
        logging.getLogger(__package__).warning("start-up failed; EasyDeL keeps its own operations", exc_info=True)
