"""Entry points of other distributions: broken, unreadable, duplicate and slow ones are named, and stop nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import HOLDER, OPERATION, stand_in, third_party, warnings_in

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
        from easydel_ragged_plugin.host import registry
        print("holders", *(OperationRegistry.get(name).__module__ for name in ("op", "fine")))
        assert "other" not in registry()
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
        assert OperationRegistry.get("op") is BuiltIn
        """,
        stand_in(tmp_path),
        third_party(tmp_path, "their-op", "op = their_op:Op", their_op=decorated),
        options=("-W", "ignore"),
    )
    assert output == ""
