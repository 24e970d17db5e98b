"""The portable kernel, held to the contract of kernels."""

from __future__ import annotations

from typing import ClassVar

from easydel_ragged_plugin.kernels.xla import KERNEL
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, one_of_each
from easydel_ragged_plugin.testing.kernel_contract import KernelTests
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver


class TestXla(KernelContract):
    kernel: ClassVar = KERNEL
    cases: ClassVar = one_of_each(CASES)


class TestXlaInEveryCase(KernelTests):
    kernel: ClassVar = KERNEL
    cases: ClassVar = tuple(case for case in CASES if case not in one_of_each(CASES))


class ToldThatItIsATPU(KernelDriver):
    platform = "tpu"


class TestXlaAsOnTPU(KernelContract):
    """What it does with pages on a TPU, with numbers of a CPU."""

    kernel: ClassVar = KERNEL
    driver_class: ClassVar = ToldThatItIsATPU
    cases: ClassVar = one_of_each(CASES)
