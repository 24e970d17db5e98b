"""The native library in new processes: missing, damaged, too new for jaxlib, told what to use, on many devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import LEVELS, needs_library

ROOT = Path(__file__).resolve().parent.parent


def in_new_process(code: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


REASON = "from easydel_ragged_plugin.kernels import cpu_native; print(cpu_native.availability())"


def test_a_missing_library_is_a_reason() -> None:
    assert "which is not a file" in in_new_process(REASON, EASYDEL_RAGGED_NATIVE_LIBRARY="/nowhere/lib.so")


def test_something_else_than_the_library_is_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(b"not a library")
    assert "can't be loaded" in in_new_process(REASON, EASYDEL_RAGGED_NATIVE_LIBRARY=str(file))


@needs_library
def test_an_unknown_instruction_set_is_a_reason() -> None:
    assert "EASYDEL_RAGGED_ISA is 'z80'" in in_new_process(REASON, EASYDEL_RAGGED_ISA="z80")


@needs_library
def test_an_older_jaxlib_is_a_reason_and_the_backend_lives() -> None:
    code = (
        "from easydel_ragged_plugin.kernels import cpu_native as native\n"
        "native._offered_ffi_version = lambda: (0, 0)\n"
        "print(native.availability())\n"
        "import jax\n"
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    reason, answer = in_new_process(code).splitlines()
    assert "built for XLA FFI 0." in reason
    assert reason.endswith("offers 0.0: upgrade jaxlib")
    assert answer == "2"


@needs_library
@pytest.mark.parametrize("level_name", LEVELS)
def test_environment_chooses_the_instruction_set(level_name: str) -> None:
    code = "from easydel_ragged_plugin.kernels import cpu_native; print(cpu_native.isa())"
    assert in_new_process(code, EASYDEL_RAGGED_ISA=level_name) == level_name


@needs_library
def test_sharded_over_devices_equals_one_device() -> None:
    """Eight devices in one process share one thread pool, and their calls run at the same time."""
    code = """
import functools, numpy as np, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from easydel_ragged_plugin import ragged_page_attention_v2 as attend
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("heads",))
key = jax.random.key(0)
queries = jax.random.normal(key, (40, 32, 64)); pages = jax.random.normal(key, (130, 16, 32, 64))
index = (jnp.full((5,), 400, jnp.int32), jnp.arange(125, dtype=jnp.int32).reshape(5, 25),
         jnp.array([0, 1, 2, 3, 4, 40], jnp.int32), jnp.array([5], jnp.int32))
call = functools.partial(attend, config="cpu_native")
one = jax.jit(call)(queries, pages, *index)
specs = (P(None, "heads"), P(None, None, "heads"), P(), P(), P(), P())
many = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P(None, "heads")))
for _ in range(20):
    np.testing.assert_allclose(np.asarray(many(queries, pages, *index)), np.asarray(one), rtol=1e-5, atol=1e-5)
print("equal", len(jax.devices()))
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    assert in_new_process(code, XLA_FLAGS=flags) == "equal 8"


def instruction_sets() -> list[str]:
    """Those of every architecture that the library can be built for, as CMake reads them."""
    listed = (ROOT / "native" / "instruction_sets.cmake").read_text(encoding="utf-8")
    return re.findall(r"^instruction_set\((\w+)", listed, re.MULTILINE)


def test_docs_list_the_instruction_sets_that_are_built() -> None:
    section = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("## `cpu_native`")[1].split("\n## ")[0]
    table = section.split("| instruction set |")[1].split("\n\n")[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(documented) == sorted(instruction_sets())


@needs_library
def test_the_library_has_no_instruction_set_that_is_not_listed() -> None:
    assert LEVELS
    assert set(LEVELS) <= set(instruction_sets())
