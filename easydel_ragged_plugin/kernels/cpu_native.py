"""Native CPU kernel: C++ behind JAX's foreign function interface (FFI). The C++ is in ``native/``.

The library is loaded with ctypes on first use and registered once, at the latest when ``api`` is imported. Nothing of
it depends on a Python version, but it is built for one version of XLA's FFI, and a process whose jaxlib is older must
not register it: jaxlib would reject it while the CPU backend starts, and take the backend with it. So the version is
compared here, before registering, and whatever is wrong is a reason that :func:`availability` gives and
:meth:`CpuNativeKernel.refuses` repeats.

Environment:
    EASYDEL_RAGGED_NATIVE_LIBRARY: path of a library to load in place of the installed one.
    EASYDEL_RAGGED_ISA: an instruction set below the best, one of those that :func:`isa_levels` lists. Blanks around the
        name do not count. With any other name the kernel is not available.
    EASYDEL_RAGGED_HUGE_PAGES: 0 leaves caches in the memory pages that JAX gave them. By default they are moved to huge
        ones while they serve, where Linux can. With anything else than 0 or 1 the kernel is not available.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin import turboquant
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands
from easydel_ragged_plugin.varying import result_type

__all__ = ["KERNEL", "CpuNativeKernel", "availability", "huge_pages", "isa", "isa_levels", "set_isa"]

LIBRARY_VARIABLE = "EASYDEL_RAGGED_NATIVE_LIBRARY"
ISA_VARIABLE = "EASYDEL_RAGGED_ISA"
HUGE_PAGES_VARIABLE = "EASYDEL_RAGGED_HUGE_PAGES"

INTERFACE = 6
"""Version of what this file and the library agree on; ``easydel_ragged_interface`` of the library."""

TARGETS = tuple(f"easydel_ragged_attention_v{version}" for version in range(1, INTERFACE + 1))
"""Names of the custom call, for each version of the interface. A saved program may hold an older one: it gets an error
in place of buffers that it would misread."""

TARGET = TARGETS[-1]
"""The name that this version calls."""

CODES_TARGET = f"easydel_ragged_attention_codes_v{INTERFACE}"
"""The name that this version calls over TurboQuant caches."""

QUERY_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*QUERY_DTYPES, "float8_e4m3fn", "float8_e5m2")

LIBRARIES = {"linux": "libeasydel_ragged.so", "darwin": "libeasydel_ragged.dylib", "win32": "libeasydel_ragged.dll"}
LIBRARY = LIBRARIES.get(sys.platform, LIBRARIES["linux"])
"""Name of the library's file in the installed package; ``native/CMakeLists.txt`` gives it."""

MAX_HEAD_DIM = 4096
"""Above it the tiles of the products would not fit in a cache of any CPU."""


class _Unusable(Exception):
    """Why the library can't be used in this process."""


def _library_path() -> Path:
    """The library's file: the one that the environment names, or the one inside the installed package."""
    named = os.environ.get(LIBRARY_VARIABLE, "").strip()
    if named:
        if not os.path.isfile(named):
            raise _Unusable(f"{LIBRARY_VARIABLE} names {named!r}, which is not a file")
        return Path(named)
    # `files`, not `__file__`: an editable install may keep the package's files in more than one folder.
    installed = importlib.resources.files("easydel_ragged_plugin") / "lib" / LIBRARY
    if installed.is_file():
        return Path(str(installed))
    raise _Unusable(
        "the native library is not installed: this package was built without a C++ compiler or CMake. "
        "Install both and reinstall the package from source to get it"
    )


