"""Registration at start-up: real interpreters, real distributions, and the real host at the end.

Most cases run against a stand-in host of thirty lines, in an environment that has this package's wheel and nothing
else. There its own entry points can't load (no JAX), which is one more broken entry that the host must survive.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunPython

NAMES = ("ragged_page_attention_v2", "ragged_page_attention_v3")

HOST = """
class OperationImpl:
    pass

class OperationRegistry:
    _registry = {}

    @classmethod
    def register(cls, impl):
        cls._registry[impl.get_impl_name()] = impl
        return impl

@OperationRegistry.register
class BuiltIn(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "op"

@OperationRegistry.register
class Other(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "ragged_page_attention_v3"
"""

OPERATION = """
from easydel.operations import OperationImpl

class Op(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "op"
"""

HOLDER = "OperationRegistry._registry['op'].__module__"


def stand_in(root: Path, package: str = "operations", source: str = HOST, parent: str = "") -> str:
    """A host that has an operations package and nothing else."""
    folder = root / "host" / "easydel" / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    (root / "host" / "easydel" / "__init__.py").write_text(parent)
    if "/" in package:
        (folder.parent / "__init__.py").touch()
    return str(root / "host")


def third_party(root: Path, distribution: str, entries: str, **modules: str) -> str:
    """An installed distribution: metadata and modules in a folder of its own."""
    folder = root / distribution
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[easydel.operations]\n{textwrap.dedent(entries)}\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return str(folder)


@pytest.fixture
def python(bare_python: Path, run: RunPython) -> Callable[..., str]:
    """Run code in the bare environment with some folders on PYTHONPATH."""

    def python(code: str, *paths: str, options: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> str:
        variables = {"PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        return run(bare_python, *options, "-c", textwrap.dedent(code), environment=variables)

    return python


def warnings_in(output: str, distribution: str) -> list[str]:
    """Each distinct warning about a distribution, without its location."""
    marker = f"EntryPointWarning: {distribution}: "
    return [line.partition("EntryPointWarning: ")[2] for line in output.splitlines() if marker in line]


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
        assert "armed" in str(plugin.status()) and startup.original("op") is None
        import easydel
        assert "easydel_ragged_plugin.registration" not in sys.modules or not plugin.status().registrations
        assert "their_op" not in sys.modules
        host = importlib.import_module({name!r})
        registry = host.OperationRegistry._registry
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
        registry = host.OperationRegistry._registry
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
        print(first._registry["op"].__module__, second._registry["op"].__module__)
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert output.split() == ["their_op", "their_op"]


BROKEN = {
    "does-not-import": ("op = bad:Op", "import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_"),
    "does-not-compile": ("op = bad:Op", "class", "SyntaxError"),
    "exits": ("op = bad:Op", "raise SystemExit(3)", "SystemExit: 3"),
    "raises-base": ("op = bad:Op", "raise BaseException('odd')", "BaseException: odd"),
    "has-no-class": ("op = bad:Op", "", "AttributeError: module 'bad' has no attribute 'Op'"),
    "is-no-operation": (
        "op = bad:Op",
        "class Op: ...",
        "TypeError: got <class 'bad.Op'>, wanted a subclass of easydel.",
    ),
    "is-no-class": ("op = bad:Op", "def Op(): ...", "TypeError: got <function Op"),
    "is-a-module": ("op = bad", "", "TypeError: got <module 'bad'"),
    "is-malformed": ("op = bad op:", "", "was left out: "),
    "has-another-name": (
        "other = bad:Op",
        OPERATION,
        "ValueError: the class's get_impl_name() gives 'op', wanted the entry point's name 'other'",
    ),
    "has-no-name": (
        "op = bad:Op",
        "from easydel.operations import OperationImpl\nclass Op(OperationImpl): ...",
        "AttributeError: type object 'Op' has no attribute 'get_impl_name'",
    ),
    "registers-then-fails": (
        "op = bad:Op",
        OPERATION + "from easydel.operations import OperationRegistry\nOperationRegistry.register(Op)\n1 / 0",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("distribution", BROKEN)
def test_broken_entry_point_is_a_warning_that_names_it(
    distribution: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    entries, source, reason = BROKEN[distribution]
    good = third_party(tmp_path, "good", "fine = good_op:Op", good_op=OPERATION.replace('"op"', '("x", "fine")'))
    output = python(
        """
        from easydel.operations import OperationRegistry
        import easydel_ragged_plugin as plugin
        print("holders", *(OperationRegistry._registry[name].__module__ for name in ("op", "fine")))
        assert "other" not in OperationRegistry._registry
        print(plugin.status())
        """,
        stand_in(tmp_path),
        third_party(tmp_path, distribution, entries, bad=source),
        good,
    )
    assert "holders easydel.operations good_op" in output
    (warning,) = warnings_in(output, distribution)
    name, _, value = entries.partition(" = ")
    assert warning.startswith(
        f"{distribution}: entry point {name} = {value} of group easydel.operations was left out: "
    )
    assert reason in warning
    assert output.count(warning) == 2, "once as a warning, once in status()"


def test_unreadable_metadata_hides_nobody(tmp_path: Path, python: Callable[..., str]) -> None:
    unreadable = third_party(tmp_path, "unreadable", "")
    (tmp_path / "unreadable" / "unreadable-1.0.dist-info" / "entry_points.txt").write_bytes(
        b"[easydel.operations]\n\xff\xfe = x\n"
    )
    nameless = third_party(tmp_path, "nameless", "op = their_op:Op")
    (tmp_path / "nameless" / "nameless-1.0.dist-info" / "METADATA").unlink()
    unparsable = third_party(tmp_path, "unparsable", "op\n = \n[easydel.operations]\nop")
    output = python(
        f"from easydel.operations import OperationRegistry; print({HOLDER})",
        stand_in(tmp_path),
        unreadable,
        nameless,
        unparsable,
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
    )
    assert output.splitlines()[-1] == "their_op"
    assert "unreadable-1.0.dist-info: its entry points can't be read: UnicodeDecodeError" in output
    assert "nameless-1.0.dist-info: its entry points can't be read: " in output


@pytest.mark.parametrize("order", [("a-op", "b-op"), ("b-op", "a-op")])
def test_duplicate_goes_to_the_first_name_whatever_the_path(
    order: tuple[str, str], tmp_path: Path, python: Callable[..., str]
) -> None:
    paths = {
        name: third_party(tmp_path, name, f"op = {name[0]}_op:Op", **{f"{name[0]}_op": OPERATION}) for name in order
    }
    output = python(
        f"from easydel.operations import OperationRegistry; import sys; print({HOLDER}, 'b_op' in sys.modules)",
        stand_in(tmp_path),
        *(paths[name] for name in order),
    )
    assert output.splitlines()[-1] == "a_op False"
    (warning,) = warnings_in(output, "b-op")
    assert "entry point op = b_op:Op" in warning
    assert "a-op provides this operation already" in warning


def test_broken_duplicate_makes_way(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"from easydel.operations import OperationRegistry; print({HOLDER})",
        stand_in(tmp_path),
        third_party(tmp_path, "a-op", "op = a_op:Op", a_op="1 / 0"),
        third_party(tmp_path, "b-op", "op = b_op:Op", b_op=OPERATION),
        options=("-W", "ignore"),
    )
    assert output.split() == ["b_op"]


def test_slow_entry_point_is_named(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"""
        from easydel_ragged_plugin import registration
        assert 2 < registration.SLOW_ENTRY_SECONDS < 20
        registration.SLOW_ENTRY_SECONDS = 0.5
        from easydel.operations import OperationRegistry
        print({HOLDER})
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "sleeper", "op = slow_op:Op", slow_op="import time; time.sleep(0.7)\n" + OPERATION),
    )
    assert output.splitlines()[-1] == "slow_op"
    (warning,) = warnings_in(output, "sleeper")
    assert "entry point op = slow_op:Op of group easydel.operations is slow: it took 0.7 s" in warning


def test_warnings_as_errors_do_not_stop_the_host(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"""
        from easydel.operations import OperationRegistry
        print({HOLDER})
        import easydel_ragged_plugin as plugin
        try:
            plugin.activate()
        except plugin.startup.EntryPointWarning as error:
            print("raised", error)
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "bad", "broken = bad:Op", bad="1 / 0"),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=OPERATION),
        options=("-W", "error"),
    )
    assert "their_op" in output.splitlines()
    assert "raised bad: entry point broken = bad:Op" in output


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


def test_class_registered_by_decorator_still_has_a_predecessor(tmp_path: Path, python: Callable[..., str]) -> None:
    decorated = OPERATION.replace("OperationImpl\n", "OperationImpl, OperationRegistry\n", 1).replace(
        "class Op(", "@OperationRegistry.register\nclass Op("
    )
    output = python(
        """
        from easydel.operations import BuiltIn, OperationRegistry
        import easydel_ragged_plugin as plugin
        (entry,) = plugin.status().registrations
        assert entry.cls.__module__ == "their_op" and entry.previous is BuiltIn
        plugin.deactivate()
        assert OperationRegistry._registry["op"] is BuiltIn
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=decorated),
        options=("-W", "ignore"),
    )
    assert output == ""


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
        assert OperationRegistry._registry["op"].__module__ == "their_op"
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
        assert OperationRegistry._registry["op"] is BuiltIn is plugin.startup.original("op")
        status = plugin.status()
        assert status.disabled_by_environment and not status.armed and status.host_loaded
        print(status)
        plugin.activate()
        assert OperationRegistry._registry["op"].__module__ == "their_op"
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


