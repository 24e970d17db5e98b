"""The Mosaic kernel's numbers without a GPU, in JAX's interpreter for GPUs, and what it refuses.

The interpreter runs the barriers, the copies and the rings of the real program, one program after the other. What the
compilers make of it is in test_mosaic_compile.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from importlib import metadata
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import QUICK_TO_COMPILE
from mosaic_cases import EVERY_ROW, INTERPRETED, in_its_shape, no_threads

from easydel_ragged_plugin import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import pallas_mosaic_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Card
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import KERNEL, LongRows, sizes
from easydel_ragged_plugin.layout import PageLayout, page_shape
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, Case, Row, case_named
from easydel_ragged_plugin.testing.kernel_contract import KernelResults
from easydel_ragged_plugin.types import AttentionRequest

REASON = no_threads()
needs_threads = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAW_CASE = in_its_shape([case_named("mixed")])[0]
# Two blocks of keys and the beginning of a third, in pages of a part of a block and of two: the ring goes around, and
# the last block has a tail. The window begins within a block.
LONG = Case(
    "several-blocks",
    (Row(600, 70), Row(300, 33), Row(40, 40)),
    q_heads=8,
    kv_heads=2,
    head_dim=128,
    page_size=32,
    pages_per_row=20,
    num_tokens=160,
    num_rows=4,
    num_pages=None,
    dtype="bfloat16",
    sinks="heads",
    options=Options(sliding_window=200, logits_soft_cap=5.0),
)
IN_BRIEF = (LONG,)
MORE = (
    dataclasses.replace(LONG, name="several-blocks-plain", sinks=None, options=Options()),
    dataclasses.replace(LONG, name="several-blocks-pages-of-256", page_size=256, pages_per_row=3, head_dim=64),
    dataclasses.replace(LONG, name="several-blocks-head-dim-256", head_dim=256, kv_heads=8, options=Options()),
    dataclasses.replace(LONG, name="group-of-16", q_heads=16, kv_heads=1, head_dim=64),
    dataclasses.replace(LONG, name="group-of-5", q_heads=5, kv_heads=1, head_dim=64, dtype="float16"),
    *in_its_shape(CASES),
)


@needs_threads
class TestMosaicInBrief(KernelResults):
    """Rows with few tokens are decoded by Triton's kernel here, as they are for a user."""

    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = IN_BRIEF


@needs_threads
@pytest.mark.long
@pytest.mark.once
class TestMosaicInEveryCase(KernelContract):
    kernel: ClassVar = INTERPRETED
    config: ClassVar = EVERY_ROW
    compiler_options: ClassVar = QUICK_TO_COMPILE
    law_case: ClassVar = LAW_CASE
    cases: ClassVar = MORE
    known_failures: ClassVar = {
        "test_inside_of_shard_map": "loops of Pallas' interpreter carry no varying axes, as in test_pallas_gpu.py",
        **{
            f"test_strict_settings_change_no_number[{version}-rank-dtype-x64]": (
                "the interpreter's threads lower without the setting that the program was traced with"
            )
            for version in ("v2", "v3")
        },
    }


