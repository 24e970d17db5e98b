"""Comparisons of answers and pages, with messages that show the place."""

from __future__ import annotations

import numpy as np
import pytest

from .batches import Case
from .tolerances import tolerance_for

__all__ = ["assert_close", "slot_bytes"]


def slot_bytes(pages: np.ndarray) -> np.ndarray:
    """``[pages, page_size, bytes of a slot]``: to compare bit by bit, NaN included."""
    return np.ascontiguousarray(pages).view(np.uint8).reshape(*pages.shape[:2], -1)


def assert_close(actual: np.ndarray, expected: np.ndarray, case: Case, what: str = "output") -> None:
    """Fail, with the worst place and the bound's reason, unless ``actual`` lies within the case's tolerance."""
    bound = tolerance_for(case)
    actual = actual.astype(np.float64)
    assert not np.isnan(actual).any(), f"{what}: NaN in tokens {np.unique(np.argwhere(np.isnan(actual))[:, 0])}"
    error = np.abs(actual - expected)
    excess = error - (bound.atol + bound.rtol * np.abs(expected))
    if excess.size and excess.max() > 0:
        token, head, lane = np.unravel_index(excess.argmax(), excess.shape)
        wrong = np.unique(np.argwhere(excess > 0)[:, 0])
        pytest.fail(
            f"{what}: largest error {error.max():.3g} "
            f"(bound atol {bound.atol:.3g}, rtol {bound.rtol:.3g}: {bound.reason}); "
            f"at token {token}, head {head}, lane {lane} got {actual[token, head, lane]:.6g}, "
            f"wanted {expected[token, head, lane]:.6g}; wrong tokens {wrong.tolist()}",
            pytrace=False,
        )