def test_two_finders_of_this_kind_do_not_ask_each_other_for_ever(tmp_path: Path, python: Callable[..., str]) -> None:
    output = python(
        f"""
        import importlib.util, sys
        class Asks:
            def find_spec(self, name, path=None, target=None):
                if not name.startswith("easydel"):
                    return None
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                        return spec
        sys.meta_path.insert(0, Asks())
        sys.meta_path.append(Asks())
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
        file.writestr(
            "easydel/operations/__main__.py", "from . import OperationRegistry as r; print(r._registry['op'])"
        )
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


# ---- the real host --------------------------------------------------------------------------------------------

REPORT = f"""
import json, sys
def report():
    from easydel_ragged_plugin import host, startup
    registry = host.operations_module().OperationRegistry._registry
    return {{
        "active": startup.status().active,
        "ours": [registry[name].__module__ for name in {NAMES!r}],
        "before": [startup.original(name).__module__.partition(".")[0] for name in {NAMES!r}],
        "failures": [str(failure) for failure in startup.status().failures],
    }}
"""
GOOD = {"active": True, "ours": ["easydel_ragged_plugin.operations"] * 2, "before": ["easydel"] * 2, "failures": []}


def reported(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


@pytest.mark.host
@pytest.mark.parametrize(
    "first",
    [
        "import easydel; importlib.import_module(package)",
        "importlib.import_module(package)",
        "import easydel_ragged_plugin.operations",
        "from easydel_ragged_plugin import RaggedPageAttnV3",
        "importlib.import_module('easydel.layers.attention')",
        "import jax, easydel_ragged_plugin; easydel_ragged_plugin.activate(); from easydel import eSurge",
    ],
)
def test_real_host_in_any_order_of_imports(first: str, run: RunPython) -> None:
    # Which of its two names the operations package has must be known without importing the host.
    code = f"import importlib; from easydel_ragged_plugin import host\n{REPORT}\n" + (
        "package = host.OPERATIONS_PACKAGES[host.host_version().startswith('0.2')]\n"
        f"assert 'easydel' not in sys.modules\n{first}\nimport colorsys\nprint(json.dumps(report()))"
    )
    output = run(sys.executable, "-I", "-c", code)
    assert reported(output) == GOOD, output
    assert "Overwriting" not in output, output


@pytest.mark.host
def test_real_host_switched_off(run: RunPython) -> None:
    code = f"{REPORT}\nprint(json.dumps(report()))"
    output = run(sys.executable, "-c", code, environment={"EASYDEL_RAGGED_PLUGIN": "0"})
    seen = reported(output)
    assert not seen["active"]
    assert all(module.startswith("easydel.") for module in seen["ours"])


@pytest.mark.host
def test_real_host_with_third_parties(tmp_path: Path, run: RunPython) -> None:
    """Broken, slow and duplicate distributions at once, then off and on again, in one process."""
    package = "importlib.import_module(host.OPERATIONS_PACKAGES[host.host_version().startswith('0.2')])"
    operation = OPERATION.replace(
        "from easydel.operations import OperationImpl",
        f"import importlib; from easydel_ragged_plugin import host; OperationImpl = {package}.OperationImpl",
    )
    paths = [
        third_party(tmp_path, "broken-op", "broken = broken_op:Op", broken_op="1 / 0"),
        third_party(tmp_path, "sleeper-op", "op = slow_op:Op", slow_op="import time; time.sleep(5.2)\n" + operation),
        third_party(tmp_path, "a-thief", f"{NAMES[1]} = thief:Op", thief=operation),
    ]
    code = REPORT + textwrap.dedent(
        """
        import easydel_ragged_plugin as plugin
        from easydel_ragged_plugin import host, startup
        registry = host.operations_module().OperationRegistry._registry
        assert registry["op"].__module__ == "slow_op"
        mine = dict(registry)
        plugin.deactivate()
        assert registry["ragged_page_attention_v3"].__module__.startswith("easydel.") and "op" not in registry
        plugin.activate()
        assert registry == mine
        seen = report()
        seen["failures"] = len(seen["failures"])
        print(json.dumps(seen))
        """
    )
    output = run(sys.executable, "-c", code, environment={"PYTHONPATH": os.pathsep.join(paths)})
    assert reported(output) == {**GOOD, "failures": 2}, output
    assert "broken-op: entry point broken = broken_op:Op" in warnings_in(output, "broken-op")[0]
    assert "is slow: it took 5" in warnings_in(output, "sleeper-op")[0]
    assert "easydel-ragged-plugin provides this operation already" in warnings_in(output, "a-thief")[0]


@pytest.mark.host
def test_spawned_process_and_ray_actor(tmp_path: Path, run: RunPython) -> None:
    """Workers that import the host themselves; the process that starts them has not."""
    script = tmp_path / "workers.py"
    script.write_text(
        REPORT
        + textwrap.dedent(
            """
            class Worker:
                def report(self):
                    return report()

            if __name__ == "__main__":
                import multiprocessing
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    spawned = pool.apply(report)
                import ray
                ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, configure_logging=False, log_to_driver=False)
                try:
                    actor = ray.get(ray.remote(Worker).remote().report.remote(), timeout=240)
                finally:
                    ray.shutdown()
                assert "easydel" not in sys.modules
                print(json.dumps([spawned, actor]))
            """
        )
    )
    assert reported(run(sys.executable, script)) == [GOOD, GOOD]
