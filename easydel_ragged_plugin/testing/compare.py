"""Comparisons of answers and pages, with messages that show the place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from .batches import Case
from .tolerances import tolerance_for

__all__ = ["assert_close", "assert_lse_close", "assert_same_pages", "slot_bytes"]


def slot_bytes(pages: np.ndarray) -> np.ndarray:
    """``[pages, page_size, bytes of a slot]``: to compare bit by bit, NaN included."""
    return np.ascontiguousarray(pages).view(np.uint8).reshape(*pages.shape[:2], -1)


def assert_same_pages(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail, with the first places, unless both hold the same bytes."""
    wrong = (slot_bytes(actual) != slot_bytes(expected)).any(axis=-1)
    assert not wrong.any(), f"other bytes than wanted in (page, slot): {np.argwhere(wrong)[:8].tolist()}"


def assert_close(actual: np.ndarray, expected: np.ndarray, case: Case, what: str = "output") -> None:
    """Fail, with the worst place and the bound's reason, unless ``actual`` lies within the case's tolerance."""
    assert actual.shape == expected.shape, f"{what}: got shape {actual.shape}, wanted {expected.shape}"
    bound = tolerance_for(case)
    actual = actual.astype(np.float64)
    assert not np.isnan(actual).any(), f"{what}: NaN in tokens {np.unique(np.argwhere(np.isnan(actual))[:, 0])}"
    error = np.abs(actual - expected)
    excess = error - (bound.atol + bound.rtol * np.abs(expected))
    if excess.size and excess.max() > 0:
        worst = np.unravel_index(excess.argmax(), excess.shape)
        place = ", ".join(f"{axis} {at}" for axis, at in zip(("token", "head", "lane"), worst, strict=False))
        wrong = np.unique(np.argwhere(excess > 0)[:, 0])
        pytest.fail(
            f"{what}: largest error {error.max():.3g} "
            f"(bound atol {bound.atol:.3g}, rtol {bound.rtol:.3g}: {bound.reason}); "
            f"at {place} got {actual[worst]:.6g}, wanted {expected[worst]:.6g}; wrong tokens {wrong.tolist()}",
            pytrace=False,
        )


def assert_lse_close(actual: np.ndarray, expected: np.ndarray, case: Case) -> None:
    """Fail unless ``actual`` ``[tokens, q_heads]`` is -inf where ``expected`` is, and near it elsewhere.

    An error of the logits is one of their logsumexp, so the bound is that of an output of values of size 1.
    """
    case = dataclasses.replace(case, value_mean=0.0)
    assert actual.shape == expected.shape, f"logsumexp: got shape {actual.shape}, wanted {expected.shape}"
    nothing = np.isneginf(expected)
    wrong = np.unique(np.argwhere(np.isneginf(actual) != nothing)[:, 0])
    assert not wrong.size, f"logsumexp: -inf in the wrong places, tokens {wrong.tolist()}"
    assert_close(np.where(nothing, 0.0, actual), np.where(nothing, 0.0, expected), case, "logsumexp")
