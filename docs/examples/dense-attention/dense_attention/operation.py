"""The operation ``page_attention`` for EasyDeL. Importing this module imports EasyDeL's operations."""

from __future__ import annotations

from typing import Any

from easydel_ragged_plugin import RaggedPageAttnV2, override_config

from .kernel import KERNEL

__all__ = ["DenseAttention"]


class DenseAttention(RaggedPageAttnV2):
    """Ragged page attention v2 on the kernel ``dense``, which runs or raises.

    Cache view, metadata, checks of arguments and sharding are those of the class that it is derived from.
    """

    @classmethod
    def get_impl_name(cls) -> str:
        """The registered name; the entry point has the same one."""
        return "page_attention"

    def forward_native(self, **arguments: Any) -> Any:
        """What EasyDeL calls on CPU, and wherever the platform's own method is missing."""
        with override_config(kernel=KERNEL.name):
            return super().forward_native(**arguments)

    # Each platform's method of the base class would choose among all kernels.
    forward_cpu = forward_gpu = forward_cuda = forward_rocm = forward_tpu = forward_tt = forward_native
