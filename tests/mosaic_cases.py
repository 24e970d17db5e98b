"""The shared cases in shapes that the Mosaic kernel takes, and where its interpreter can run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from easydel_ragged_plugin import RaggedPageConfig
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import HEAD_DIMS, LongRows, PallasMosaicGPU
from easydel_ragged_plugin.testing.batches import Case

__all__ = ["EVERY_ROW", "INTERPRETED", "NEEDED_THREADS", "in_its_shape", "not_interpreted"]

INTERPRETED = PallasMosaicGPU(interpret=True)
EVERY_ROW = RaggedPageConfig(kernel_config=LongRows(more_than=0))
"""Rows with one new token are long, too: the rows of the shared cases are short."""

NEEDED_THREADS = 6
"""The three warpgroups wait for one another in threads of XLA, which has one for each processor, or NPROC of them."""


def not_interpreted() -> str | None:
    """Why the interpreter can't run here, or would wait forever; or None."""
    reason = INTERPRETED.facts()["reason"]
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if reason is None and threads < NEEDED_THREADS:
        reason = f"JAX's interpreter for GPUs needs {NEEDED_THREADS} threads of XLA, here are {threads}; set NPROC"
    return reason


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
        if case.cache_dtype is None and case.name != "long-context"  # minutes in an interpreter
    )
