"""The portable kernel, held to the contract of kernels."""

from __future__ import annotations

from typing import ClassVar

import pytest
from kernel_calls import FEW, IN_BRIEF, THE_REST, OneNaN

from easydel_ragged_plugin.kernels.xla import KERNEL
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import case_named
from easydel_ragged_plugin.testing.kernel_contract import KernelResults


@pytest.mark.once
class TestXla(KernelContract):
    kernel: ClassVar = KERNEL
    cases: ClassVar = FEW


@pytest.mark.once
class TestXlaInBrief(KernelResults):
    kernel: ClassVar = KERNEL
    cases: ClassVar = IN_BRIEF


@pytest.mark.once
class TestXlaInEveryCase(KernelResults):
    kernel: ClassVar = KERNEL
    cases: ClassVar = THE_REST


class ToldThatItIsATPU(OneNaN):
    platform = "tpu"


class TestXlaAsOnTPU(KernelResults):
    """There it reads and writes the pages in their own shape. The numbers are a CPU's."""

    kernel: ClassVar = KERNEL
    driver_class: ClassVar = ToldThatItIsATPU
    cases: ClassVar = tuple(
        case_named(name)
        for name in (
            "mixed",
            "all-options",
            "bfloat16-head-dim-64",
            "float8-e5m2",
            "gqa-9-3-head-dim-64",
            "mqa",
            "pages-as-they-are",
            "repeated-page",
            "stale-table",
        )
    )
