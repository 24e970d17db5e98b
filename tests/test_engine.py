"""The host's serving engine on two devices: answers are those of transformers, token for token."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = ("v3:1", "v3:2", "v2:1", "v2:2")


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2])
def test_engine_on_two_devices(kv_heads: int, tmp_path: Path) -> None:
    """Heads split over two devices, then requests and pages, for both operations, in one process."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch for the reference")
    import tiny_model

    folder = tiny_model.save(tmp_path, kv_heads=kv_heads)
    expected = tiny_model.expected(folder, tiny_model.PROMPTS, 6)
    here = Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(here / "engine_on_devices.py"), folder, *ENGINES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    printed = done.stdout.splitlines()
    for each in ENGINES:
        assert f"{each} {expected}" in printed, (each, done.stdout[-3000:])
        version = each.partition(":")[0].upper()
        assert any(line.startswith(f"{each} RaggedPageAttn{version} ") for line in printed)
