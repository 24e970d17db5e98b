"""Every cell of the table in ``startup.Startup``: each event in each state, in an interpreter with a stand-in host."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import HOST, OPERATION, stand_in, third_party

from easydel_ragged_plugin import startup


def table() -> dict[str, dict[str, str]]:
    """Event -> state before -> state after, as the docstring has them."""
    _, header, rows, _ = re.split(r"^ *=[= ]+\n", startup.Startup.__doc__ or "", flags=re.MULTILINE)
    _, *states = re.split(r"\s{2,}", header.strip())
    found = {}
    for row in rows.strip().splitlines():
        event, *cells = re.split(r"\s{2,}", row.strip())
        found[event] = {state: state if cell == "." else cell for state, cell in zip(states, cells, strict=True)}
    return found


TABLE = table()

DRIVER = """
import importlib, importlib.machinery, json, sys, types

PACKAGES = ("easydel", "easydel_ragged_plugin", "late_op")


def forget(*packages):
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def half_import(name):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__spec__._initializing = True
    sys.modules[name] = module


def import_host(fault=None):
    sys.host_fault = fault
    forget("easydel")
    try:
        import easydel.operations
    except ImportError:
        assert fault == "fails"


def arm():
    forget("easydel")
    startup.arm()


def activate():
    forget("easydel")
    startup.activate()


def host_half_imported():
    forget("easydel")
    half_import("easydel.operations")
    startup.activate()


def host_imported():
    forget("late_op")
    import_host()


def entry_pending():
    half_import("late_op")
    import_host()


def entry_imported():
    if startup.status().pending:
        module = sys.modules["late_op"]
        base = sys.modules["easydel.operations"].OperationImpl
        module.Op = type("Op", (base,), {"get_impl_name": classmethod(lambda cls: "late")})
        module.__spec__._initializing = False
    forget("colorsys")
    import colorsys


def armed():
    startup.arm()


def pending():
    startup.arm()
    entry_pending()
    assert startup.status().pending == ("late",)


def registered():
    startup.arm()
    import_host()
    assert {entry.name for entry in startup.status().registrations} == {"late"}


def failed():
    startup.arm()
    import_host("unknown")
    assert "easydel.operations has no OperationRegistry" in startup.status().error


def deactivated():
    registered()
    startup.deactivate()


STATES = {
    "off": lambda: None,
    "armed": armed,
    "waiting": host_half_imported,
    "pending": pending,
    "registered": registered,
    "failed": failed,
    "deactivated": deactivated,
}
EVENTS = {
    "arm": arm,
    "activate": activate,
    "deactivate": lambda: startup.deactivate(),
    "host half imported": host_half_imported,
    "host import failed": lambda: import_host("fails"),
    "host imported": host_imported,
    "entry pending": entry_pending,
    "entry imported": entry_imported,
    "error": lambda: import_host("unknown"),
}

after = {}
for state, reach in STATES.items():
    forget(*PACKAGES)
    sys.meta_path[:] = [each for each in sys.meta_path if type(each).__module__ != "easydel_ragged_plugin.startup"]
    startup = importlib.import_module("easydel_ragged_plugin.startup")
    reach()
    assert startup._startup.state == state, (startup._startup.state, state)
    EVENTS[EVENT]()
    after[state] = startup._startup.state
    assert (startup._startup.error is not None) == (after[state] == "failed")
    assert startup.status().armed == (after[state] not in ("off", "deactivated"))
print(json.dumps(after))
"""

FAULTY = f"""
import sys
if sys.host_fault == "fails":
    raise ImportError("the host does not import")
{HOST}
if sys.host_fault == "unknown":
    del OperationRegistry
"""


@pytest.mark.parametrize("event", TABLE)
def test_event_in_every_state(event: str, tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"EVENT = {event!r}\n{DRIVER}",
        stand_in(tmp_path, source=FAULTY),
        third_party(tmp_path, "late-op", "late = late_op:Op", late_op=OPERATION.replace('"op"', '"late"')),
        options=("-W", "ignore"),
    )
    assert json.loads(output.splitlines()[-1]) == TABLE[event]


def test_the_table_has_every_state() -> None:
    states = {startup.OFF, startup.ARMED, startup.WAITING, startup.PENDING}
    states |= {startup.REGISTERED, startup.FAILED, startup.DEACTIVATED}
    for event, row in TABLE.items():
        assert row.keys() == states, event
        assert set(row.values()) <= states, event
