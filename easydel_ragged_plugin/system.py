"""What this machine, its packages and its settings are, for reports. Nothing is measured, no package is imported.

Linux says most of it in files; functions that read them take the folder that stands for ``/``. What a system does not
say is None.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "environment",
    "huge_pages",
    "jax_plugins",
    "jax_settings",
    "last_level_cache",
    "machine",
    "memory",
    "operating_system",
    "processor",
    "processor_name",
    "processors",
]

ROOT = Path("/")

INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)
"""Of x86-64 and of ARM, as Linux names them: what CPU kernels are made for."""

PREFIXES = ("EASYDEL_", "EASURGE_", "ESURGE_", "EFORMER_", "EJKERNEL_", "JAX_", "XLA_")
VARIABLES = ("FORCE_NATIVE_RUNTIME", "GLIBC_TUNABLES", "LIBTPU_INIT_ARGS")
"""Environment variables that lead this package, EasyDeL and JAX: by prefix, and by name."""

SECRET = re.compile(r"(?<![^_])(TOKENS?|KEYS?|SECRETS?|PASSW(OR)?D|CREDENTIALS?|AUTH)(?![^_])|GCS_CLIENT")
HIDDEN = "(set, not shown)"

JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_rank_promotion",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_num_cpu_devices",
    "jax_use_shardy_partitioner",
    "jax_disable_jit",
    "jax_debug_nans",
    "jax_transfer_guard",
)


def _text(file: Path) -> str:
    """The file's text, empty where there is none to read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """``name : value`` of each line; the first one counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def operating_system(root: Path = ROOT) -> dict[str, str | None]:
    """System, kernel, architecture, the distribution or release, and the C library."""
    named = re.search(r'^PRETTY_NAME="?(.*?)"?$', _text(root / "etc/os-release"), re.MULTILINE)
    release = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.win32_ver()[1]
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "distribution": (named[1] if named else release) or None,
        "libc": " ".join(filter(None, platform.libc_ver())) or None,
    }


def processors() -> int:
    """Processors that this process may use: those of its affinity. The quota of a cgroup does not count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache(root: Path = ROOT) -> int | None:
    """Bytes of the largest cache; None where Linux does not say, and elsewhere."""
    largest = None
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", _text(file).strip())
        if found:
            size = int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]]
            largest = max(largest or 0, size)
    return largest


def processor_name(root: Path = ROOT) -> str | None:
    """The CPU's model. ARM has numbers in place of a name."""
    fields = _fields(_text(root / "proc/cpuinfo"))
    if "CPU part" in fields:
        return f"implementer {fields.get('CPU implementer')}, part {fields['CPU part']}"
    return fields.get("model name") or platform.processor() or None


def processor(root: Path = ROOT) -> dict[str, Any]:
    """The CPU: model, processors that the machine has and that this process may use, caches, instruction sets."""
    fields = _fields(_text(root / "proc/cpuinfo"))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": processor_name(root),
        "processors": os.cpu_count(),
        "usable": processors(),
        "last_level_cache_bytes": last_level_cache(root),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """Bytes of memory: all, available, swap, and the limit of a container that sees its own group."""
    fields = _fields(_text(root / "proc/meminfo"))

    def size(name: str) -> int | None:
        found = re.fullmatch(r"(\d+) kB", fields.get(name, ""))
        return int(found[1]) << 10 if found else None

    total = size("MemTotal")
    limits = (_text(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory/memory.limit_in_bytes"))
    # Without a limit it is "max", or in version 1 more than any machine has.
    limit = next((int(text) for text in limits if text.strip().isdecimal()), None)
    return {
        "total_bytes": total,
        "available_bytes": size("MemAvailable"),
        "swap_bytes": size("SwapTotal"),
        "limit_bytes": None if limit is None or (total is not None and limit >= total) else limit,
    }


def huge_pages(root: Path = ROOT) -> dict[str, Any]:
    """Linux's transparent huge pages and how they are made (``always``, ``madvise``, ...), and reserved huge pages."""

    def chosen(name: str) -> str | None:
        found = re.search(r"\[(.+?)\]", _text(root / "sys/kernel/mm/transparent_hugepage" / name))
        return found[1] if found else None

    reserved = _fields(_text(root / "proc/meminfo")).get("HugePages_Total")
    return {
        "transparent": chosen("enabled"),
        "defrag": chosen("defrag"),
        "reserved": None if reserved is None else int(reserved),
    }


def machine(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Operating system, CPU, memory and huge pages, under these names."""
    return {
        "operating_system": operating_system(root),
        "processor": processor(root),
        "memory": memory(root),
        "huge_pages": huge_pages(root),
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of ``variables`` that lead this package, EasyDeL or JAX, by name. What may be a secret is not shown.

    All others stay out, whatever they are. Of these a value is hidden where the name speaks of a key or the like, or
    where it is an address with a password.
    """
    return {
        name: HIDDEN if SECRET.search(name) or re.search(r"://[^/\s]*@", variables[name]) else variables[name]
        for name in sorted(variables)
        if name.startswith(PREFIXES) or name in VARIABLES
    }


def jax_plugins() -> list[str]:
    """Distributions that bring a platform to JAX: those with its entry point, and those called ``jax-cuda...``."""
    found = {point.dist.name for point in metadata.entry_points(group="jax_plugins") if point.dist is not None}
    names = (each.name for each in metadata.distributions())
    return sorted(found | {name for name in names if name and re.match(r"jax[-_](cuda|rocm|metal)", name.lower())})


def jax_settings() -> dict[str, Any]:
    """JAX's settings that change numbers, programs or how long they are kept, as they are now. Imports JAX."""
    import jax

    found = {name: getattr(jax.config, name, None) for name in JAX_SETTINGS}
    # Some are members of an enumeration.
    return {name: getattr(value, "value", value) for name, value in found.items()}
