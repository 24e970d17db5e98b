"""Programs for TPUs, compiled by libtpu for described ones: nothing of the cache's size but the cache."""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from described_tpus import HAS_LIBTPU, call, compiled

from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_tpu import blocks
from easydel_ragged_plugin.layout import Version

# `nox -s tpu` brings it; elsewhere nobody misses it.
if not HAS_LIBTPU and os.environ.get("EASYDEL_RAGGED_TEST_TPU_COMPILER") == "require":
    raise ModuleNotFoundError("libtpu is not installed, which EASYDEL_RAGGED_TEST_TPU_COMPILER=require asks for")
pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")


def size(arrays: list[Any]) -> int:
    """Bytes of the largest array: the cache."""
    return max(each.size * each.dtype.itemsize for each in arrays)


def check_cache_is_not_copied(version: Version, kind: str, *geometry: Any, **how: Any) -> Any:
    """It is aliased, and temporaries are small beside it. Returns the program."""
    function, arguments, donated = call(version, *geometry, **how)
    program = compiled(function, arguments, donated, kind)
    memory = program.memory_analysis()
    cache = size(arguments)
    assert not donated or memory.alias_size_in_bytes >= cache, f"aliased: {memory.alias_size_in_bytes} of {cache} bytes"
    # Blocks of keys and values, and the states of all rows, whatever the cache's size.
    assert memory.temp_size_in_bytes < 16 * 2**20, f"temporaries: {memory.temp_size_in_bytes} of {cache} bytes"
    return program


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
    check_cache_is_not_copied(version, kind, heads, head_dim, config="xla", **how)


@pytest.mark.parametrize(
    ("version", "kind", "heads", "head_dim", "how"),
    [
        ("v3", "v5e", (32, 8), 128, {}),
        ("v3", "v6e", (64, 8), 64, {"tokens": 256, "sliding_window": 128, "sinks": True}),
        ("v3", "7x", (9, 3), 80, {"tokens": 256, "page_size": 16, "return_lse": True}),
        ("v3", "v5p", (28, 4), 256, {"tokens": 256, "cache": jnp.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0}),
        ("v3", "v6e", (8, 1), 128, {"dtype": jnp.float32, "logits_soft_cap": 30.0, "attention_chunk_size": 512}),
        ("v2", "v6e", (32, 8), 128, {"return_lse": True}),
    ],
)
def test_own_kernel_compiles(
    version: Version, kind: str, heads: tuple[int, int], head_dim: int, how: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(blocks, "generation", lambda: blocks.GENERATIONS[kind])
    program = check_cache_is_not_copied(version, kind, heads, head_dim, config="pallas_tpu", **how)
    found = set(re.findall(r"ragged_attention_(\w+?)\b", program.as_text()))
    assert {"decode", "prefill"} <= found, found


@pytest.mark.parametrize("spoiled", ["read", "write"])
def test_a_copy_is_seen(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the kernel does on a TPU, the cache is copied."""

    def scatter(new: jax.Array, token: jax.Array, slot: jax.Array, pages: jax.Array) -> jax.Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        return flat.at[slot].set(new[token, 0, 0], mode="drop").reshape(pages.shape)

    if spoiled == "write":
        monkeypatch.setattr(xla, "write_one_by_one", scatter)
    else:
        monkeypatch.setattr(xla, "gather_one_by_one", lambda pages, ids: pages[ids])
    with pytest.raises(AssertionError, match="temporaries: "):
        check_cache_is_not_copied("v3", "v6e", (32, 8), 128, config="xla")
