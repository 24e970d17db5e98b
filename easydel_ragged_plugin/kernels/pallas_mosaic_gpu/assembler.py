"""NVIDIA's assembler: which versions this process may get, and whether they can be trusted."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
from importlib import metadata

import jax

__all__ = ["MISCOMPILED", "miscompiles", "versions"]

PACKAGES = ("nvidia-nvjitlink-cu12", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")
"""Those that bring NVIDIA's assembler to JAX: as a library, or as the program ptxas."""
SYSTEM_PTXAS = "/usr/local/cuda/bin/ptxas"
MISCOMPILED = ("12.8", "12.9")
"""Versions of CUDA whose ptxas miscompiles causal masks, according to JAX's own attention kernel for Hopper
(``jax/experimental/pallas/ops/gpu/attention_mgpu.py``). It names 12.8.0 to 12.9.1, by the version of the runtime, which
is one number for all 12.9."""

RUNTIME = "CUDA"
"""Source of a version that is that of JAX's client, in place of an assembler's."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of CUDA of the assemblers, by where they come from; empty where none is known.

    XLA takes the library, the first ptxas in the PATH, or another one. Which, it does not say.
    """
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            found[f"{name} {version}"] = ".".join(version.split(".")[:2])
    for path in (shutil.which("ptxas"), SYSTEM_PTXAS):
        if path is not None:
            found[path] = version_of(path)
    known = {source: version for source, version in found.items() if version}
    if known:
        return known
    runtime = re.search(r"\bcuda (\d+)", jax.local_devices()[0].client.platform_version)
    if runtime is None:
        return {}
    number = int(runtime[1])  # 12080 is 12.8
    return {f"{RUNTIME} {number}": f"{number // 1000}.{number % 1000 // 10}"}


@functools.cache
def miscompiles() -> str | None:
    """Why what assembles programs for this process's GPU can't be trusted, or None: none may be a bad one."""
    known = versions()
    if not known:
        return "the version of CUDA is unknown; the ptxas of some miscompiles it"
    for source, version in known.items():
        if version in MISCOMPILED:
            return f"ptxas of CUDA {version} ({source}) miscompiles causal masks; install another one, such as CUDA 13"
    return None


@functools.cache
def version_of(ptxas: str) -> str:
    """Version of CUDA of a ptxas; an empty text where it does not run, and so XLA does not take it."""
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\bV(\d+\.\d+)\.\d+\b", said)
    return "" if found is None else found[1]
