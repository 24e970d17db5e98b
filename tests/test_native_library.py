"""The native library in new processes: missing, damaged, too new for jaxlib, told what to use, on many devices."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from native_library import LEVELS, needs_library

from easydel_ragged_plugin import system
from easydel_ragged_plugin.kernels import cpu_native

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
def test_huge_pages_are_used_where_the_system_has_them_unless_turned_off() -> None:
    code = "from easydel_ragged_plugin.kernels import cpu_native; print(cpu_native.KERNEL.facts()['huge_pages'])"
    assert in_new_process(code, EASYDEL_RAGGED_HUGE_PAGES="0") == "not used"
    assert in_new_process(code, EASYDEL_RAGGED_HUGE_PAGES=" 1 ") == ("used" if cpu_native.huge_pages() else "not used")
    assert "EASYDEL_RAGGED_HUGE_PAGES is 'yes'" in in_new_process(REASON, EASYDEL_RAGGED_HUGE_PAGES="yes")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux moves memory to huge pages")
@needs_library
def test_a_cache_is_moved_to_huge_pages_while_it_serves() -> None:
    if not cpu_native.huge_pages():
        pytest.skip("this Linux is older than 6.1, or its transparent huge pages are off")
    if system.huge_pages()["transparent"] != "madvise":
        pytest.skip("this Linux gives huge pages to all memory from the start")
    code = """
