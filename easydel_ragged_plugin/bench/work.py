"""How much work a case is: the least that any kernel must read, write and compute."""

from __future__ import annotations

import dataclasses

import numpy as np

from easydel_ragged_plugin.testing.batches import Case

__all__ = ["Work", "work"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must at least move and compute.

    Attributes:
        cache_bytes: keys and values that the masks need, each once.
        token_bytes: queries read and outputs written.
        flops: floating-point operations of the two products, over the pairs of query and key that the masks leave.
    """

    cache_bytes: int
    token_bytes: int
    flops: float

    @property
    def moved_bytes(self) -> int:
        """All bytes."""
        return self.cache_bytes + self.token_bytes

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The least time at these rates: moving and computing overlap."""
        return max(self.moved_bytes / bytes_per_s, self.flops / flops_per_s)


def work(case: Case) -> Work:
    """Count the work of ``case``. Padding tokens and dead rows are none."""
    keys = pairs = tokens = 0
    for row in case.rows:
        if not row.new:
            continue
        cached = row.context - row.new
        window = case.window or row.context
        keys += min(row.context, row.new - 1 + window)
        pairs += int(np.minimum(np.arange(cached + 1, row.context + 1, dtype=np.int64), window).sum())
        tokens += row.new
    keys -= case.shared_pages * case.page_size * max(0, len(case.rows) - 1)
    return Work(
        cache_bytes=2 * keys * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize,
        token_bytes=2 * tokens * case.q_heads * case.head_dim * case.np_dtype.itemsize,
        flops=4.0 * pairs * case.q_heads * case.head_dim,
    )
