"""What ``easydel_ragged_plugin.status()`` returns.

The file is not called ``status.py``: importing it would replace the function ``status`` of the package.
"""

from __future__ import annotations

import dataclasses

from . import host
from .registration import DISTRIBUTION, Failure, Registrar, Registration, path_of

__all__ = ["Status", "take"]


@dataclasses.dataclass(frozen=True)
class Status:
    """State of start-up and registration at one moment. ``str()`` gives a readable account.

    Attributes:
        armed: whether the finder waits for the host's operations package.
        active: whether the host is loaded and every operation of this distribution serves its name.
        disabled_by_environment: whether ``EASYDEL_RAGGED_PLUGIN=0`` is set and nothing has overruled it.
        deactivated: whether ``deactivate()`` was called last.
        host_version: version of the installed EasyDeL, or None.
        host_loaded: whether the host's operations package has been imported in this process.
        registrations: operations that serve their names now.
        pending: entry points whose module is being imported right now; they are registered afterwards.
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
        lines = [f"{DISTRIBUTION} is {self._summary()} ({where})"]
        for entry in self.registrations:
            before = "read by the host itself" if entry.by_host else f"was {path_of(entry.previous)}"
            lines.append(f"  {entry.name}: {path_of(entry.cls)} from {entry.distribution}, {before}")
        lines += [f"  {name}: waits until its module has been imported" for name in self.pending]
        lines += [f"  {failure}" for failure in self.failures]
        if self.error is not None:
            lines.append(f"  start-up failed: {self.error}")
        return "\n".join(lines)

    def _summary(self) -> str:
        if self.active:
            return "active"
        if self.deactivated:
            return "off: deactivate() was called; activate() switches it on"
        if self.disabled_by_environment:
            return "off: EASYDEL_RAGGED_PLUGIN=0; unset it or call activate()"
        if self.host_loaded:
            return "NOT active, although the host's operations are loaded"
        if self.armed:
            return "armed: registers when the host's operations are imported"
        return f"not armed: {__package__}.pth did not run; reinstall the package or call activate()"


def take(
    *, armed: bool, disabled_by_environment: bool, deactivated: bool, error: str | None, registrar: Registrar | None
) -> Status:
    """The status now: what ``startup`` says of itself (see :class:`Status`), and what is registered."""
    held = registrar.held() if registrar is not None else ()
    ours = {entry.name for entry in held if entry.distribution == DISTRIBUTION}
    return Status(
        armed=armed,
        active=ours >= set(host.OPERATION_NAMES),
        disabled_by_environment=disabled_by_environment,
        deactivated=deactivated,
        host_version=host.host_version(),
        host_loaded=host.loaded_operations() is not None,
        registrations=held,
        pending=tuple(entry.name for _, entry in registrar.pending) if registrar is not None else (),
        failures=tuple(registrar.failures) if registrar is not None else (),
        error=error,
    )