def _offered_ffi_version() -> tuple[int, int]:
    """The FFI version of the jaxlib in this process, from the headers that it carries."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise _Unusable(f"jaxlib's FFI version is unknown: {error}") from error
    found = {name: re.search(rf"^#define XLA_FFI_API_{name} (\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR")}
    major, minor = found["MAJOR"], found["MINOR"]
    if major is None or minor is None:
        raise _Unusable(f"jaxlib's FFI version is unknown: {header} defines none")
    return int(major[1]), int(minor[1])


def _isa_of_environment() -> bytes | None:
    """The instruction set that the environment names, which the library takes or refuses; None for the best."""
    return os.environ.get(ISA_VARIABLE, "").strip().encode() or None


def _load() -> ctypes.CDLL:
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
        interface, built_for = library.easydel_ragged_interface(), library.easydel_ragged_ffi_version()
        library.easydel_ragged_isa.restype = ctypes.c_char_p
        library.easydel_ragged_isa_levels.restype = ctypes.c_char_p
        library.easydel_ragged_set_isa.argtypes = [ctypes.c_char_p]
        library.easydel_ragged_move_to_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise _Unusable(f"the native library can't be loaded: {error}") from error
    if interface != INTERFACE:
        raise _Unusable(f"{path} has interface version {interface}, this package wants {INTERFACE}: reinstall it")
    built_major, built_minor = divmod(built_for, 1000)
    major, minor = _offered_ffi_version()
    if built_major != major or built_minor > minor:
        raise _Unusable(
            f"the native library was built for XLA FFI {built_major}.{built_minor} and this jaxlib offers "
            f"{major}.{minor}: upgrade jaxlib"
        )
    wanted = _isa_of_environment()
    if not library.easydel_ragged_set_isa(wanted):
        levels = library.easydel_ragged_isa_levels().decode()
        raise _Unusable(f"{ISA_VARIABLE} is {os.environ[ISA_VARIABLE]!r}, and this machine has {levels}")
    use = os.environ.get(HUGE_PAGES_VARIABLE, "").strip() or "1"
    if use not in ("0", "1"):
        raise _Unusable(f"{HUGE_PAGES_VARIABLE} is {os.environ[HUGE_PAGES_VARIABLE]!r}; set it to 0 or 1")
    library.easydel_ragged_use_huge_pages(int(use))
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    try:
        return _load()
    except _Unusable as reason:
        return str(reason)


def availability() -> str | None:
    """Why the native kernel can't be used in this process, or None when it can. Touches no device."""
    library = _library()
    return library if isinstance(library, str) else None


def _require() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"cpu_native: {library}.")
    return library


def _built_with() -> str | None:
    """Compiler, C library and instruction sets of the library; None for one that was built before it said so."""
    build = getattr(_require(), "easydel_ragged_build", None)
    if build is None:
        return None
    build.restype = ctypes.c_char_p
    return build().decode()


def isa() -> str:
    """The instruction set in use."""
    return _require().easydel_ragged_isa().decode()


def huge_pages() -> bool:
    """Whether caches are moved to huge pages of memory while they serve.

    Only Linux from 6.1 on can, where its transparent huge pages are not off. ``EASYDEL_RAGGED_HUGE_PAGES=0`` leaves
    caches where they are.
    """
    return bool(_require().easydel_ragged_huge_pages())


def isa_levels() -> tuple[str, ...]:
    """The instruction sets that this machine and the library have, best first."""
    return tuple(_require().easydel_ragged_isa_levels().decode().split(","))


def set_isa(name: str | None) -> None:
    """Use another instruction set from the next call on, compiled functions included.

    Args:
        name: one of :func:`isa_levels`, or None for the one that the environment names, else the best.

    Raises:
        ValueError: the library or this machine has no such instruction set. The one in use stays.
    """
    if not _require().easydel_ragged_set_isa(_isa_of_environment() if name is None else name.encode()):
        raise ValueError(f"instruction set: got {name!r}, wanted one of {', '.join(isa_levels())}.")


_registration = threading.Lock()


@functools.cache
def _register() -> None:
    library = _require()
    for target in TARGETS:
        handler = library.easydel_ragged_attention if target == TARGET else library.easydel_ragged_other_interface
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    codes = jax.ffi.pycapsule(library.easydel_ragged_attention_codes)
    jax.ffi.register_ffi_target(CODES_TARGET, codes, platform="cpu")


