"""The contract of the Triton kernel on the card, compiled: every case and law against the float64 oracle.

    python -m pytest benchmarks/gpu/contract.py -k "Results and v3"

Contexts in these cases end anywhere in a page; rows that are malformed, windows, sinks and 8-bit caches are among them.
Real sizes are in the benchmark, which checks each answer before it times it. With EASYDEL_RAGGED_DRY_RUN=1 a few cases
run on any machine, in Pallas' interpreter.
"""

from __future__ import annotations

import os
from typing import ClassVar

import jax
import pytest

from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, case_named, one_of_each
from easydel_ragged_plugin.testing.kernel_contract import KernelResults

DRY_RUN = os.environ.get("EASYDEL_RAGGED_DRY_RUN") == "1"
IN_DRY_RUN = tuple(map(case_named, ("mixed", "window-7")))
KERNEL = PallasGPU(interpret=DRY_RUN)


@pytest.fixture(autouse=True, scope="session")
def on_a_gpu() -> None:
    if not DRY_RUN and jax.default_backend() != "gpu":
        pytest.exit(f"got JAX's backend {jax.default_backend()!r}, wanted gpu; EASYDEL_RAGGED_DRY_RUN=1 needs none", 2)


class TestResults(KernelResults):
    """Output, pages and logsumexp of one call of every case."""

    kernel: ClassVar = KERNEL
    cases: ClassVar = IN_DRY_RUN if DRY_RUN else CASES


class TestLaws(KernelContract):
    """The whole contract, malformed rows and laws included, on a case of each kind."""

    kernel: ClassVar = KERNEL
    cases: ClassVar = IN_DRY_RUN if DRY_RUN else one_of_each(CASES)
    known_failures: ClassVar = (
        {"test_inside_of_shard_map": "loops of Pallas' interpreter carry no varying axes"} if DRY_RUN else {}
    )
