"""Comparisons of answers and pages, with messages that show the place."""

from __future__ import annotations

import numpy as np
import pytest

from .batches import Case
from .tolerances import tolerance_for

__all__ = ["assert_close", "assert_lse_close", "slot_bytes"]


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


def assert_lse_close(actual: np.ndarray, expected: np.ndarray, case: Case) -> None:
    """Fail unless ``actual`` ``[tokens, q_heads]`` is -inf where ``expected`` is, and near it elsewhere.

    An error of the logits is one of their logsumexp, so the bound is that of the output with the size of the logits in
    place of the values'.
    """
    nothing = np.isneginf(expected)
    wrong = np.unique(np.argwhere(np.isneginf(actual) != nothing)[:, 0])
    assert not wrong.size, f"logsumexp: -inf in the wrong places, tokens {wrong.tolist()}"
    bound = tolerance_for(case)
    seen = ~nothing
    error = np.abs(actual[seen].astype(np.float64) - expected[seen])
    excess = error - (bound.atol + bound.rtol * np.abs(expected[seen]))
    assert not (excess > 0).any(), f"logsumexp: largest error {error.max():.3g} ({bound.reason})"