def _attributes(request: AttentionRequest) -> dict[str, np.float32 | np.int64]:
    """The numbers of a call that are known when it is traced: ``RAGGED_ATTRIBUTES`` in ``native/src/problem.h``."""
    layout = request.layout
    # Pairs of bfloat16 are multiplied only where the operands are to be bfloat16, and codes, which are more exact, only
    # where the queries are bfloat16, too.
    pairs = request.compute_dtype.name == "bfloat16"
    if request.cache_format == turboquant.FORMAT:
        pairs = pairs and request.query_dtype.name == "bfloat16"
    return {
        "softmax_scale": np.float32(request.logits_scale),
        "logits_soft_cap": np.float32(request.options.soft_cap or 0.0),
        "v_scale": np.float32(request.v_scale),
        "sliding_window": np.int64(request.options.window or 0),
        "attention_chunk_size": np.int64(request.options.chunk or 0),
        "float_products": np.int64(not pairs),
        "num_kv_heads": np.int64(request.num_kv_heads),
        "page_size": np.int64(layout.page_size),
        "token_stride": np.int64(layout.token_stride),
        "head_stride": np.int64(layout.head_stride),
        "value_offset": np.int64(layout.value_offset),
        "padded_head_dim": np.int64(layout.padded_head_dim),
    }


def _nothing() -> jax.Array:
    """An array that is not there."""
    return jnp.zeros((0,), jnp.float32)


def _sinks(operands: Operands) -> jax.Array:
    return _nothing() if operands.sinks is None else operands.sinks.astype(jnp.float32)


def _index(operands: Operands) -> tuple[jax.Array, ...]:
    return operands.context_lens, operands.block_tables, operands.query_start_loc, operands.distribution


def _call(
    target: str,
    request: AttentionRequest,
    operands: Operands,
    arrays: list[jax.Array],
    updated: dict[int, Any],
) -> tuple[jax.Array, list[jax.Array], jax.Array | None]:
    """Call the library.

    Args:
        arrays: the operands of the call.
        updated: operands that are the cache, and are updated in place, by their place in ``arrays``. Where the caller
            donates them, nothing is copied.

    Returns:
        The output, the updated operands, and the logsumexp where it is wanted.
    """
    results = [result_type(operands.queries.shape, request.query_dtype, operands)]
    results += [result_type(each.shape, each.dtype, operands) for each in updated.values()]
    if request.return_lse:
        results.append(result_type((request.num_tokens, request.num_q_heads), jnp.float32, operands))
    aliases = {place: 1 + i for i, place in enumerate(updated)}
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential", input_output_aliases=aliases)
    output, *rest = call(*arrays, **_attributes(request))
    lse = rest.pop() if request.return_lse else None
    return output, rest, lse


def _attend_plain(request: AttentionRequest, operands: Operands) -> Attended:
    arrays = [
        operands.queries,
        operands.pages,
        *_index(operands),
        _sinks(operands),
        _nothing() if operands.k_scale is None else operands.k_scale,
        _nothing() if operands.v_scale is None else operands.v_scale,
    ]
    updated = {}
    keys, values = operands.keys, operands.values
    if keys is not None and values is not None:
        if keys.dtype != values.dtype or keys.dtype.name not in CACHE_DTYPES:
            keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
        arrays += [keys, values]
        updated = {1: operands.pages}
    output, pages, lse = _call(TARGET, request, operands, arrays, updated)
    return Attended(output, pages[0] if pages else operands.pages, lse)


