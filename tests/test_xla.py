"""The portable kernel, held to the contract of kernels."""

from __future__ import annotations

from typing import ClassVar

from kernel_calls import QUICK_TO_COMPILE

from easydel_ragged_plugin.kernels.xla import KERNEL
from easydel_ragged_plugin.testing import KernelContract


class TestXla(KernelContract):
    kernel: ClassVar = KERNEL
    compiler_options: ClassVar = QUICK_TO_COMPILE  # the operations' contract compiles with XLA's defaults
