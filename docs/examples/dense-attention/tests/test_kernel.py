"""The contract of kernels on ``dense``. It needs no EasyDeL."""

from __future__ import annotations

from dense_attention.kernel import KERNEL

from easydel_ragged_plugin.testing import KernelContract, case_named


class TestDense(KernelContract):
    """Output against a float64 oracle, laws, malformed rows. Without ``cases`` all of them run."""

    kernel = KERNEL
    versions = ("v2",)
    cases = (case_named("mixed"), case_named("window-3"))