def _attend_codes(request: AttentionRequest, operands: Operands) -> Attended:
    """New tokens are compressed outside of the call. It rotates queries, and outputs back; or keys and values back."""
    cache: turboquant.TurboQuantPages = operands.pages
    constants = cache.constants
    arrays = [
        operands.queries,
        *_index(operands),
        _sinks(operands),
        turboquant.query_rotation(constants, jnp.float32),
        constants.rotation.astype(jnp.float32).T,
        turboquant.padded_codebook(constants.key_codebook.astype(jnp.float32)),
        turboquant.padded_codebook(constants.value_codebook.astype(jnp.float32)),
    ]
    updated = {}
    first = len(arrays)
    arrays += cache.arrays
    if operands.keys is not None and operands.values is not None:
        updated = {first + i: each for i, each in enumerate(cache.arrays)}
        arrays += turboquant.compress(operands.keys, operands.values, cache)
    output, pages, lse = _call(CODES_TARGET, request, operands, arrays, updated)
    return Attended(output, cache.with_arrays(pages) if pages else cache, lse)


class CpuNativeKernel(Kernel):
    """Ragged page attention v2 and v3 in C++ with SIMD, on as many of XLA's threads as a call pays for."""

    name = "cpu_native"
    platforms = frozenset({"cpu"})
    technologies = frozenset({"cpu", "native"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "k_scale",
                "v_scale",
                "scale_arrays",
                "sinks",
                "compute_dtype",
                "update_pages",
                "vmem_limit_bytes",  # it uses none
            }
        ),
        cache_formats=frozenset({"plain", turboquant.FORMAT.name}),
        results=frozenset({"lse"}),
    )
    custom_calls = (TARGET, CODES_TARGET)
    label = "native (this package)"
    color = "#0f766e"

    def facts(self) -> dict[str, Any]:
        """The library, its instruction sets, the threads that a call may take, and how the library was built."""
        reason = availability()
        if reason is not None:
            return {"available": False, "reason": reason}
        return {
            "available": True,
            "reason": None,
            "library": str(_library_path()),
            "isa": isa(),
            "isa_levels": list(isa_levels()),
            # XLA's thread pool has one for each processor of the affinity; a cgroup may leave fewer.
            "threads": min(_require().easydel_ragged_threads(), os.cpu_count() or 1),
            "huge_pages": "used" if huge_pages() else "not used",
            "built_with": _built_with(),
        }

    def fingerprint(self) -> str:
        """The instruction set, or why there is none: numbers differ between them in their last bits.

        A library that the environment names is told from others by its bytes: its path may differ between workers.
        """
        reason = availability()
        if reason is not None:
            return f"not available: {reason}"
        if not os.environ.get(LIBRARY_VARIABLE, "").strip():
            return isa()
        return f"{isa()}, library {hashlib.sha256(_library_path().read_bytes()).hexdigest()[:12]}"

    def refuses(self, request: AttentionRequest) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.refuses`."""
        unavailable = availability()
        if unavailable is not None:
            return unavailable
        if request.query_dtype.name not in QUERY_DTYPES:
            return f"{request.query_dtype.name} queries; takes {', '.join(QUERY_DTYPES)}"
        if request.cache_format != turboquant.FORMAT and request.cache_dtype.name not in CACHE_DTYPES:
            return f"a {request.cache_dtype.name} cache; takes {', '.join(CACHE_DTYPES)}"
        if request.compute_dtype.name not in QUERY_DTYPES:
            return f"compute_dtype {request.compute_dtype.name}; computes in float32"
        if request.head_dim > MAX_HEAD_DIM:
            return f"head_dim {request.head_dim}, more than {MAX_HEAD_DIM}"
        return None

    def settle(self, pages: jax.Array) -> None:
        """Move all of a cache to huge pages now. See :meth:`easydel_ragged_plugin.types.Kernel.settle`."""
        for shard in pages.addressable_shards:
            _require().easydel_ragged_move_to_huge_pages(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)

    def register_ffi_targets(self) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.register_ffi_targets`. It loads the library."""
        unavailable = availability()
        if unavailable is None:
            with _registration:
                _register()
        return unavailable

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`. Block sizes of the config do not apply here."""
        with _registration:
            _register()
        attend = _attend_codes if request.cache_format == turboquant.FORMAT else _attend_plain
        with jax.named_scope("ragged_page_attention_native"):
            return attend(request, operands)


KERNEL = CpuNativeKernel()
