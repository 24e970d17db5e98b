"""Calls of the public functions on the batches of the shared cases, with a kernel that is named."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from easydel_ragged_plugin import ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.batches import Batch, Case, Row, build_batch
from easydel_ragged_plugin.testing.cases import CASES, case_named, one_of_each
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver, KernelOutcome

IN_BRIEF = one_of_each(CASES)
THE_REST = tuple(case for case in CASES if case not in IN_BRIEF)
FEW = tuple(
    case_named(name)
    for name in (
        "decode",
        "mixed",
        "empty-rows",
        "stale-table",
        "all-options",
        "pages-as-they-are",
        "bfloat16-head-dim-64",
        "float8-e4m3",
    )
)
"""Kernels in JAX compile for seconds. So a kernel is held to the whole contract with a few cases; what a call gives is
compared in every case, one of each kind in the quick checks. One JAX will do for that: with the JAX of each EasyDeL the
public functions run a few cases (test_kernels.py), and kernels what their files have beside the contract."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""For tests that compile many programs and run each once."""


@functools.cache
def compiled(version: str, kernel: str, options: Options) -> Callable[..., Any]:
    """One jitted function for all batches with these options, so that batches of equal shapes share a program."""

    keywords = {"config": kernel, **options.keywords()}

    def v2(pages: Any, queries: Any, keys: Any, values: Any, index: Any, last: Any, sinks: Any, scales: Any) -> Any:
        return ragged_page_attention_v2(queries, pages, *index, last, sinks, **keywords, **scales), pages

    def v3(pages: Any, queries: Any, keys: Any, values: Any, index: Any, last: Any, sinks: Any, scales: Any) -> Any:
        return ragged_page_attention_v3(queries, keys, values, pages, *index, last, sinks, **keywords, **scales)

    return jax.jit(v2) if version == "v2" else jax.jit(v3, donate_argnums=0)


def run_batch(batch: Batch, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """Output and pages of the public function on ``batch``, with this kernel."""
    is_v2 = batch.version == "v2"
    call = compiled(batch.version, kernel, batch.case.options)
    output, pages = call(
        jnp.array(batch.updated_pages if is_v2 else batch.pages),
        jnp.array(batch.queries),
        jnp.array(batch.keys),
        jnp.array(batch.values),
        tuple(jnp.array(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)),
        jnp.array(batch.num_seqs if is_v2 else batch.distribution),
        None if batch.sinks is None else jnp.array(batch.sinks),
        {name: jnp.array(scale) for name, scale in batch.scales.items()},
    )
    return np.asarray(output), np.asarray(pages)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bytes: to compare exactly, NaN and the sign of zeros included."""
    return np.ascontiguousarray(array).view(np.uint8)


def overlapping_rows(wrong: int, start: int, **fields: Any) -> tuple[Batch, np.ndarray]:
    """A batch of five rows with one wrong start, and which tokens no two rows claim. ``fields``: those of its case.

    The starts are 0, 1, 2, 8, 16 and 21. The row on one side of the wrong one goes backwards; that on the other side
    claims tokens of good rows, and has context enough to be believed. Those rows must not lose what they write.
    """
    rows = (Row(9, 1), Row(30, 1), Row(17, 6), Row(8, 8), Row(25, 5))
    batch = build_batch(Case("overlapping-rows", rows, num_tokens=21, decode_first=False, **fields), "v3")
    starts = batch.query_start_loc.copy()
    starts[wrong] = start
    claims = np.zeros(21, int)
    for begin, end in itertools.pairwise(starts):
        claims[begin:end] += 1
    assert (claims > 1).any()
    return dataclasses.replace(batch, query_start_loc=starts), claims < 2


WRONG_STARTS = [(2, 14), (2, 21), (4, 3), (4, 0)]


class OneNaN(KernelDriver):
    """For kernels that write with XLA's CPU backend, which has one NaN where float8_e5m2 has several."""

    def pages_of(self, cache: Any) -> np.ndarray:
        return self._with_one_nan(super().pages_of(cache))

    def expected_with_lse(self, batch: Batch, outcome: KernelOutcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        output, pages, lse = super().expected_with_lse(batch, outcome)
        return output, self._with_one_nan(pages), lse

    def _with_one_nan(self, pages: np.ndarray) -> np.ndarray:
        if pages.dtype != ml_dtypes.float8_e5m2:
            return pages
        return np.where(np.isnan(pages.astype(np.float32)), np.array(np.nan, pages.dtype), pages)
