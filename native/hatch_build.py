"""Build-time only: compiles the native library into the wheel (a hatchling build hook).

With a C++ compiler the wheel is tagged ``py3-none-<platform>`` and carries ``easydel_ragged_plugin/lib/``. Without one
it is a pure wheel, complete but for the kernel ``cpu_native``, and the build says so. An editable install gets the
library beside the sources. GCC has to be 11 or later. On Windows the compiler has to be clang++ for MinGW: GCC does not
align vectors on the stack there, and the language of the kernels is not that of ``cl``.

Environment:
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
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "EASYDEL_RAGGED_NATIVE_BUILD"
HEADERS = "jaxlib==0.8.0"
"""The oldest supported: a library that was built for its FFI runs on it and on every later one."""
WINDOWS = sys.platform == "win32"
LIBRARY = "libeasydel_ragged.dll" if WINDOWS else "libeasydel_ragged.so"
"""As ``easydel_ragged_plugin/kernels/cpu_native.py`` looks for it."""
INSIDE = f"easydel_ragged_plugin/lib/{LIBRARY}"


class _CannotBuild(Exception):
    """Why there will be no native library."""


def _mode() -> str:
    mode = os.environ.get(VARIABLE, "").strip() or "auto"
    if mode not in ("auto", "off", "require"):
        raise ValueError(f"{VARIABLE}: got {mode!r}, wanted auto, off or require.")
    return mode


def _compilers() -> list[str]:
    """Names of compilers, the one to take first."""
    named = os.environ.get("CXX", "").split()
    return named[:1] or (["clang++"] if WINDOWS else ["c++", "g++", "clang++"])


def _compiler() -> str | None:
    return next((found for name in _compilers() if (found := shutil.which(name))), None)


def _compiler_problem() -> str | None:
    if _compiler() is not None:
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


def compile_library(source: Path, target: Path) -> None:
    """Build ``native/`` of the source tree into the file ``target``."""
    problem = _compiler_problem()
    if problem is not None:
        raise _CannotBuild(problem)
    cmake = shutil.which("cmake")
    if cmake is None:
        raise _CannotBuild("no cmake on PATH")
    headers = _headers()
    # CMake would take Visual Studio's compiler, and its own generator, on Windows.
    chosen = ["-G", "Ninja"] if WINDOWS else []
    if WINDOWS and not os.environ.get("CXX", "").strip():
        chosen.append(f"-DCMAKE_CXX_COMPILER={_compiler()}")
    with tempfile.TemporaryDirectory() as folder:
        _run(
            cmake, "-S", str(source / "native"), "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
            f"-DXLA_FFI_INCLUDE_DIR={headers}", *chosen,
        )  # fmt: skip
        _run(cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process that has an earlier library in memory keeps it.
        beside = target.with_suffix(".new")
        shutil.copy(Path(folder, LIBRARY), beside)
        beside.replace(target)


class NativeBuildHook(BuildHookInterface):
    """Adds the compiled library and the platform's tag, or warns."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        if self.target_name != "wheel" or _mode() == "off" or _compiler_problem() is not None:
            return []
        needed = [] if os.environ.get("XLA_FFI_INCLUDE_DIR") else [HEADERS]
        if shutil.which("cmake") is None:
            needed.append("cmake>=3.18")
        if WINDOWS and shutil.which("ninja") is None:
            needed.append("ninja")
        return needed

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or _mode() == "off":
            return
        root = Path(self.root)
        editable = version == "editable"
        target = root / INSIDE if editable else Path(self.directory, "native", LIBRARY)
        try:
            compile_library(root, target)
        except _CannotBuild as reason:
            if _mode() == "require":
                raise RuntimeError(f"{VARIABLE}=require, but the native library can't be built: {reason}") from reason
            self.app.display_warning(
                f"easydel-ragged-plugin: built WITHOUT the native CPU kernel: {reason}. Everything else works; on CPU "
                "the portable kernel is used. `easydel-ragged doctor` shows it."
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if not editable:
            build_data["force_include"][str(target)] = INSIDE
            self._made = target

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        made: Path | None = getattr(self, "_made", None)
        if made is not None:
            shutil.rmtree(made.parent, ignore_errors=True)
