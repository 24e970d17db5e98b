"""The portable kernel, held to the contract of kernels."""

from __future__ import annotations

from typing import ClassVar

import pytest

from easydel_ragged_plugin.kernels.xla import KERNEL
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, one_of_each
from easydel_ragged_plugin.testing.kernel_contract import KernelResults


@pytest.mark.once
class TestXla(KernelContract):
    kernel: ClassVar = KERNEL
    cases: ClassVar = one_of_each(CASES)


@pytest.mark.host
class TestXlaOfHost(KernelResults):
    """With the JAX of each EasyDeL."""

    kernel: ClassVar = KERNEL
    cases: ClassVar = one_of_each(CASES)


@pytest.mark.once
class TestXlaInEveryCase(KernelResults):
    kernel: ClassVar = KERNEL
    cases: ClassVar = tuple(case for case in CASES if case not in one_of_each(CASES))
