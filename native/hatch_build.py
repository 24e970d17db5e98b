"""Build-time only: compiles the native library into the wheel (a hatchling build hook).

With a C++ compiler the wheel is tagged ``py3-none-<platform>`` and carries ``easydel_ragged_plugin/lib/``. Without one
it is a pure wheel, complete but for the kernel ``cpu_native``, and the build says so. An editable install gets the
library beside the sources. GCC has to be 11 or later. On Windows the compiler has to be clang++ for MinGW: GCC does not
align vectors on the stack there, and the language of the kernels is not that of ``cl``.

A wheel for an index is built for one of the systems of ``targets.toml``, on whatever machine, by zig's compiler, which
comes from the package registry. The wheel's tag then says the oldest system that it runs on.

Environment:
    EASYDEL_RAGGED_NATIVE_TARGET: a system's name in ``targets.toml``. ``CXX`` does not count then, and a library that
        can't be compiled is an error.
    EASYDEL_RAGGED_NATIVE_BUILD: ``auto`` (the default, as above), ``off`` for a pure wheel, ``require`` to fail
        instead of building a pure wheel.
    CXX: the compiler, with arguments if need be, in place of the first on PATH.
    XLA_FFI_INCLUDE_DIR: folder with ``xla/ffi/api/ffi.h``, in place of that of the jaxlib below.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import mac_platforms

VARIABLE = "EASYDEL_RAGGED_NATIVE_BUILD"
TARGET_VARIABLE = "EASYDEL_RAGGED_NATIVE_TARGET"
HEADERS = "jaxlib==0.8.0"
"""The oldest supported: a library that was built for its FFI runs on it and on every later one."""
ZIG = "ziglang==0.17.1"
WINDOWS = sys.platform == "win32"
LIBRARIES = {"Linux": "libeasydel_ragged.so", "Darwin": "libeasydel_ragged.dylib", "Windows": "libeasydel_ragged.dll"}
"""The library's file by CMake's name of the system, as ``easydel_ragged_plugin/kernels/cpu_native.py`` looks for it."""


TARGETS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text(encoding="utf-8"))
"""Systems that wheels are built for: see ``targets.toml``."""


class _CannotBuild(Exception):
    """Why there will be no native library."""


def _mode() -> str:
    mode = os.environ.get(VARIABLE, "").strip() or "auto"
    if mode not in ("auto", "off", "require"):
        raise ValueError(f"{VARIABLE}: got {mode!r}, wanted auto, off or require.")
    return mode


def _target() -> str | None:
    """The system that the environment names; None for the one of this machine."""
    named = os.environ.get(TARGET_VARIABLE, "").strip()
    if named and named not in TARGETS:
        raise ValueError(f"{TARGET_VARIABLE}: got {named!r}, wanted one of {', '.join(TARGETS)}.")
    return named or None


def _library() -> str:
    """Name of the library's file on the system that is built for."""
    target = _target()
    if target is not None:
        return LIBRARIES[TARGETS[target]["system"]]
    return LIBRARIES[{"win32": "Windows", "darwin": "Darwin"}.get(sys.platform, "Linux")]


def _tag() -> str:
    """The platform of the wheel's name: the target's, else this machine's."""
    target = _target()
    if target is not None:
        return TARGETS[target]["tag"]
    if sys.platform == "darwin":
        # Not that of the interpreter, which may be for two processors and for older systems.
        return next(iter(mac_platforms()))
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _compilers() -> list[str]:
    """Names of compilers, the one to take first."""
    named = os.environ.get("CXX", "").split()
    return named[:1] or (["clang++"] if WINDOWS else ["c++", "g++", "clang++"])


def _compiler() -> str | None:
    return next((found for name in _compilers() if (found := shutil.which(name))), None)


def _compiler_problem() -> str | None:
    if _target() is not None or _compiler() is not None:  # zig is among what the build installs
        return None
    if os.environ.get("CXX", "").split():
        return f"no {_compilers()[0]} on PATH, which the environment variable CXX names"
    return f"no C++ compiler on PATH: none of {', '.join(_compilers())}"


