"""Several processes: jobs of ``jax.distributed``, and Ray actors. What they must have in common: test_workers.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
