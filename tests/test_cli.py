"""The command line: exit codes, JSON, and what errors say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from easydel_ragged_plugin.cli import app, bench, demo

HAS_HOST = importlib.util.find_spec("easydel") is not None


def _invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def _run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "easydel_ragged_plugin.cli"] if code is None else ["-c", code]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("command", ["demo", "doctor", "bench"])
def test_help_has_examples(command: str) -> None:
    result = _invoke(command, "--help")
    assert result.exit_code == 0
    assert f"easydel-ragged {command}" in result.output
    assert "Examples" in result.output


def test_help_imports_no_jax() -> None:
    code = "import sys, easydel_ragged_plugin.cli; sys.exit('jax' in sys.modules)"
    assert _run(code=code).returncode == 0


# doctor


def test_doctor_without_easydel_is_well() -> None:
    code = (
        "import importlib.metadata as m; from easydel_ragged_plugin import host; host.host_version = lambda: None\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = _run("doctor", code=code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no EasyDeL: functions only" in result.stdout
    assert "pip install 'easydel-ragged-plugin[host]'" in result.stdout
    assert result.stdout.count("ok (largest error") == 2
    assert "all is well" in result.stdout


@pytest.mark.host
@pytest.mark.skipif(not HAS_HOST, reason="needs EasyDeL")
def test_doctor_exit_code_when_switched_off() -> None:
    result = _run("doctor", "--json", EASYDEL_RAGGED_PLUGIN="0")
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
    result = _run("doctor", "--json", code=code)
    report = json.loads(result.stdout)
    assert result.returncode == 0, report["problems"]
    assert report["activation"]["operations"] == {
        f"ragged_page_attention_{version}": f"easydel_ragged_plugin.operations.RaggedPageAttn{version.upper()}"
        for version in ("v2", "v3")
    }
    assert all(name.startswith("easydel.") for name in report["activation"]["replaced"].values())
    assert set(report["selection"]) == set(report["self_check"]) == {"v2", "v3"}


def test_doctor_reports_a_wrong_kernel() -> None:
    code = (
        "from easydel_ragged_plugin import api, host; host.host_version = lambda: None\n"
        "right = api.ragged_page_attention_v2\n"
        "api.ragged_page_attention_v2 = lambda *a, **k: right(*a, **k) * 1.01\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = _run("doctor", "--json", code=code)
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["self_check"]["v2"].startswith("WRONG: the answer is off by up to")
    assert report["self_check"]["v3"].startswith("ok")


# bench


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_bench_writes_json(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine's limits take seconds to measure and are not what this test is about.
    monkeypatch.setattr(bench, "measure_limits", lambda: bench.Limits(1e10, 1e11))
    file = tmp_path / "results.json"
    options = ("--version", version, "--kernel", "xla", "--repeats", "1", "--no-host", "--dtype", "float32")
    result = _invoke("bench", "--case", "smoke", *options, "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    (line,) = report["results"]
    assert line["case"] == "smoke"
    assert line["kernel"] == "xla"
    assert line["error"] < 1e-4
    assert line["ours_us"] > 0
    assert line["host_us"] is None
    assert report["limits"]["read_bytes_per_s"] == 1e10


@pytest.mark.parametrize("case", bench.BENCH_CASES, ids=lambda case: case.name)
def test_bench_work_is_counted_by_hand(case: bench.Case) -> None:
    data, flops = bench._work(case)
    window = case.window or 10**9
    pairs, read = 0, 0
    for row in case.rows:
        seen: set[int] = set()
        for position in range(row.context - row.new, row.context):
            visible = range(max(0, position - window + 1), position + 1)
            pairs += len(visible)
            seen.update((visible.start, position))
        read += max(seen) - min(seen) + 1
    assert data == 2 * read * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
    assert flops == 4 * pairs * case.q_heads * case.head_dim


def test_bench_lists_every_case() -> None:
    result = _invoke("bench", "--list")
    assert result.exit_code == 0
    assert all(case.name in result.output for case in bench.BENCH_CASES)


def test_bench_names_the_cases_when_one_is_unknown() -> None:
    result = _invoke("bench", "--case", "decode-9x9k")
    assert result.exit_code == 2
    assert "got decode-9x9k, wanted some of decode-1x4k" in result.output


def test_bench_names_the_kernels_when_one_is_unknown() -> None:
    result = _invoke("bench", "--case", "smoke", "--kernel", "warp")
    assert result.exit_code == 2
    assert "got 'warp', wanted one of" in result.output
    assert "xla" in result.output


# demo, as far as it goes without a model


def test_demo_without_the_host_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.models, "missing_packages", lambda: ["easydel", "gguf"])
    result = _invoke("demo")
    assert result.exit_code == 2
    assert "pip install 'easydel-ragged-plugin[demo]'" in result.output


def test_demo_refuses_a_folder_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.models, "missing_packages", list)
    result = _invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "no config.json there" in result.output


def test_demo_knows_what_the_host_cannot_run() -> None:
    with pytest.raises(typer.Exit):
        demo._variants("v3", True, False, 64)
    assert list(demo._variants("v3", True, False, 128).values()) == [
        {"mechanism": "ragged_page_attention_v3", "host_kernels": True}
    ]
    assert len(demo._variants("v3", False, True, 64)) == 3
    assert len(demo._variants("v3", False, True, 128)) == 4
