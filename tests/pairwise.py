"""Few combinations of many."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, among which each value of each axis meets each value of each other axis."""
    choose = random.Random(0)
    positions = list(itertools.combinations(range(len(axes)), 2))
    open_pairs = {(a, x, b, y) for a, b in positions for x in axes[a] for y in axes[b]}
    found = []
    while open_pairs:
        candidates = []
        for a, x, b, y in choose.sample(sorted(open_pairs, key=repr), min(60, len(open_pairs))):
            row = [choose.choice(axis) for axis in axes]
            row[a], row[b] = x, y
            met = {(i, row[i], j, row[j]) for i, j in positions} & open_pairs
            candidates.append((len(met), row, met))
        _, row, met = max(candidates, key=lambda each: each[0])
        open_pairs -= met
        found.append(tuple(row))
    return found
