"""Programs for TPUs, compiled by libtpu for described ones: nothing of the cache's size but the cache."""

from __future__ import annotations

import os
from typing import Any

import jax
import pytest
from described_tpus import HAS_LIBTPU, call, compiled

from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.layout import Version

# `nox -s tpu` brings it; elsewhere nobody misses it.
if not HAS_LIBTPU and os.environ.get("EASYDEL_RAGGED_TEST_TPU_COMPILER") == "require":
    raise ModuleNotFoundError("libtpu is not installed, which EASYDEL_RAGGED_TEST_TPU_COMPILER=require asks for")
pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")


def size(arrays: list[Any]) -> int:
    """Bytes of the largest array: the cache."""
    return max(each.size * each.dtype.itemsize for each in arrays)


def check_cache_is_not_copied(version: Version, kind: str, *geometry: Any, **how: Any) -> None:
    """It is aliased, and temporaries are small beside it."""
    function, arguments, donated = call(version, *geometry, **how)
    memory = compiled(function, arguments, donated, kind).memory_analysis()
    cache = size(arguments)
    assert not donated or memory.alias_size_in_bytes >= cache, f"aliased: {memory.alias_size_in_bytes} of {cache} bytes"
    # A block of keys and values and the states of all rows, whatever the cache's size.
    assert memory.temp_size_in_bytes < 16 * 2**20, f"temporaries: {memory.temp_size_in_bytes} of {cache} bytes"


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
