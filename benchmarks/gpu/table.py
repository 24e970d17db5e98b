"""The workloads, and what is wanted of this package's kernels on each."""

from __future__ import annotations

import dataclasses

from benchmarks.workloads import GQA, OSS, K, heads
from easydel_ragged_plugin.bench.cases import workload
from easydel_ragged_plugin.kernels import pallas_gpu, pallas_mosaic_gpu
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import Case, Row

OURS = pallas_gpu.KERNEL.name
MOSAIC = pallas_mosaic_gpu.KERNEL.name


@dataclasses.dataclass(frozen=True)
class Entry:
    """A workload and what is wanted of a kernel on it.

    ``share``: of the limit that binds, at least. ``us``: microseconds, at most. ``floors``: multiples of the least
    time of its row kinds one after the other, at most.
    """

    case: Case
    share: float | None = None
    us: float | None = None
    floors: float | None = None
    update_only: bool = False

    def target(self) -> str:
        if self.share is not None:
            return f">= {100 * self.share:.0f} %"
        return f"<= {self.us:.0f} us" if self.us is not None else f"<= {self.floors} floors"

    def met(self, seconds: float, share: float, sum_of_floors: float) -> bool:
        if self.share is not None:
            return share >= self.share
        return 1e6 * seconds <= self.us if self.us is not None else seconds <= (self.floors or 0) * sum_of_floors


def decodes(count: int, context: int) -> tuple[Row, ...]:
    """``count`` rows with one new token each, whose contexts are unequal, up to a quarter below ``context``, and end
    within a page and within a block of keys: 8191, 8154, 8117, ..."""
    return tuple(Row(context - 1 - 37 * row % (context // 4), 1) for row in range(count))


def of_size(case: Case, gib: float) -> Case:
    """The case in a cache of so many GiB, of which its rows own pages all over."""
    page = 2 * case.page_size * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
    return dataclasses.replace(case, num_pages=int(gib * 2**30) // page)


PREFILL = Entry(workload("prefill-8k", (Row(8 * K - 1, 8 * K - 1),), **GQA), share=0.36)
CHUNK = Entry(workload("chunk-2k-on-32k", (Row(34 * K - 37, 2 * K - 1),), **GQA), share=0.36)
MIXED = Entry(workload("mixed-63x4k-and-1k", (*decodes(63, 4 * K), Row(5 * K - 37, K - 1)), **GQA), floors=1.3)
TABLE = (
    Entry(workload("decode-64x2k", decodes(64, 2 * K), **GQA), share=0.80),
    Entry(workload("decode-16x4k-mha", decodes(16, 4 * K), **heads(32, 32, 128)), share=0.80),
    Entry(workload("decode-64x8k-mqa", decodes(64, 8 * K), **heads(8, 1, 128)), share=0.80),
    Entry(workload("decode-32x4k-d256", decodes(32, 4 * K), **heads(8, 4, 256)), share=0.80),
    Entry(workload("decode-1x128k", decodes(1, 128 * K), **GQA), share=0.70),
    Entry(workload("decode-64k-and-31x1k", decodes(1, 64 * K) + decodes(31, K), **GQA), share=0.70),
    Entry(workload("decode-1x8k", decodes(1, 8 * K), **GQA), us=20),
    Entry(workload("decode-64x8k-sinks", decodes(64, 8 * K), **OSS), share=0.75),
    Entry(workload("decode-64x8k-sinks-window", decodes(64, 8 * K), options=Options(sliding_window=128), **OSS), us=15),
    Entry(workload("decode-64x2k-float8", decodes(64, 2 * K), cache_dtype="float8_e4m3fn", **GQA), share=0.70),
    Entry(of_size(workload("decode-8x8k-of-4gib", decodes(8, 8 * K), **GQA), 4.25), share=0.75),
    PREFILL,
    CHUNK,
    MIXED,
    Entry(workload("update-8k", (Row(8 * K - 1, 8 * K - 1),), **GQA), floors=2.0, update_only=True),
)
TABLES = {OURS: TABLE, MOSAIC: (*(dataclasses.replace(entry, share=0.60) for entry in (PREFILL, CHUNK)), MIXED)}
"""For each of this package's kernels: for Mosaic those with long rows."""
WIDER = 8
MOST_WIDER = 1.05
"""The same work with a block table ``WIDER`` times as wide may take this much longer."""