def request(**changes: Any) -> AttentionRequest:
    """bfloat16, 32 query heads for 8 kv heads, head_dim 128, pages of 128 tokens: a request that it takes."""
    fields = {
        "version": "v3", "q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 128, "dtype": "bfloat16",
        "cache": None, "tokens": 512, **changes,
    }  # fmt: skip
    dtype = np.dtype(jnp.dtype(fields["dtype"]))
    cache = np.dtype(jnp.dtype(fields["cache"] or fields["dtype"]))
    version, kv_heads, head_dim = fields["version"], fields["kv_heads"], fields["head_dim"]
    shape = page_shape(version, 64, fields["page_size"], kv_heads, head_dim, cache)
    layout = PageLayout.of(version, shape, kv_heads, head_dim, cache)
    return AttentionRequest(
        version, "gpu", fields["tokens"], fields["q_heads"], kv_heads, head_dim, 8, 16, 64, dtype, cache, layout
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on an H100, with an assembler that is trusted, and all packages that it needs."""
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA H100 80GB HBM3", Card(132, 227 * 1024, (9, 0))))
    monkeypatch.setattr(pallas_mosaic_gpu, "miscompiles", lambda: None)
    monkeypatch.setattr(pallas_mosaic_gpu, "OLDEST_JAX", (0, 8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.once
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"version": "v2", "q_heads": 8, "head_dim": 64, "page_size": 16, "dtype": "float16"}, None),
        ({"q_heads": 64, "kv_heads": 1, "head_dim": 256, "page_size": 256}, None),
        ({"dtype": "float32"}, "queries: float32; takes bfloat16, float16"),
        ({"cache": "float8_e5m2"}, "cache: float8_e5m2; takes that of the queries, bfloat16"),
        ({"head_dim": 80}, "head_dim 80; takes 64, 128, 256"),
        ({"page_size": 8}, "page_size 8; takes 16, 32, 64, 128, 256"),
        ({"page_size": 48}, "page_size 48; takes 16, 32, 64, 128, 256"),
        ({"q_heads": 96}, "12 query heads for a kv head; takes 1 to 8, and multiples of 8 up to 64"),
        ({"tokens": 4}, "4 tokens in all: no row has so many that it is not decoded"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], reason: str | None) -> None:
    assert KERNEL.refuses(request(**changes)) == reason


@pytest.mark.once
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0), None])
def test_no_other_card(capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for one would end the process."""
    monkeypatch.setattr(tiles, "card", lambda: ("a card", Card(132, 227 * 1024, capability)))
    found = "an unknown one" if capability is None else ".".join(map(str, capability))
    assert KERNEL.refuses(request()) == f"takes compute capability 9.0 alone (Hopper), this is {found}"


@pytest.mark.once
@pytest.mark.parametrize(
    ("package", "version", "trusted"),
    [
        ("nvidia-cuda-nvcc-cu12", "12.6.85", True),
        ("nvidia-cuda-nvcc-cu12", "12.8.93", False),
        ("nvidia-cuda-nvcc-cu12", "12.9.86", False),
        ("nvidia-cuda-nvcc", "13.0.88", True),
        (None, "12070", True),
        (None, "12090", False),
        (None, "13000", True),
        (None, "", False),
    ],
)
def test_assemblers_that_miscompile(
    package: str | None, version: str, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of the package that brings ptxas; without one, that of CUDA, as JAX's client has it."""

    class Device:
        class client:
            platform_version = f"PJRT C API\ncuda {version}"

    def version_of(name: str) -> str:
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    reason = pallas_mosaic_gpu.miscompiles()
    assert (reason is None) == trusted
    assert trusted or "miscompile" in str(reason)


def test_long_rows_that_decode_can_not_leave() -> None:
    with pytest.raises(ValueError, match="more_than: got -1, wanted None or an int of at least 0"):
        LongRows(-1)
    config = RaggedPageConfig(kernel_config=LongRows(5))
    with pytest.raises(Unsupported, match="tiles of 16 queries hold 4 tokens of 4 query heads"):
        KERNEL._more_than(request(), config)


def test_tiles_of_every_group_are_whole() -> None:
    """What a copy brings is whole tiles of 8 rows, and what is stored in parts is a power of two."""
    for group in range(1, 65):
        found = sizes.choose(request(q_heads=group, kv_heads=1))
        if group > 8 and group % 8:
            assert found is None
            continue
        assert found is not None
        assert found.tokens * group <= sizes.QUERIES < 2 * (found.tokens + 8) * group
        assert (found.tokens if found.heads_first else group) % 8 == 0
        assert not found.tokens & (found.tokens - 1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes_fit_hopper(head_dim: int) -> None:
    found = sizes.choose(request(head_dim=head_dim))
    assert found is not None
    assert found.shared_bytes(request(head_dim=head_dim)) <= 227 * 1024 - 1024  # barriers
