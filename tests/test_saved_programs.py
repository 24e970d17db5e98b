"""Programs that one process saves and another runs: the functions behind the names in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import needs_library

from easydel_ragged_plugin import CUSTOM_CALLS, programs, register_ffi_targets, select
from easydel_ragged_plugin.kernels import cpu_native

PROGRAM = Path(__file__).with_name("saved_programs.py")


def run_program(*arguments: str, **environment: str) -> list[str]:
    """The lines that the program prints."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the programs of another process."""
    folder = str(tmp_path_factory.mktemp("programs"))
    run_program("save", folder)
    return folder


@needs_library
@pytest.mark.parametrize("how", ["register", "function", "running", pytest.param("host", marks=pytest.mark.host)])
def test_another_process_runs_saved_programs(saved: str, how: str) -> None:
    """After the public function, on first use of any other, with a backend that runs already, on import of EasyDeL."""
    printed = run_program("load", saved, how)
    for version in ("v2", "v3"):
        assert f"ok {version} exported" in printed, printed
        assert f"ok {version} executable" in printed, printed


@needs_library
def test_a_program_of_another_version_is_refused_in_words(saved: str) -> None:
    printed = run_program("load", saved, "register")
    for version in ("v2", "v3"):
        (older,) = (line for line in printed if line.startswith(f"refused {version} older"))
        assert "this program was saved with an older version of easydel-ragged-plugin" in older
        assert "Save it again, or install the version that it was saved with." in older
        (newer,) = (line for line in printed if line.startswith(f"refused {version} newer"))
        assert "easydel_ragged_attention_v99" in newer


@needs_library
def test_a_process_that_registers_nothing_is_told_the_name(saved: str) -> None:
    """What the functions are for: without them XLA knows no function of this name."""
    printed = run_program("load", saved, "nothing")
    assert len(printed) == 8
    for line in printed:
        assert line.startswith("refused"), line
        assert "easydel_ragged_attention_v" in line


@needs_library
@pytest.mark.parametrize("use", ["register_ffi_targets()", "explain"])
def test_registering_starts_no_backend(use: str) -> None:
    """Where the environment names a platform that does not exist, to start a backend is an error."""
    code = f"import easydel_ragged_plugin as package; package.{use}; print('registered'); import jax; jax.devices()"
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "registered\n", done.stderr
    assert "nowhere" in done.stderr  # that JAX started one after it


def test_what_cannot_be_registered_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "availability", lambda: "the native library is not installed")
    with pytest.raises(
        RuntimeError, match=r"not all can be registered. cpu_native: the native library is not installed"
    ):
        register_ffi_targets()
    assert programs.register_available() == ["cpu_native: the native library is not installed"]


def test_names_hold_the_version_of_the_interface() -> None:
    assert f"easydel_ragged_attention_v{cpu_native.INTERFACE}" in CUSTOM_CALLS
    assert len(set(CUSTOM_CALLS)) == len(CUSTOM_CALLS)
    declared = {name for kernel in select.BUILT_IN.values() for name in kernel.custom_calls}
    assert declared == set(CUSTOM_CALLS)
