"""Numbers at the ends of what float32 holds, in the kernels that compute on a CPU; what they are refused for is in
test_options.py and test_api.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from kernel_calls import QUICK_TO_COMPILE
from native_library import LEVELS
from turboquant_oracle import TurboQuantDriver

from easydel_ragged_plugin.kernels import cpu_native, turboquant, xla
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.batches import Batch, Case, build_batch
from easydel_ragged_plugin.testing.cases import case_named
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver

KERNELS = [
    "xla",
    *(f"cpu_native {level}" for level in LEVELS),
    pytest.param("pallas_gpu", marks=pytest.mark.once),  # in an interpreter
    "turboquant",
    *(f"codes {level}" for level in LEVELS),
]
LARGEST = float(np.finfo(np.float32).max)
SMALL = dataclasses.replace(case_named("mixed"), name="numbers")


@functools.cache
def driver_of(name: str) -> KernelDriver:
    if name in ("turboquant", "codes"):
        return TurboQuantDriver({"turboquant": turboquant.KERNEL, "codes": cpu_native.KERNEL}[name], "v2")
    if name == "pallas_gpu":
        return KernelDriver(PallasGPU(interpret=True), "v2", compiler_options=QUICK_TO_COMPILE)
    return KernelDriver({"xla": xla.KERNEL, "cpu_native": cpu_native.KERNEL}[name], "v2")


@pytest.fixture(params=KERNELS)
def driver(request: pytest.FixtureRequest) -> Iterator[KernelDriver]:
    name, _, level = request.param.partition(" ")
    if level:
        cpu_native.set_isa(level)
    yield driver_of(name)
    if level:
        cpu_native.set_isa(None)


def assert_right(driver: KernelDriver, batch: Batch, size: float = 1.0) -> None:
    """Output, of values of this size, and logsumexp are the oracle's."""
    missing = driver.missing(batch.case)
    if missing is not None:
        pytest.skip(missing)
    outcome = driver.call(batch, return_lse=True)
    expected, _, expected_lse = driver.expected_with_lse(batch, outcome)
    assert outcome.lse is not None
    live = batch.live_tokens
    output = outcome.output[live].astype(np.float64) / size
    np.testing.assert_allclose(output, expected[live] / size, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(outcome.lse[live].astype(np.float64), expected_lse[live], rtol=3e-5, atol=3e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "cap 1e36": {"logits_soft_cap": 1e36},
    "largest float32 as a cap": {"logits_soft_cap": LARGEST},
    "largest float64 as a cap": {"logits_soft_cap": 1.7e308},
    "least cap that caps nothing": {"logits_soft_cap": 2.0**60},
    "cap below it": {"logits_soft_cap": 2.0**59},
    "tiny cap": {"logits_soft_cap": 1e-30},
    "least cap": {"logits_soft_cap": 2.0**-126},
    "large scale": {"softmax_scale": 1e30},
    "large negative scale": {"softmax_scale": -1e36},
    "no scale": {"softmax_scale": 0.0},
    "least scale": {"softmax_scale": 2.0**-126},
    "large scale over tiny cap": {"softmax_scale": 1e20, "logits_soft_cap": 1e-30},
    "scales that cancel": {"softmax_scale": 2e-31, "k_scale": 1e30},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], driver: KernelDriver) -> None:
    assert_right(driver, build_batch(SMALL.with_options(**options), "v2"))


@pytest.mark.parametrize("v_scale", [1e30, 2.0**124, 2.0**-100])
def test_v_scale(v_scale: float, driver: KernelDriver) -> None:
    assert_right(driver, build_batch(SMALL.with_options(v_scale=v_scale), "v2"), v_scale)


def test_a_scale_that_is_small_beside_the_cap(driver: KernelDriver) -> None:
    """Their quotient is no float32, and the products are so large that it matters."""
    case = dataclasses.replace(SMALL, query_gain=1e30).with_options(softmax_scale=2e-31, logits_soft_cap=1e17)
    if isinstance(driver, TurboQuantDriver):
        pytest.skip("its products are sums of two terms that cancel in part: not to be compared at this size")
    assert_right(driver, build_batch(case, "v2"))


SINKS = {
    "none": np.full(4, -np.inf, np.float32),
    "float32": np.array([LARGEST, -LARGEST, -np.inf, 0.5], np.float32),
    "infinite": np.array([np.inf, 1.0, -np.inf, 0.5], np.float32),
    "past 1 / log2(e)": np.array([LARGEST * 0.7, 2e38, 3e38, -3e38], np.float32),
    "float64": np.array([1e39, -1e39, 1e300, 0.5]),
    "groups": np.array([[np.inf, 0.0], [-np.inf, -np.inf]], np.float32),
    "large groups": np.array([[LARGEST, LARGEST], [0.5, -LARGEST]], np.float32),
}


@pytest.mark.parametrize("sinks", SINKS.values(), ids=SINKS)
def test_sinks(sinks: np.ndarray, driver: KernelDriver) -> None:
    case: Case = dataclasses.replace(SMALL, sinks="heads" if sinks.ndim == 1 else "groups")
    with np.errstate(over="ignore"):  # where the driver makes a float32 array of float64
        assert_right(driver, dataclasses.replace(build_batch(case, "v2"), sinks=sinks))


def test_sinks_past_float32_of_float64_queries() -> None:
    """float64 is computed in float64; sinks end where those of the other kernels do."""
    with jax.enable_x64(True):
        case = dataclasses.replace(SMALL, sinks="heads")
        batch = dataclasses.replace(build_batch(case, "v2"), sinks=SINKS["float64"])
        batch = dataclasses.replace(batch, queries=batch.queries.astype(np.float64))
        assert_right(KernelDriver(xla.KERNEL, "v2"), batch)


def test_a_cap_that_caps_nothing_is_none() -> None:
    assert Options(logits_soft_cap=2.0**60).soft_cap is None
    assert Options(logits_soft_cap=2.0**59).soft_cap == 2.0**59
