"""PyTorch, where it is installed: tensors of a problem's arrays, and as many threads as a kernel has processors."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from easydel_ragged_plugin import workers
from easydel_ragged_plugin.system import processors

__all__ = ["facts_of", "missing_torch", "tensor", "torch_of_bench"]


def missing_torch() -> str | None:
    """What to install, where PyTorch is not; or None. It is not imported."""
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch, which this environment lacks. Run: pip install torch"
    return None


def facts_of(reason: str | None, *distributions: str) -> dict[str, Any]:
    """What a report holds of a peer.

    Args:
        reason: why it is not available, or None.
        distributions: which may have installed it; the first that is there tells the version.
    """
    versions = workers.versions(distributions).values()
    facts: dict[str, Any] = {"available": reason is None, "reason": reason}
    if reason is None:
        facts |= {"version": next(filter(None, versions), "unknown"), "threads": processors()}
    return facts


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
