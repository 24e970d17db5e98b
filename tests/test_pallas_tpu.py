"""The TPU kernel's numbers without a TPU, in Pallas' TPU interpret mode: its contract."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
from jax_private import teach_interpreter_reshaped_refs
from kernel_calls import QUICK_TO_COMPILE

from easydel_ragged_plugin.kernels.pallas_tpu import PallasTPU
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, build_batch, case_named, one_of_each
from easydel_ragged_plugin.testing.compare import assert_close
from easydel_ragged_plugin.testing.kernel_contract import KernelTests
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver

teach_interpreter_reshaped_refs()

INTERPRETED: Any = PallasTPU(interpret=True)


class TestPallasTPU(KernelContract):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = one_of_each(CASES)


class TestPallasTPUInEveryCase(KernelTests):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = tuple(case for case in CASES if case not in one_of_each(CASES))


class TestPallasTPUV2(TestPallasTPU):
    """Of v2's pages the kernel reads those whose heads fill registers."""

    versions: ClassVar = ("v2",)
    cases: ClassVar = tuple(
        dataclasses.replace(case, head_dim=128) for case in one_of_each(CASES) if "v2" in case.versions
    )
    law_case: ClassVar = dataclasses.replace(case_named("mixed"), head_dim=128)


@pytest.mark.parametrize("number", [np.inf, np.nan])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_what_is_not_finite_stays_in_its_kv_head(case: str, what: str, number: float) -> None:
    """Decode multiplies the queries of two kv heads by the keys of both."""
    driver = KernelDriver(INTERPRETED, "v3", compiler_options=QUICK_TO_COMPILE)
    batch = build_batch(case_named(case), "v3")
    array = getattr(batch, what).copy()
    array[0, 1, 3] = number  # of a row with one new token
    batch = dataclasses.replace(batch, **{what: array})
    outcome = driver.call(batch)
    expected, _ = driver.expected(batch, outcome)
    np.testing.assert_array_equal(np.isfinite(outcome.output), np.isfinite(expected))
    assert np.isfinite(expected[0]).any()
    finite = np.isfinite(expected)
    assert_close(np.where(finite, outcome.output, 0), np.where(finite, expected, 0), batch.case)
