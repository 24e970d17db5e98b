"""Several processes: jobs of ``jax.distributed`` and Ray actors, and what workers must have in common."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import easydel_ragged_plugin
from easydel_ragged_plugin import FingerprintMismatch, check_fingerprints, fingerprint
from easydel_ragged_plugin.host import host_version

PROGRAM = Path(__file__).with_name("two_processes.py")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def run_two(what: str, of_second: dict[str, str] | None = None, timeout_s: float = 300) -> list[str]:
    """What the two processes print; ``of_second`` changes the environment of process 1."""
    port = free_port()
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), what, port, str(process)],
            env={**environment, **(of_second or {} if process else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=timeout_s)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text[-6000:]
        assert text.rstrip().endswith("done"), text[-6000:]
    return printed


def test_two_processes_share_a_call() -> None:
    for text in run_two("calls"):
        assert sum(line.startswith("ok v") for line in text.splitlines()) == 6, text


def test_a_process_that_differs_is_named() -> None:
    of_second = {"EASYDEL_RAGGED_KERNEL": "xla", "EASYDEL_RAGGED_PLUGIN": "0"}
    for text in run_two("odd", of_second):
        assert "refused: 1 of 2 workers differ, measured by process 0:\n  process 1: " in text
        assert "kernel='xla'" in text
        assert "EASYDEL_RAGGED_KERNEL is xla, not unset" in text
        if host_version() is not None:
            assert "operation ragged_page_attention_v3 is easydel." in text
            assert "plugin is off, not active" in text
        assert "ok after the repair" in text


@pytest.mark.host
@pytest.mark.slow
def test_engines_in_ray_actors(tmp_path: Path) -> None:
    """One actor alone, then a model split over two; the answers are those of transformers, token for token."""
    pytest.importorskip("ray")
    import ray_engine
    import tiny_model

    folder = tiny_model.save(tmp_path)
    expected = tiny_model.expected(folder, ray_engine.PROMPTS, 6)
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(here / "ray_engine.py"), folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    ours = ["easydel_ragged_plugin.operations"] * 2
    printed = done.stdout.splitlines()
    assert f"alone {expected}" in printed, done.stdout[-3000:]
    assert f"alone {ours}" in printed
    if host_version() != "0.2.0.2":  # which has no engine for several processes
        assert f"shared {expected}" in printed
        assert f"shared {[ours, ours]}" in printed
        assert "fingerprints agree" in printed


def test_fingerprint_tells_versions_kernels_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    found = fingerprint()
    assert found["easydel-ragged-plugin"] == easydel_ragged_plugin.__version__
    assert found["jax"] == jax.__version__
    assert {"kernel cpu_native", "kernel xla", "kernel ejkernel"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())
    assert found == fingerprint()
    with easydel_ragged_plugin.override_config(num_queries_per_block=8):
        assert fingerprint()["config"] != found["config"]
    monkeypatch.setenv("EASYDEL_RAGGED_KERNEL", "xla")
    assert "kernel='xla'" in fingerprint()["config"]


def test_the_odd_one_out_is_named() -> None:
    good: dict[str, str] = {"jax": "0.9.2", "kernel cpu_native": "avx2"}
    check_fingerprints({"a": good, "b": dict(good)})
    workers: dict[Any, Any] = dict.fromkeys("abcd", good)
    with pytest.raises(FingerprintMismatch) as raised:
        check_fingerprints({"first": {**good, "jax": "0.8.3"}, **workers})
    assert str(raised.value).startswith("1 of 5 workers differ, measured by a, b, c and 1 more:\n")
    assert "  first: jax is 0.8.3, not 0.9.2\n" in str(raised.value)


def test_a_worker_without_the_plugin_is_named() -> None:
    with pytest.raises(FingerprintMismatch) as raised:
        check_fingerprints({0: None, 1: {"jax": "0.9.2"}})
    assert "1 of 2 workers differ, measured by 1:\n  0: has no easydel-ragged-plugin; run 'pip" in str(raised.value)
    with pytest.raises(FingerprintMismatch, match="2 of 2 workers differ"):
        check_fingerprints({0: None, 1: None})


def test_a_missing_fact_is_named() -> None:
    with pytest.raises(FingerprintMismatch, match="1: operation v3 is missing, not ours"):
        check_fingerprints({0: {"operation v3": "ours"}, 1: {}})


def test_no_workers_are_an_error() -> None:
    with pytest.raises(ValueError, match="got none, wanted at least one"):
        check_fingerprints({})


def test_one_process_agrees_with_itself() -> None:
    check_fingerprints()
