"""The heads, pages and dtypes that ``easydel-ragged tune`` measures with."""

from __future__ import annotations

import dataclasses

from easydel_ragged_plugin.testing.batches import Case, Row

from .cases import workload
from .problem import Problem, build
from .timing import copies_beyond_cache

__all__ = ["Geometry"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is tuned: the parts of a request that decide how a kernel runs."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def workload(self, name: str, rows: tuple[Row, ...]) -> Case:
        """A case of these sizes: see :func:`.cases.workload`."""
        return workload(name, rows, **dataclasses.asdict(self))

    def problem(self, part: str, small: bool) -> Problem:
        """A decode step of 32 requests of 500 to 8000 tokens, or a prompt of 4096. ``small``: for an interpreter."""
        if part == "decode":
            rows = tuple(Row(500 + 242 * index, 1) for index in range(32))
            rows = (Row(40, 1), Row(7, 1)) if small else rows
        else:
            rows = (Row(24, 20),) if small else (Row(4096, 4096),)
        case = self.workload(f"tune-{part}", rows)
        return build(case, "v2", copies=1 if small else copies_beyond_cache(case))
