"""The TPU kernel's numbers without a TPU, in Pallas' TPU interpret mode: its contract."""

from __future__ import annotations

from typing import Any, ClassVar

from jax_private import teach_interpreter_reshaped_refs
from kernel_calls import QUICK_TO_COMPILE

from easydel_ragged_plugin.kernels.pallas_tpu import PallasTPU
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, one_of_each
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
