"""The TPU kernel's numbers without a TPU, in Pallas' TPU interpret mode: its contract."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jax_private import teach_interpreter_reshaped_refs
from kernel_calls import QUICK_TO_COMPILE

from easydel_ragged_plugin.kernels.pallas_tpu import PallasTPU
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, case_named, one_of_each
from easydel_ragged_plugin.testing.kernel_contract import KernelTests

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