import functools, hashlib, re, time, jax, jax.numpy as jnp, numpy as np
from easydel_ragged_plugin import page_shape, ragged_page_attention_v3
from easydel_ragged_plugin.kernels import cpu_native
def huge():
    return int(re.search(r"AnonHugePages:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read())[1]) >> 10
pages = jax.random.normal(jax.random.key(0), page_shape("v3", 256, 128, 2, 128, jnp.float32))
index = (jnp.full((1,), 9, jnp.int32), jnp.zeros((1, 4), jnp.int32), jnp.arange(2, dtype=jnp.int32),
         jnp.array([0, 0, 1], jnp.int32))
step = jax.jit(functools.partial(ragged_page_attention_v3, config="cpu_native"), donate_argnums=3)
one = jnp.ones((1, 2, 128), jnp.float32)
before, first, end = huge(), None, time.monotonic() + SECONDS
if AT_ONCE:
    held = hashlib.sha256(np.asarray(pages)).digest()
    cpu_native.KERNEL.settle(pages)
    assert hashlib.sha256(np.asarray(pages)).digest() == held
while huge() < before + 60 and time.monotonic() < end:
    for _ in range(100):
        output, pages = step(one, one, one, pages, *index)
        first = np.asarray(output) if first is None else first
if first is not None:
    np.testing.assert_array_equal(np.asarray(output), first)
print(huge() - before)
"""

    def moved(seconds: int, at_once: bool, used: str) -> int:
        text = code.replace("SECONDS", str(seconds)).replace("AT_ONCE", str(at_once))
        return int(in_new_process(text, EASYDEL_RAGGED_HUGE_PAGES=used))

    assert moved(60, False, "1") >= 60 > moved(3, False, "0")
    assert moved(0, True, "1") >= 60 > moved(0, True, "0")


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
@pytest.mark.parametrize("level_name", LEVELS)
def test_blanks_around_the_name_of_an_instruction_set_do_not_count(level_name: str) -> None:
    code = (
        "from easydel_ragged_plugin.kernels import cpu_native as native\n"
        "native.set_isa(native.isa_levels()[-1])\n"
        "native.set_isa(None)\n"
        "print(native.isa())"
    )
    assert in_new_process(code, EASYDEL_RAGGED_ISA=f"  {level_name} ") == level_name


@needs_library
@pytest.mark.parametrize("name", ["baseline avx2", "baseline,", "BASELINE", "neon portable"])
def test_what_is_not_the_name_of_an_instruction_set_is_a_reason(name: str) -> None:
    assert f"EASYDEL_RAGGED_ISA is {name!r}, and this machine has " in in_new_process(REASON, EASYDEL_RAGGED_ISA=name)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="nm reads the names")
def test_the_library_shows_no_names_but_its_own() -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", cpu_native.KERNEL.facts()["library"]]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    assert names == {
        "easydel_ragged_attention",
        "easydel_ragged_attention_codes",
        "easydel_ragged_build",
        "easydel_ragged_ffi_version",
        "easydel_ragged_huge_pages",
        "easydel_ragged_interface",
        "easydel_ragged_isa",
        "easydel_ragged_isa_levels",
        "easydel_ragged_move_to_huge_pages",
        "easydel_ragged_other_interface",
        "easydel_ragged_set_isa",
        "easydel_ragged_threads",
        "easydel_ragged_use_huge_pages",
    }


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


def build_hook(monkeypatch: pytest.MonkeyPatch, platform: str, *tools: str) -> ModuleType:
    """The build hook of a machine with these programs on PATH. The tests have no hatchling."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(shutil, "which", lambda name: f"/tools/{name}" if name in tools else None)
    for variable in ("CXX", "XLA_FFI_INCLUDE_DIR", "EASYDEL_RAGGED_NATIVE_BUILD", "EASYDEL_RAGGED_NATIVE_TARGET"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "native" / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


@pytest.mark.parametrize(
    ("platform", "tools", "cxx", "problem"),
    [
        ("linux", ["g++"], "", None),
        ("darwin", ["clang++"], "", None),
        ("win32", ["clang++"], "", None),
        ("win32", ["zig"], "zig c++ -target x86_64-windows-gnu", None),
        ("win32", ["g++", "cl"], "", "no C++ compiler on PATH: none of clang++"),
        ("linux", [], "", "no C++ compiler on PATH: none of c++, g++, clang++"),
        ("linux", ["g++"], "clang++ -O2", "no clang++ on PATH, which the environment variable CXX names"),
    ],
)
def test_the_build_says_which_compiler_it_misses(
    monkeypatch: pytest.MonkeyPatch, platform: str, tools: list[str], cxx: str, problem: str | None
) -> None:
    hook = build_hook(monkeypatch, platform, *tools)
    monkeypatch.setenv("CXX", cxx)
    assert hook._compiler_problem() == problem


def test_a_build_on_windows_takes_clang_and_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = build_hook(monkeypatch, "win32", "clang++", "cmake")
    commands: list[tuple[str, ...]] = []
    headers = tmp_path / "xla" / "ffi" / "api"
    headers.mkdir(parents=True)
    (headers / "ffi.h").touch()
    monkeypatch.setenv("XLA_FFI_INCLUDE_DIR", str(tmp_path))

    def run(*command: str) -> None:
        commands.append(command)
        if "--build" in command:
            Path(command[2], "libeasydel_ragged.dll").touch()

    monkeypatch.setattr(hook, "_run", run)
    target = tmp_path / "lib" / hook._library()
    hook.compile_library(ROOT, target)
    assert target.name == "libeasydel_ragged.dll"
    assert target.is_file()
    configure, _ = commands
    assert {"-G", "Ninja", "-DCMAKE_CXX_COMPILER=/tools/clang++"} <= set(configure)
    made = object.__new__(hook.NativeBuildHook)
    made.target_name = "wheel"
    assert made.dependencies() == ["ninja"]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32", "freebsd15"])
def test_the_build_makes_the_file_that_is_looked_for(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """`hatch_build.py` and `cpu_native.py` share no code: the first runs before there is a package."""
    names = cpu_native.LIBRARIES
    assert build_hook(monkeypatch, platform)._library() == names.get(platform, names["linux"])


def test_a_build_on_macos_has_the_tag_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = build_hook(monkeypatch, "darwin", "clang++")
    monkeypatch.setattr(hook, "mac_platforms", lambda: iter(["macosx_15_0_arm64", "macosx_15_0_universal2"]))
    assert hook._tag() == "macosx_15_0_arm64"


TARGETS = tomllib.loads((ROOT / "native" / "targets.toml").read_text(encoding="utf-8"))
SYSTEMS = {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("machine", ["linux", "win32"])
def test_a_wheel_for_another_system(monkeypatch: pytest.MonkeyPatch, machine: str, target: str) -> None:
    hook = build_hook(monkeypatch, machine, "c++", "cmake")
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_TARGET", f" {target} ")
    monkeypatch.setenv("CXX", "of-this-machine")
    monkeypatch.setattr(hook, "_zig", lambda: Path("/tools/zig"))
    system, tag = TARGETS[target]["system"], TARGETS[target]["tag"]
    assert hook._tag() == tag
    assert hook._library() == cpu_native.LIBRARIES[SYSTEMS[system]]
    assert {f"-DCMAKE_SYSTEM_NAME={system}", f"-DCMAKE_CXX_COMPILER=/tools/zig;c++;-target;{target}"} <= set(
        hook._chosen_compiler()
    )
    made = object.__new__(hook.NativeBuildHook)
    made.target_name = "wheel"
    assert made.dependencies() == [hook.HEADERS, hook.ZIG, "ninja"]
    # The oldest glibc or macOS is the same in both names.
    oldest = re.search(r"(?:gnu|macos)\.(\d+)\.(\d+)$", target)
    assert (oldest is None) == (system == "Windows")
    assert oldest is None or f"_{oldest[1]}_{oldest[2]}_" in tag


def test_a_target_that_can_not_be_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = build_hook(monkeypatch, "linux", "c++", "cmake")
    made = object.__new__(hook.NativeBuildHook)
    made.target_name, made.root, made.directory = "wheel", str(ROOT), str(tmp_path)
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_TARGET", "sparc-solaris")
    with pytest.raises(ValueError, match=r"NATIVE_TARGET: got 'sparc-solaris', wanted one of x86_64-linux-gnu"):
        made.initialize("standard", {})
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_TARGET", "x86_64-windows-gnu")
    with pytest.raises(ValueError, match="NATIVE_TARGET=x86_64-windows-gnu: wanted none for an editable install"):
        made.initialize("editable", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="NATIVE_TARGET=x86_64-windows-gnu, but the native library can't be built"):
        made.initialize("standard", {})
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_BUILD", "off")
    with pytest.raises(ValueError, match="NATIVE_BUILD=off and EASYDEL_RAGGED_NATIVE_TARGET=x86_64-windows-gnu"):
        made.initialize("standard", {})
