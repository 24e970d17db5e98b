"""Names that the tests take from JAX's private modules, because JAX has no public ones: here and nowhere else.

JAX may move or change them in any release. Each comment says what fails then. The package itself uses none.
"""

from __future__ import annotations

# MLIR's Python bindings, to parse a Triton program that a call carries as bytes. Without them the tests of
# test_gpu_lowering.py that look into a program fail.
from jax._src.lib.mlir import ir

# A device that is described and not there, for lowering without hardware. Without it nothing lowers for a TPU
# (test_tpu_lowering.py), nor for a GPU from JAX 0.11 on (test_gpu_lowering.py).
from jax._src.mesh import AbstractDevice

# An MLIR context that has Triton's dialect. Without it, as without the bindings.
from jax._src.pallas.triton.lowering import _new_ir_context

__all__ = ["AbstractDevice", "_new_ir_context", "ir"]
