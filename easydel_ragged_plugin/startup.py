"""Start-up: waits until the host has registered its own operations, then registers those of the entry points.

``easydel_ragged_plugin.pth`` (``.start`` on Python 3.15 and later) calls :func:`arm` in every interpreter of the
environment. That puts a finder on ``sys.meta_path``. The finder wraps the loader of the host's operations package, so
that registration runs when the package has been executed. Not earlier: the host's own operations would overwrite
what they found.

Every interpreter pays for this file, also where no bytecode can be cached, so it is short and imports built-in
modules alone; not ``__future__`` either.
"""

import _thread
import sys

TYPE_CHECKING = False  # what type checkers take for typing.TYPE_CHECKING
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from .registration import EntryPointWarning, Registrar
    from .startup_status import Status

__all__ = ["SWITCH", "EntryPointWarning", "activate", "arm", "deactivate", "original", "status"]

SWITCH = "EASYDEL_RAGGED_PLUGIN"
"""Environment variable: ``0`` keeps :func:`arm` from doing anything."""

OFF, ARMED, WAITING, PENDING = "off", "armed", "waiting", "pending"
REGISTERED, FAILED, DEACTIVATED = "registered", "failed", "deactivated"
_HALF_IMPORTED = (WAITING, PENDING)

_OPERATIONS_MODULE, _IMPORT_HOOK = f"{__package__}.operations", f"{__package__}.import_hook"


class Startup:
    """All state of start-up; one object for each process.

    * off: the finder is not in place.
    * armed: the finder is in place, and the host's operations package has not been imported.
    * waiting: the operations package is half imported; every import of a module checks again.
    * pending: registered, except for entry points whose module is half imported; every import checks again.
    * registered: every entry point was registered, or left out with a warning.
    * failed: start-up itself raised ``error``.
    * deactivated: ``deactivate()`` was called; only ``activate()`` leaves this state.

    The state after each event, where a dot is the state before:

    ==================  ===========  ===========  ===========  ===========  ===========  ===========  ===========
    event               off          armed        waiting      pending      registered   failed       deactivated
    ==================  ===========  ===========  ===========  ===========  ===========  ===========  ===========
    arm                 armed        .            .            .            .            .            .
    activate            armed        .            .            .            .            armed        armed
    deactivate          deactivated  deactivated  deactivated  deactivated  deactivated  deactivated  .
    host half imported  waiting      waiting      .            waiting      waiting      waiting      waiting
    host import failed  .            .            armed        .            .            .            .
    host imported       .            registered   registered   registered   .            registered   .
    entry pending       .            pending      pending      .            pending      pending      .
    entry imported      .            .            .            registered   .            .            .
    error               .            failed       failed       failed       failed       .            .
    ==================  ===========  ===========  ===========  ===========  ===========  ===========  ===========

    * arm, activate: the call, while the host's operations package is not in ``sys.modules``. Where it is, the row of
      the host follows: ``activate()`` registers again, and ``arm()`` does so when it puts the finder in place.
    * host half imported: ``activate()`` is called while the operations package is being imported.
    * host imported: the operations package has been executed, for the first time or (reloaded, or deleted from
      ``sys.modules``) again. Each time it has a new registry, and a new :class:`Registrar` for it.
    * entry pending: the same, while the module of an entry point is being imported.
    * error: the same, and registration raised.
    """

    def __init__(self) -> None:
        self.state = OFF
        self.error: str | None = None  # None in every state but failed
        self.registrar: Registrar | None = None  # of the registry that was found last
        # Held for assignments, never during an import. Reentrant: a finalizer that runs meanwhile may import.
        self.lock = _thread.RLock()

    def go(self, state: str, error: "BaseException | None" = None) -> None:
        """Change the state, unless it is deactivated."""
        with self.lock:
            if self.state != DEACTIVATED:
                self.state = state
                self.error = None if error is None else f"{type(error).__name__}: {error}"


