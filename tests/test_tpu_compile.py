"""Programs for TPUs, compiled by libtpu for described ones: nothing of the cache's size but the cache."""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_tpus import HAS_LIBTPU, TOPOLOGIES, behaves_as, call, compiled, compiled_on_slice
from pairwise import pairwise

from easydel_ragged_plugin import explain
from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_tpu import blocks
from easydel_ragged_plugin.layout import Version

# `nox -s tpu` brings it; elsewhere nobody misses it.
if not HAS_LIBTPU and os.environ.get("EASYDEL_RAGGED_TEST_TPU_COMPILER") == "require":
    raise ModuleNotFoundError("libtpu is not installed, which EASYDEL_RAGGED_TEST_TPU_COMPILER=require asks for")
pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")

MOST_TEMPORARY = 0.02
"""Temporary memory, as a part of the cache: blocks of keys and values, states of rows, queries laid out anew."""

LAID_OUT = 5
"""Of a long step over a small cache: times its queries. They, the new tokens and the output are laid out anew."""

FEW_BYTES = 16 * 2**20
"""Of usual steps, whatever the cache's size. ``xla`` takes it for its blocks of keys and values."""

CALLS = {"decode", "prefill"}
"""The calls of ``pallas_tpu`` in a step that may hold prompts."""


def size(arrays: list[Any]) -> int:
    """Bytes of the largest array: the cache."""
    return max(each.size * each.dtype.itemsize for each in arrays)


def check_cache_is_not_copied(
    version: Version,
    kind: str,
    *geometry: Any,
    kernel: str | None = None,
    copied: bool = False,
    most_bytes: int | None = FEW_BYTES,
    **how: Any,
) -> Any:
    """It is aliased, temporaries are small beside it, and ``kernel`` is what runs: that of a new process on this TPU,
    unless ``how`` names one. Temporaries are below ``most_bytes``, too, where it is given. Returns the program.

    A cache that XLA stores in another order may be ``copied``: then ``pallas_tpu`` says so where it is passed over.
    """
    function, arguments, donated = call(version, *geometry, **how)
    with behaves_as(kind):
        selection = explain(function.func, *arguments, **function.keywords)
        assert kernel in (None, selection.kernel), str(selection)
        program = compiled(function, arguments, donated, kind)
    memory, cache, writes = program.memory_analysis(), size(arguments), how.get("update_pages", True)
    aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    assert version == "v2" or not writes or aliased >= cache, f"aliased: {aliased} of {cache} bytes"
    most: float = max(MOST_TEMPORARY * cache, LAID_OUT * arguments[0].size * arguments[0].dtype.itemsize)
    if most_bytes is not None:
        most = most_bytes if selection.kernel == "xla" else min(most, most_bytes)
    if copied:
        assert re.search("copies them at each call|of VMEM", str(selection)), str(selection)
    else:
        assert temporary < most, f"temporaries: {temporary} of {cache} bytes"
    assert calls_in(program) == (CALLS if selection.kernel == "pallas_tpu" else set())
    return program


COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def calls_in(program: Any) -> set[str]:
    return set(re.findall(r"ragged_attention_(\w+?)\b", program.as_text()))


@pytest.mark.parametrize(
    ("version", "kind", "heads", "head_dim", "how"),
    [
        ("v3", "v5e", (32, 8), 128, {}),
        ("v3", "v6e", (32, 8), 128, {"tokens": 256}),
        ("v3", "7x", (64, 8), 64, {"sliding_window": 128}),
        ("v3", "v5p", (9, 3), 80, {"page_size": 16}),
        ("v2", "v6e", (32, 8), 128, {}),
        ("v2", "v5e", (28, 4), 128, {"tokens": 256, "page_size": 16}),
    ],
)
def test_portable_kernel_copies_no_cache(
    version: Version, kind: str, heads: tuple[int, int], head_dim: int, how: dict[str, Any]
) -> None:
    check_cache_is_not_copied(version, kind, heads, head_dim, kernel="xla", config="xla", **how)


