"""Registration at start-up, in real interpreters with a stand-in host: when it happens, and what it leaves alone.

The environment has this package's wheel and nothing else. There its own entry points can't load (no JAX), which is one
more broken entry that the host must survive.
"""

from __future__ import annotations

import os
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunPython
from stand_in import HOLDER, HOST, NAMES, OPERATION, stand_in, third_party, warnings_in


@pytest.mark.parametrize("package", ["operations", "layers/operations"])
def test_registers_when_the_host_has_been_executed(package: str, tmp_path: Path, python: Callable[..., str]) -> None:
    name = f"easydel.{package.replace('/', '.')}"
    host = stand_in(tmp_path, package)
    op = third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION.replace("easydel.operations", name))
    output = python(
        f"""
        import sys, inspect, pickle, importlib, importlib.resources
        import easydel_ragged_plugin as plugin
        from easydel_ragged_plugin import startup
        from easydel_ragged_plugin.host import registry as registry_of
        assert "armed" in str(plugin.status()) and startup.original("op") is None
        import easydel
        assert "easydel_ragged_plugin.registration" not in sys.modules or not plugin.status().registrations
        assert "their_op" not in sys.modules
        host = importlib.import_module({name!r})
        registry = registry_of(host)
        assert registry["op"].__module__ == "their_op", registry
        assert startup.original("op") is host.BuiltIn
        (entry,) = plugin.status().registrations
        assert (entry.name, entry.distribution, entry.previous) == ("op", "their-op", host.BuiltIn)
        assert not entry.by_host
        assert not plugin.status().active  # of ours, none could be loaded here
        assert {{failure.name for failure in plugin.status().failures}} == {set(NAMES)!r}

        # The host's module has its own loader, and everything that hangs on it.
        assert type(host.__loader__).__name__ == type(host.__spec__.loader).__name__ == "SourceFileLoader"
        assert "class BuiltIn" in inspect.getsource(host)
        assert importlib.resources.files(host).joinpath("__init__.py").is_file()
        assert pickle.loads(pickle.dumps(host.BuiltIn)) is host.BuiltIn
        spec = importlib.util.find_spec({name!r})

        plugin.deactivate()
        assert registry["op"] is host.BuiltIn and startup.original("op") is host.BuiltIn
        assert plugin.status().deactivated and not plugin.status().armed
        startup.arm()
        assert not plugin.status().armed, "the .pth line must not undo deactivate()"
        plugin.activate(); plugin.activate()
        assert registry["op"].__module__ == "their_op" and startup.original("op") is host.BuiltIn
        assert plugin.status().armed

        # A class that somebody registers afterwards stays, also when ours is taken back.
        class Mine(host.OperationImpl): ...
        registry["op"] = Mine
        startup.arm(); plugin.deactivate()
        assert registry["op"] is Mine
        plugin.activate()
        assert registry["op"].__module__ == "their_op" and startup.original("op") is Mine

        # A reloaded host starts from its own classes again, so it is registered in again.
        del sys.modules["their_op"]
        host = importlib.reload(host)
        registry = registry_of(host)
        print(plugin.status())
        """,
        host,
        op,
    )
    assert f"op: their_op:Op from their-op, was {name}:BuiltIn" in output


def test_a_purged_host_is_registered_in_again(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        """
        import sys
        from easydel.operations import OperationRegistry as first
        for name in [name for name in sys.modules if name.partition(".")[0] in ("easydel", "their_op")]:
            del sys.modules[name]
        from easydel.operations import OperationRegistry as second
        assert first is not second
        print(first.get("op").__module__, second.get("op").__module__)
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert output.split() == ["their_op", "their_op"]


def test_keyboard_interrupt_passes(tmp_path: Path, bare_python: Path, run: RunPython) -> None:
    paths = [
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op="raise KeyboardInterrupt"),
    ]
    code = "try:\n import easydel.operations\nexcept KeyboardInterrupt: print('stopped')"
    assert "stopped" in run(bare_python, "-c", code, environment={"PYTHONPATH": os.pathsep.join(paths)})


def test_operation_module_imported_before_the_host(tmp_path: Path, python: Callable[..., str]) -> None:
    """It imports the host, whose callback then finds it half done; the next import takes it up."""
    output = python(
        f"""
        import their_op
        from easydel.operations import OperationRegistry
        import colorsys  # any import that is new to the process
        import easydel_ragged_plugin as plugin
        print({HOLDER}, plugin.status().pending)
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
    )
    assert output.splitlines()[-1] == "their_op ()"
    assert warnings_in(output, "their-op") == []


