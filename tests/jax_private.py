"""What the tests take from JAX's private modules, because JAX has no public name for it: here and nowhere else.

JAX may move it in any release. Each comment says what fails then. The package itself uses nothing of the kind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# MLIR's Python bindings, to parse a Triton program that a call carries as bytes. Without them the tests of
# test_gpu_lowering.py that look into a program fail.
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]

# A device that is described and not there, for lowering without hardware. Without it nothing lowers for a TPU
# (test_tpu_lowering.py), nor for a GPU from JAX 0.11 on (test_gpu_lowering.py).
from jax._src.mesh import AbstractDevice

# An MLIR context that has Triton's dialect. Without it, as without the bindings.
from jax._src.pallas.triton.lowering import _new_ir_context

__all__ = ["_new_ir_context", "described_device", "ir"]


def described_device(kind: str, num_cores: int, platform: str) -> AbstractDevice:
    """A device for ``AbstractMesh(abstract_device=...)``: ``kind`` as ``jax.Device.device_kind`` would give it."""
    fields: dict[str, Any] = {"device_kind": kind, "num_cores": num_cores, "platform": platform}
    known = {field.name for field in dataclasses.fields(AbstractDevice)}  # JAX 0.9 has no platform
    return AbstractDevice(**{name: value for name, value in fields.items() if name in known})