@pytest.mark.parametrize(
    ("version", "kind", "heads", "head_dim", "how"),
    [
        ("v3", "v5e", (32, 8), 128, {}),
        ("v3", "v6e", (64, 8), 64, {"tokens": 256, "sliding_window": 128, "sinks": True}),
        ("v3", "7x", (9, 3), 80, {"tokens": 256, "page_size": 16, "return_lse": True}),
        ("v3", "v5p", (28, 4), 256, {"tokens": 256, "cache": jnp.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0}),
        ("v3", "v6e", (8, 1), 128, {"dtype": jnp.float32, "logits_soft_cap": 30.0, "attention_chunk_size": 512}),
        ("v2", "v6e", (32, 8), 128, {"return_lse": True}),
        # A block table of 64 rows of 128k tokens, in pages of 16: 2 MB.
        ("v3", "v5e", (8, 1), 128, {"rows": 64, "context": 2**17, "page_size": 16, "tokens": 2048}),
    ],
)
def test_own_kernel_compiles(
    version: Version, kind: str, heads: tuple[int, int], head_dim: int, how: dict[str, Any]
) -> None:
    check_cache_is_not_copied(version, kind, heads, head_dim, kernel="pallas_tpu", **how)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sinks": True, "sliding_window": 128},
    "cap": {"logits_soft_cap": 30.0, "attention_chunk_size": 4096},
    "scales": {"k_scale": 0.5, "v_scale": 2.0, "return_lse": True},
    "calibrated": {"k_scale": "array", "v_scale": "array"},
}
DTYPES = {
    "bfloat16": {},
    "float32": {"dtype": jnp.float32},
    "float16": {"dtype": jnp.float16, "cache": jnp.bfloat16},
    "e4m3": {"cache": jnp.float8_e4m3fn},
    "e5m2": {"cache": jnp.float8_e5m2},
}
HEADS = ((32, 8), (64, 8), (9, 3), (8, 1), (28, 4), (40, 10), (64, 64), (6, 2))
CACHE_BYTES = 8 * 2**30
"""Of a server with some load: what a step lays out anew grows with its tokens, and not with the cache."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("version", "kind", "heads", "head_dim", "page_size", "tokens", "dtypes", "options"),
    pairwise(
        ("v3", "v3-reads", "v2"),
        tuple(TOPOLOGIES),
        HEADS,
        (64, 80, 96, 128, 192, 256),
        (16, 32, 128, 256),
        (8, 256, 2048),
        tuple(DTYPES),
        tuple(OPTIONS),
    ),
)
def test_whatever_runs_compiles(
    version: str,
    kind: str,
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    tokens: int,
    dtypes: str,
    options: str,
) -> None:
    """Every pair of them, with the kernel that is meant for it: ``pallas_tpu`` for v3, and for v2 where it reads such
    pages."""
    found: Version = "v2" if version == "v2" else "v3"
    how = {**DTYPES[dtypes], **OPTIONS[options]}
    how |= {name: np.ones(heads[1], np.float32) for name, value in how.items() if value == "array"}
    if version == "v3-reads":
        how["update_pages"] = False
    rows = min(64, tokens)
    slot = size(call(found, heads, head_dim, rows=1, context=page_size, page_size=page_size, **how)[1]) // page_size
    own = version != "v2" or reads_v2(heads[1], head_dim, how)
    of_rows = (CACHE_BYTES if own else CACHE_BYTES // 8) // rows  # a copy has to fit beside it
    how |= {"rows": rows, "context": of_rows // (slot * page_size) * page_size}
    how |= {"page_size": page_size, "tokens": tokens}
    # Three of the smallest blocks have to fit three quarters of the memory.
    own = own and 4 * max(page_size, blocks.LEAST_KEYS) * slot < blocks.GENERATIONS[kind].vmem
    check_cache_is_not_copied(
        found, kind, heads, head_dim, kernel="pallas_tpu" if own else "xla", copied=not own, most_bytes=None, **how
    )


def reads_v2(kv_heads: int, head_dim: int, how: dict[str, Any]) -> bool:
    """Whether the rows of a slot of v2 fill words and registers. Others XLA stores in another order."""
    narrow = np.dtype(how.get("cache", jnp.bfloat16)).itemsize == 1
    return head_dim % 128 == 0 and (kv_heads in {2, 4, 8, 64} or (kv_heads == 1 and not narrow))


@pytest.mark.parametrize("kernel", ["pallas_tpu", "xla"])
def test_heads_are_split_over_a_slice(kernel: str) -> None:
    """tp over 2x2: no collective, and each device has its part of the pages in place."""
    function, arguments, donated = call("v3", (32, 8), 128, tokens=256, config=kernel)
    with behaves_as("v6e"):
        program = compiled_on_slice(function, arguments, donated, "v6e")
    memory, cache = program.memory_analysis(), size(arguments) // 4
    assert cache <= memory.alias_size_in_bytes < 2 * cache, memory  # of one device
    assert memory.temp_size_in_bytes < MOST_TEMPORARY * cache, memory
    assert not COLLECTIVE.findall(program.as_text())
    assert calls_in(program) == (CALLS if kernel == "pallas_tpu" else set())


def test_a_collective_is_seen() -> None:
    """Each device has some rows' pages, and the outputs are added up."""
    function, arguments, donated = call("v3", (32, 8), 128, config="xla")
    with behaves_as("v6e"):
        program = compiled_on_slice(function, arguments, donated, "v6e", split="pages")
    assert set(COLLECTIVE.findall(program.as_text())) == {"all-reduce"}


@pytest.mark.parametrize("spoiled", ["read", "write", "own"])
def test_a_copy_is_seen(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the kernels do, the cache is copied."""

    def scatter(new: jax.Array, token: jax.Array, slot: jax.Array, pages: jax.Array) -> jax.Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        return flat.at[slot].set(new[token, 0, 0], mode="drop").reshape(pages.shape)

    if spoiled == "write":
        monkeypatch.setattr(xla, "write_one_by_one", scatter)
    elif spoiled == "read":
        monkeypatch.setattr(xla, "gather_one_by_one", lambda pages, ids: pages[ids])
    else:  # the caller wants its pages back, too
        monkeypatch.setattr("described_tpus.DONATED", ())
    with pytest.raises(AssertionError, match=r"temporaries: |aliased: "):
        check_cache_is_not_copied("v3", "v6e", (32, 8), 128, config="pallas_tpu" if spoiled == "own" else "xla")
