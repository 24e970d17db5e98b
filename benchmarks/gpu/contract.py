"""The contract of the GPU kernels on the card, compiled: every case and law against the float64 oracle.

    python -m pytest benchmarks/gpu/contract.py -k "TestResults and v3"

Contexts in these cases end anywhere in a page; rows that are malformed, windows, sinks and 8-bit caches are among them.
Real sizes are in the benchmark, which checks each answer before it times it. With EASYDEL_RAGGED_DRY_RUN=1 a few cases
run on any machine, in JAX's interpreters.

What is called Mosaic is about the kernel for Hopper, for which rows with one new token are long, too. Where that kernel
can't run, pytest says why and ends with exit code 77.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

import jax
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from mosaic_cases import EVERY_CASE, EVERY_ROW, INTERPRETED, KNOWN_FAILURES, in_its_shape, not_interpreted

from benchmarks.processes import NOT_HERE
from easydel_ragged_plugin.kernels import pallas_mosaic_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, case_named, one_of_each
from easydel_ragged_plugin.testing.kernel_contract import KernelResults

DRY_RUN = os.environ.get("EASYDEL_RAGGED_DRY_RUN") == "1"
IN_DRY_RUN = tuple(map(case_named, ("mixed", "window-7")))
KERNEL = PallasGPU(interpret=DRY_RUN)
MOSAIC = INTERPRETED if DRY_RUN else pallas_mosaic_gpu.KERNEL


@pytest.fixture(autouse=True, scope="session")
def on_a_gpu() -> None:
    if not DRY_RUN and jax.default_backend() != "gpu":
        pytest.exit(f"got JAX's backend {jax.default_backend()!r}, wanted gpu; EASYDEL_RAGGED_DRY_RUN=1 needs none", 2)


@pytest.fixture(scope="session")
def on_hopper(on_a_gpu: None) -> None:
    reason = not_interpreted() if DRY_RUN else MOSAIC.facts()["reason"]
    if reason is not None:
        pytest.exit(f"{MOSAIC.name}: {reason}", NOT_HERE)


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


@pytest.mark.usefixtures("on_hopper")
class TestMosaicResults(KernelResults):
    """As ``TestResults``, in shapes that the Mosaic kernel takes, and with contexts of several blocks of keys."""

    kernel: ClassVar = MOSAIC
    config: ClassVar = EVERY_ROW
    cases: ClassVar = in_its_shape(IN_DRY_RUN) if DRY_RUN else EVERY_CASE


@pytest.mark.usefixtures("on_hopper")
class TestMosaicLaws(KernelContract):
    """As ``TestLaws``."""

    kernel: ClassVar = MOSAIC
    config: ClassVar = EVERY_ROW
    law_case: ClassVar = in_its_shape([case_named("mixed")])[0]
    cases: ClassVar = in_its_shape(IN_DRY_RUN[:1] if DRY_RUN else one_of_each(CASES))
    known_failures: ClassVar = KNOWN_FAILURES if DRY_RUN else {}