def test_host_that_reads_the_group_itself(tmp_path: Path, python: Callable[..., str]) -> None:
    reads = HOST + textwrap.dedent(
        """
        from importlib.metadata import entry_points
        for entry in entry_points(group="easydel.operations"):
            if entry.name == "op":
                OperationRegistry.register(entry.load())
        """
    )
    output = python(
        """
        from easydel.operations import OperationRegistry
        import easydel_ragged_plugin as plugin
        (entry,) = plugin.status().registrations
        assert entry.by_host and entry.previous is None
        print(plugin.status())
        plugin.deactivate()  # nothing to give back: it is the host's own doing
        assert OperationRegistry.get("op").__module__ == "their_op"
        """,
        stand_in(tmp_path, source=reads),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert "read by the host itself" in output


def test_environment_switch_and_activate(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        """
        import sys
        assert not any("easydel_ragged" in type(each).__module__ for each in sys.meta_path)
        assert {name for name in sys.modules if "easydel_ragged_plugin." in name} == {"easydel_ragged_plugin.startup"}
        from easydel.operations import BuiltIn, OperationRegistry
        import easydel_ragged_plugin as plugin
        assert OperationRegistry.get("op") is BuiltIn is plugin.startup.original("op")
        status = plugin.status()
        assert status.disabled_by_environment and not status.armed and status.host_loaded
        print(status)
        plugin.activate()
        assert OperationRegistry.get("op").__module__ == "their_op"
        assert not plugin.status().disabled_by_environment
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
        environment={"EASYDEL_RAGGED_PLUGIN": "0"},
    )
    assert "off: EASYDEL_RAGGED_PLUGIN=0" in output


def test_activate_before_the_host(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"""
        import easydel_ragged_plugin as plugin
        plugin.activate()
        from easydel.operations import OperationRegistry
        print({HOLDER})
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
        environment={"EASYDEL_RAGGED_PLUGIN": "0"},
    )
    assert output.split() == ["their_op"]


def test_activate_while_the_host_is_being_imported(tmp_path: Path, python: Callable[..., str]) -> None:
    """By the importing thread itself, with no finder in place before: the built-ins are not there yet."""
    host = "import easydel_ragged_plugin; easydel_ragged_plugin.activate()\n" + HOST
    output = python(
        f"""
        from easydel.operations import BuiltIn, OperationRegistry
        import colorsys
        import easydel_ragged_plugin as plugin
        print({HOLDER}, plugin.startup.original("op") is BuiltIn)
        """,
        stand_in(tmp_path, source=host),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
        environment={"EASYDEL_RAGGED_PLUGIN": "0"},
    )
    assert output.split() == ["their_op", "True"]


def test_failing_host_import_is_the_hosts_own(tmp_path: Path, python: Callable[..., str]) -> None:
    host = "import os\nif os.environ.pop('FAIL', None): raise ImportError('the host says no')\n" + HOST
    output = python(
        f"""
        try:
            import easydel.operations
        except ImportError as error:
            print(error)
        from easydel.operations import OperationRegistry
        print({HOLDER})
        """,
        stand_in(tmp_path, source=host),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
        environment={"FAIL": "1"},
    )
    assert output.splitlines() == ["the host says no", "their_op"]


def test_unknown_host_is_left_alone(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        """
        import easydel.operations
        import easydel_ragged_plugin as plugin
        print(plugin.status())
        """,
        stand_in(tmp_path, source="class OperationImpl: ...\nclass OperationRegistry: ..."),
    )
    assert "start-up failed: TypeError: easydel.operations has no OperationRegistry._registry" in output
    assert "upgrade easydel-ragged-plugin" in output


def test_activate_raises_where_the_host_is_unknown(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        """
        import easydel.operations
        import easydel_ragged_plugin as plugin
        try:
            plugin.activate()
        except TypeError as error:
            assert str(error) in plugin.status().error
            print(error)
        plugin.deactivate()
        """,
        stand_in(tmp_path, source="class OperationImpl: ...\nclass OperationRegistry: ..."),
        environment={"EASYDEL_RAGGED_PLUGIN": "0"},
    )
    assert output.startswith("easydel.operations has no OperationRegistry._registry (dict) and OperationImpl (class)")


def test_deactivate_during_registration_wins(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        """
        from easydel.operations import BuiltIn, OperationRegistry
        import easydel_ragged_plugin as plugin
        assert OperationRegistry.get("op") is BuiltIn
        assert plugin.status().deactivated and not plugin.status().registrations
        """,
        stand_in(tmp_path),
        third_party(
            tmp_path,
            "their-op",
            "op = their_op:Op",
            their_op=OPERATION + "import easydel_ragged_plugin; easydel_ragged_plugin.deactivate()",
        ),
        options=("-W", "ignore"),
    )
    assert output == ""


def test_many_threads(tmp_path: Path, python: Callable[..., str]) -> None:
    host = "import time; time.sleep(0.2)\n" + HOST
    output = python(
        f"""
        import sys, threading
        sys.setswitchinterval(1e-5)
        import easydel_ragged_plugin as plugin
        errors = []
        def work(i):
            try:
                if i % 3 == 0:
                    import easydel.operations
                elif i % 3 == 1:
                    plugin.activate()
                else:
                    import their_op
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        import colorsys
        from easydel.operations import BuiltIn, OperationRegistry
        print({HOLDER}, plugin.startup.original("op") is BuiltIn, errors)
        """,
        stand_in(tmp_path, source=host),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert output.splitlines()[-1] == "their_op True []"


@pytest.mark.parametrize("state", ["armed", "waiting", "pending"])
def test_finder_imports_nothing_that_another_thread_may_be_importing(
    state: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    """The interpreter calls finders with its import lock held, which the other thread needs to get on."""
    output = python(
        f"""
        import sys
        from importlib.machinery import ModuleSpec
        from types import ModuleType
        from easydel_ragged_plugin import startup
        (finder,) = [each for each in sys.meta_path if type(each).__module__ == startup.__name__]
        startup._startup.state = {state!r}
        sys.modules["easydel.operations"] = half = ModuleType("easydel.operations")
        half.__spec__ = ModuleSpec("easydel.operations", None)
        before = set(sys.modules)
        specs = [finder.find_spec(name) for name in ("easydel_ragged_plugin.operations", "colorsys", "no_such_module")]
        print(*sorted(set(sys.modules) - before), *(type(spec and spec.loader).__name__ for spec in specs[1:]))
        """,
        stand_in(tmp_path),
    )
    wrapped = "NoneType" if state == "armed" else "_Loader"
    assert output.split() == ["easydel_ragged_plugin.import_hook", wrapped, "NoneType"]


def test_finders_that_call_every_finder_do_not_recurse(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"""
        import importlib.util, sys
        class CallsEveryFinder:
            def find_spec(self, name, path=None, target=None):
                if not name.startswith("easydel"):
                    return None
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                        return spec
        sys.meta_path.insert(0, CallsEveryFinder())
        sys.meta_path.append(CallsEveryFinder())
        spec = importlib.util.find_spec("easydel.operations")
        assert spec.loader.get_source("easydel.operations") and spec.loader.is_package("easydel.operations")
        from easydel.operations import OperationRegistry
        print({HOLDER})
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert output.split() == ["their_op"]


def test_host_in_a_zip_file(tmp_path: Path, python: Callable[..., str]) -> None:
    """One loader serves every module of the archive, so it must stay as it is."""
    archive = tmp_path / "host.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("easydel/__init__.py", "")
        file.writestr("easydel/operations/__init__.py", HOST)
        file.writestr("easydel/operations/__main__.py", "from . import OperationRegistry as r; print(r.get('op'))")
    op = third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION)
    quiet = ("-W", "ignore")
    output = python(
        f"from easydel.operations import *; from easydel import operations as host\n"
        f"print({HOLDER}, type(host.__loader__).__name__)",
        str(archive),
        op,
        options=quiet,
    )
    assert output.split() == ["their_op", "zipimporter"]
    code = "import runpy; runpy.run_module('easydel.operations', run_name='__main__', alter_sys=True)"
    assert "their_op.Op" in python(code, str(archive), op, options=quiet)
