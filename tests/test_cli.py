"""The command line: exit codes, JSON, and what errors say. ``bench`` has a file of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from command_line import invoke, run_command

from easydel_ragged_plugin.demo import model
from easydel_ragged_plugin.demo import run as demo
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.terminal import CommandError

HAS_HOST = importlib.util.find_spec("easydel") is not None


@pytest.mark.parametrize("command", ["demo", "doctor", "bench"])
def test_help_has_examples(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"easydel-ragged {command}" in result.output
    assert "Examples" in result.output


def test_help_imports_no_jax() -> None:
    code = "import sys, easydel_ragged_plugin.cli; sys.exit('jax' in sys.modules)"
    assert run_command(code=code).returncode == 0


# doctor


def test_doctor_without_easydel_is_well() -> None:
    code = (
        "import importlib.metadata as m; from easydel_ragged_plugin import host; host.host_version = lambda: None\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("doctor", code=code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no EasyDeL: functions only" in result.stdout
    assert "pip install 'easydel-ragged-plugin[host]'" in result.stdout
    assert result.stdout.count("ok (largest error") == 2
    assert "all is well" in result.stdout


@pytest.mark.host
@pytest.mark.skipif(not HAS_HOST, reason="needs EasyDeL")
def test_doctor_exit_code_when_switched_off() -> None:
    result = run_command("doctor", "--json", EASYDEL_RAGGED_PLUGIN="0")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert not report["activation"]["active"]
    assert report["environment"]["EASYDEL_RAGGED_PLUGIN"] == "0"
    assert any("EASYDEL_RAGGED_PLUGIN=0" in problem for problem in report["problems"])


@pytest.mark.host
@pytest.mark.skipif(not HAS_HOST, reason="needs EasyDeL")
def test_doctor_exit_code_when_active() -> None:
    # By hand, so that the test holds in a checkout that is not installed, too.
    code = "import easydel_ragged_plugin as p; p.activate(); from easydel_ragged_plugin.cli import main; main()"
    result = run_command("doctor", "--json", code=code)
    report = json.loads(result.stdout)
    assert result.returncode == 0, report["problems"]
    assert report["activation"]["operations"] == {
        f"ragged_page_attention_{version}": f"easydel_ragged_plugin.operations.RaggedPageAttn{version.upper()}"
        for version in ("v2", "v3")
    }
    assert all(name.startswith("easydel.") for name in report["activation"]["replaced"].values())
    assert set(report["selection"]) == set(report["self_check"]) == {"v2", "v3"}


def test_doctor_tells_about_kernels() -> None:
    code = (
        "from easydel_ragged_plugin import host; host.host_version = lambda: None\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    without = run_command("doctor", code=code, EASYDEL_RAGGED_NATIVE_LIBRARY="/nowhere.so")
    assert without.returncode == 0, without.stdout + without.stderr
    assert (
        "cpu_native: not available: EASYDEL_RAGGED_NATIVE_LIBRARY names '/nowhere.so', which is not a file"
        in without.stdout
    )
    if cpu_native.availability() is None:
        result = run_command("doctor", "--json", code=code, EASYDEL_RAGGED_ISA="baseline")
        kernels = json.loads(result.stdout)["kernels"]
        assert kernels.keys() >= {"cpu_native", "pallas_gpu", "xla", "ejkernel"}
        native = kernels["cpu_native"]
        assert native["available"]
        assert native["isa"] == "baseline"
        assert tuple(native["isa_levels"]) == cpu_native.isa_levels()
        assert native["threads"] >= 1
        assert Path(native["library"]).is_file()


def test_doctor_reports_a_wrong_kernel() -> None:
    code = (
        "from easydel_ragged_plugin import api, host; host.host_version = lambda: None\n"
        "right = api.ragged_page_attention_v2\n"
        "api.ragged_page_attention_v2 = lambda *a, **k: right(*a, **k) * 1.01\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("doctor", "--json", code=code)
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["self_check"]["v2"].startswith("WRONG: the answer is off by up to")
    assert report["self_check"]["v3"].startswith("ok")


# demo, as far as it goes without a model


def test_demo_without_the_host_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: ["easydel", "gguf"])
    result = invoke("demo")
    assert result.exit_code == 2
    assert "pip install 'easydel-ragged-plugin[demo]'" in result.output


def test_demo_refuses_a_folder_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: [])
    result = invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "no config.json there" in result.output


def test_demo_knows_what_the_host_cannot_run() -> None:
    with pytest.raises(CommandError, match="EasyDeL's own v3 does not run with head_dim 64"):
        demo._variants("v3", True, False, 64)
    assert list(demo._variants("v3", True, False, 128).values()) == [
        {"mechanism": "ragged_page_attention_v3", "host_kernels": True}
    ]
    assert len(demo._variants("v3", False, True, 64)) == 3
    assert len(demo._variants("v3", False, True, 128)) == 4