class _Finder:
    """Wraps the loaders of the host's operations package and of this package's operations.

    While something is half imported, it wraps those of all other modules, too: see :func:`_check_again`.
    """

    # The interpreter calls this with its global import lock held. If this thread waited here for a module that another
    # thread is importing, neither would go on: the other one needs the lock for its next import. So nothing is imported
    # here but `import_hook`, which needs nothing, and what is to be done waits until the module has been executed.

    def find_spec(self, fullname: str, path: "Any" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        # Our own operations may be imported first: they import the host, which is then executed before they are.
        of_host = fullname.startswith("easydel.") and fullname.endswith(".operations")
        awaited = of_host or fullname == _OPERATIONS_MODULE or _startup.state in _HALF_IMPORTED
        if not awaited or fullname == _IMPORT_HOOK:
            return None
        from .import_hook import find_and_wrap

        return find_and_wrap(self, fullname, path, target, _executed)


_startup = Startup()
_finder = _Finder()


def arm() -> None:
    """Wait for the host's operations package, and register when it has been imported.

    The start-up files call this, twice on some Pythons. It raises nothing, does nothing when
    ``EASYDEL_RAGGED_PLUGIN=0`` is set or after :func:`deactivate`, and never changes its name.
    """
    try:
        import os

        if _startup.state == DEACTIVATED or os.environ.get(SWITCH) == "0" or _finder in sys.meta_path:
            return
        _install_finder()
        if _startup.state == OFF:
            _startup.go(ARMED)
        if "easydel" in sys.modules:
            _guarded(_register_loaded_host)
    except BaseException as error:  # an interpreter must start, whatever happens here
        _startup.go(FAILED, error)


def activate() -> None:
    """Register now, or as soon as the host is imported; also where ``EASYDEL_RAGGED_PLUGIN=0`` is set.

    Calling it again changes nothing, except that entry points that failed are tried again, and that a class
    registered meanwhile under one of the names gives way.

    Raises:
        TypeError: this version of the host is not supported.

    Warns:
        EntryPointWarning: an entry point can't be used.
    """
    from . import registration

    with _startup.lock:
        if _startup.state in (OFF, FAILED, DEACTIVATED):
            _startup.state, _startup.error = ARMED, None
    _install_finder()
    try:
        notes = _register_loaded_host(again=True)
    except Exception as error:
        _startup.go(FAILED, error)
        raise
    registration.warn(notes, may_raise=True)


def deactivate() -> None:
    """Give the host its previous classes back, and stop waiting for it.

    A name that another class has taken since keeps that class. Models that are already built keep the classes
    they were built with.
    """
    _startup.go(DEACTIVATED)
    while _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    if _startup.registrar is not None:
        _startup.registrar.give_back()


def original(name: str) -> "type | None":
    """The class that serves ``name`` without this package.

    After registration that is the class that held the name before, also when :func:`deactivate` has put it
    back. For a name that was never taken it is the host's own. None: there is none, or the host is not imported.
    """
    if _startup.registrar is not None:
        return _startup.registrar.original(name)
    from . import host

    operations = host.loaded_operations()
    try:
        return None if operations is None else host.registry(operations).get(name)
    except TypeError:  # half imported, or not supported
        return None


def status() -> "Status":
    """What is registered, by whom, and what failed and why. Imports nothing of the host."""
    import os

    from . import startup_status

    armed = _finder in sys.meta_path
    return startup_status.take(
        armed=armed,
        disabled_by_environment=os.environ.get(SWITCH) == "0" and not armed,
        deactivated=_startup.state == DEACTIVATED,
        error=_startup.error,
        registrar=_startup.registrar,
    )


def __getattr__(name: str) -> "Any":
    if name == "EntryPointWarning":  # not defined here: every interpreter would pay for the class
        from .registration import EntryPointWarning

        return EntryPointWarning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _install_finder() -> None:
    if _finder in sys.meta_path:
        return
    # One that a purged copy of this module left behind would register twice.
    kind = (type(_finder).__module__, type(_finder).__qualname__)
    others = [each for each in sys.meta_path if (type(each).__module__, type(each).__qualname__) != kind]
    sys.meta_path[:] = [_finder, *others]


def _executed(module: "ModuleType") -> None:
    from .host import OPERATIONS_PACKAGES

    if module.__name__ in OPERATIONS_PACKAGES:
        _guarded(_register, module)
    else:
        _guarded(_check_again)


def _register_loaded_host(*, again: bool = False) -> list[str]:
    """:func:`_register` for a host that is imported already, or is being imported by this very thread."""
    from importlib import import_module

    from . import host, registration

    operations = host.loaded_operations()
    if operations is None:
        return []
    operations = import_module(operations.__name__)  # waits for another thread that is importing it
    if registration.half_imported(operations.__name__):
        _startup.go(WAITING)
        return []
    return _register(operations, again=again)


def _register(operations: "ModuleType", *, again: bool = False) -> list[str]:
    """Register in the registry of the host's operations package, once unless ``again``. Returns texts of warnings."""
    from . import host, registration

    registry = host.registry(operations)
    with _startup.lock:
        registrar = _startup.registrar
        if registrar is None or registrar.registry is not registry:
            registrar = _startup.registrar = registration.Registrar(registry, operations.OperationImpl)
            again = True
    notes = registrar.register() if again else registrar.register_pending()
    _registered(registrar)
    return notes


def _check_again() -> list[str]:
    """Continue with what was half imported. Returns texts of warnings."""
    from . import host, registration

    registrar = _startup.registrar
    if _startup.state == PENDING and registrar is not None:
        notes = registrar.register_pending()
        _registered(registrar)
        return notes
    if _startup.state == WAITING:
        operations = host.loaded_operations()
        if operations is None:  # its import failed; the finder sees the next one
            _startup.go(ARMED)
        elif not registration.half_imported(operations.__name__):
            return _register(operations)
    return []


def _registered(registrar: "Registrar") -> None:
    _startup.go(PENDING if registrar.pending else REGISTERED)
    if _startup.state == DEACTIVATED:  # meanwhile, by an entry point or another thread
        registrar.give_back()


def _guarded(step: "Callable[..., list[str]]", *args: object) -> None:
    """Run ``step`` inside somebody's import, which must not fail because of it."""
    try:
        from . import registration

        registration.warn(step(*args))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        import logging

        _startup.go(FAILED, error)
        logging.getLogger(__package__).warning("start-up failed; EasyDeL keeps its own operations", exc_info=True)
