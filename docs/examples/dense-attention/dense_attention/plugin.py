"""The hooks of this package: the entry point ``dense`` of the group ``easydel_ragged_plugin.hooks``."""

from __future__ import annotations

from collections.abc import Sequence

from easydel_ragged_plugin import hookimpl
from easydel_ragged_plugin.types import Kernel

from .kernel import KERNEL

__all__ = ["PLUGIN"]


class Plugin:
    """Offers the kernel. What it refuses goes to the kernels after it."""

    @hookimpl
    def ragged_kernels(self) -> Sequence[Kernel]:
        """Kernels to try before those of easydel-ragged-plugin."""
        return [KERNEL]


PLUGIN = Plugin()