def _headers() -> Path:
    named = os.environ.get("XLA_FFI_INCLUDE_DIR", "").strip()
    if named:
        folder = Path(named)
    else:
        found = importlib.util.find_spec("jaxlib")
        if found is None or found.origin is None:
            raise _CannotBuild(f"no jaxlib to take the FFI headers from; the build wanted {HEADERS}")
        folder = Path(found.origin).parent / "include"
    if not (folder / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise _CannotBuild(f"no xla/ffi/api/ffi.h in {folder}")
    return folder


def _run(*command: str) -> None:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if finished.returncode != 0:
        raise _CannotBuild(f"{' '.join(command)} failed:\n{finished.stdout[-4000:]}")


def _zig() -> Path:
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        raise _CannotBuild(f"no zig; the build wanted {ZIG}")
    return Path(found.origin).with_name("zig.exe" if WINDOWS else "zig")


def _chosen_compiler() -> list[str]:
    """CMake's options for the compiler and what it compiles for, where these are not what CMake finds."""
    target = _target()
    if target is not None:
        system, processor = TARGETS[target]["system"], TARGETS[target]["processor"]
        compiler = f"-DCMAKE_CXX_COMPILER={_zig().as_posix()};c++;-target;{target}"
        return ["-G", "Ninja", f"-DCMAKE_SYSTEM_NAME={system}", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", compiler]
    # CMake would take Visual Studio's compiler, and its own generator, on Windows.
    chosen = ["-G", "Ninja"] if WINDOWS else []
    if WINDOWS and not os.environ.get("CXX", "").strip():
        chosen.append(f"-DCMAKE_CXX_COMPILER={_compiler()}")
    return chosen


def compile_library(source: Path, target: Path) -> None:
    """Build ``native/`` of the source tree into the file ``target``."""
    problem = _compiler_problem()
    if problem is not None:
        raise _CannotBuild(problem)
    cmake = shutil.which("cmake")
    if cmake is None:
        raise _CannotBuild("no cmake on PATH")
    headers = _headers()
    with tempfile.TemporaryDirectory() as folder:
        _run(
            cmake, "-S", str(source / "native"), "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
            f"-DXLA_FFI_INCLUDE_DIR={headers}", *_chosen_compiler(),
        )  # fmt: skip
        _run(cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process that has an earlier library in memory keeps it.
        beside = target.with_suffix(".new")
        shutil.copy(Path(folder, _library()), beside)
        beside.replace(target)


class NativeBuildHook(BuildHookInterface):
    """Adds the compiled library and the platform's tag, or warns."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        if self.target_name != "wheel" or _mode() == "off" or _compiler_problem() is not None:
            return []
        needed = [] if os.environ.get("XLA_FFI_INCLUDE_DIR") else [HEADERS]
        if _target() is not None:
            needed.append(ZIG)
        if shutil.which("cmake") is None:
            needed.append("cmake>=3.18")
        if (WINDOWS or _target() is not None) and shutil.which("ninja") is None:
            needed.append("ninja")
        return needed

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        if _mode() == "off":
            if _target() is not None:
                raise ValueError(f"{VARIABLE}=off and {TARGET_VARIABLE}={_target()}: wanted one of them alone.")
            return
        root = Path(self.root)
        inside = f"easydel_ragged_plugin/lib/{_library()}"
        editable = version == "editable"
        if editable and _target() is not None:
            raise ValueError(f"{TARGET_VARIABLE}={_target()}: wanted none for an editable install, which stays here.")
        target = root / inside if editable else Path(self.directory, "native", _library())
        try:
            compile_library(root, target)
        except _CannotBuild as reason:
            required = f"{TARGET_VARIABLE}={_target()}" if _target() is not None else f"{VARIABLE}={_mode()}"
            if _target() is not None or _mode() == "require":
                raise RuntimeError(f"{required}, but the native library can't be built: {reason}") from reason
            self.app.display_warning(
                f"easydel-ragged-plugin: built WITHOUT the native CPU kernel: {reason}. Everything else works; on CPU "
                "the portable kernel is used. `easydel-ragged doctor` shows it."
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_tag()}"
        if not editable:
            build_data["force_include"][str(target)] = inside
            self._made = target

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        made: Path | None = getattr(self, "_made", None)
        if made is not None:
            shutil.rmtree(made.parent, ignore_errors=True)
