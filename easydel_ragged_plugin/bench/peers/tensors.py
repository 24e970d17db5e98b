"""PyTorch, where it is installed: tensors of a problem's arrays, and as many threads as a kernel has processors."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

import numpy as np

from easydel_ragged_plugin.bench.machine import processors

__all__ = ["missing_torch", "tensor", "torch_of_bench", "version_of"]


def missing_torch() -> str | None:
    """What to install, where PyTorch is not; or None. It is not imported."""
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch, which this environment lacks. Run: pip install torch"
    return None


def version_of(*distributions: str) -> str | None:
    """The version of the first of ``distributions`` that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def torch_of_bench() -> Any:
    """PyTorch, with a thread for each processor that this process may use."""
    import torch

    torch.set_num_threads(processors())
    return torch


def tensor(array: Any) -> Any:
    """A tensor with a copy of ``array`` (NumPy's or JAX's), of its dtype."""
    import torch

    copied = np.array(array, order="C")
    if copied.dtype.name == "bfloat16":  # NumPy's own dtypes have none
        return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copied)
