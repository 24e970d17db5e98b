"""The shared cases in shapes that the Mosaic kernel takes, where its interpreter can run, and a process on a card."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

from easydel_ragged_plugin import RaggedPageConfig
from easydel_ragged_plugin.kernels import pallas_mosaic_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Card
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import HEAD_DIMS, LongRows, PallasMosaicGPU, assembler
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import CASES, Case, Row

__all__ = [
    "EVERY_CASE",
    "EVERY_ROW",
    "H100",
    "INTERPRETED",
    "KNOWN_FAILURES",
    "NEEDED_THREADS",
    "SEVERAL_BLOCKS",
    "in_its_shape",
    "not_interpreted",
    "on_hopper",
]

H100 = "NVIDIA H100 80GB HBM3"
INTERPRETED = PallasMosaicGPU(interpret=True)
EVERY_ROW = RaggedPageConfig(kernel_config=LongRows(more_than=0))
"""Rows with one new token are long, too: the rows of the shared cases are short."""

KNOWN_FAILURES = {
    "test_inside_of_shard_map": "loops of Pallas' interpreter carry no varying axes, as in test_pallas_gpu.py",
    **{
        f"test_strict_settings_change_no_number[{version}-rank-dtype-x64]": (
            "the interpreter's threads lower without the setting that the program was traced with"
        )
        for version in ("v2", "v3")
    },
}
"""Tests of the contract that the interpreters can't run."""

NEEDED_THREADS = 6
"""The three warpgroups wait for one another in threads of XLA, which has one for each processor, or NPROC of them."""


def not_interpreted() -> str | None:
    """Why the interpreter can't run here, or would wait forever; or None."""
    reason = INTERPRETED.facts()["reason"]
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if reason is None and threads < NEEDED_THREADS:
        reason = f"JAX's interpreter for GPUs needs {NEEDED_THREADS} threads of XLA, here are {threads}; set NPROC"
    return reason


def on_hopper(patch: Any) -> None:
    """Make this a process on an H100, with an assembler that is trusted, and all packages that the kernel needs.

    Args:
        patch: pytest's ``monkeypatch``.
    """
    patch.setattr(tiles, "card", lambda: (H100, Card(132, 227 * 1024, (9, 0))))
    patch.setattr(assembler, "miscompiles", lambda: None)
    patch.setattr(pallas_mosaic_gpu, "OLDEST_JAX", (0, 8))
    patch.setattr(importlib.util, "find_spec", lambda name: name)


def in_its_shape(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases with head_dim, page size and dtype that it takes; those of two dtypes, and of 8 bits, stay out."""
    return tuple(
        dataclasses.replace(
            case,
            head_dim=case.head_dim if case.head_dim in HEAD_DIMS else 64,
            page_size=max(16, case.page_size),
            dtype="bfloat16" if case.dtype == "float32" else case.dtype,
        )
        for case in cases
        if case.cache_dtype is None
    )


# Two blocks of keys and the beginning of a third, in pages of a part of a block and of two: the ring goes around, and
# the last block has a tail. The window begins within a block.
SEVERAL_BLOCKS = Case(
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
_OTHERS: tuple[dict[str, Any], ...] = (
    {"name": "several-blocks-plain", "sinks": None, "options": Options()},
    {"name": "several-blocks-pages-of-256", "page_size": 256, "pages_per_row": 3, "head_dim": 64},
    {"name": "several-blocks-head-dim-256", "head_dim": 256, "kv_heads": 8, "options": Options()},
    {"name": "group-of-16", "q_heads": 16, "kv_heads": 1, "head_dim": 64},
    {"name": "group-of-5", "q_heads": 5, "kv_heads": 1, "head_dim": 64, "dtype": "float16"},
)
EVERY_CASE = (*(dataclasses.replace(SEVERAL_BLOCKS, **other) for other in _OTHERS), *in_its_shape(CASES))
