"""Whether the native library is here, and what it offers on this machine."""

from __future__ import annotations

import pytest

from easydel_ragged_plugin.kernels import cpu_native

UNAVAILABLE = cpu_native.availability()
LEVELS = () if UNAVAILABLE else cpu_native.isa_levels()

needs_library = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no native kernel here: {UNAVAILABLE}")
