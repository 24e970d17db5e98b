"""The workloads, and who is measured on them."""

from __future__ import annotations

import dataclasses

from benchmarks.contestants import Contestant, of_kernel
from benchmarks.workloads import GQA, OSS, K, decodes, heads
from easydel_ragged_plugin.bench.cases import workload
from easydel_ragged_plugin.kernels import ejkernel, pallas_tpu, xla
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.batches import Case, Row, Version


@dataclasses.dataclass(frozen=True)
class Entry:
    """A workload, and the versions of the operation that it is measured with."""

    case: Case
    versions: tuple[Version, ...] = ("v3",)


BOTH: tuple[Version, ...] = ("v3", "v2")
WINDOW = Options(sliding_window=128)
FP8 = {"cache_dtype": "float8_e4m3fn"}
MIXED = (*decodes(63, 4 * K), Row(5 * K, K))
TABLE = (
    Entry(workload("decode-64x2k", decodes(64, 2 * K), **GQA), BOTH),
    Entry(workload("decode-1x8k", decodes(1, 8 * K), **GQA)),
    Entry(workload("decode-8x8k", decodes(8, 8 * K), **GQA)),
    Entry(workload("decode-8x8k-page-16", decodes(8, 8 * K), page_size=16, **GQA)),
    Entry(workload("decode-64x2k-fp8", decodes(64, 2 * K), **GQA, **FP8)),
    Entry(workload("decode-32x4k-d256", decodes(32, 4 * K), **heads(8, 4, 256))),
    Entry(workload("decode-64x8k-sinks", decodes(64, 8 * K), **OSS)),
    Entry(workload("decode-64x8k-sinks-window", decodes(64, 8 * K), options=WINDOW, **OSS)),
    Entry(workload("prefill-1x4k", (Row(4 * K, 4 * K),), **GQA), BOTH),
    Entry(workload("prefill-1x4k-sinks-window", (Row(4 * K, 4 * K),), options=WINDOW, **OSS)),
    Entry(workload("mixed-63x4k-and-1k", MIXED, **GQA), BOTH),
)

OURS = pallas_tpu.KERNEL.name
"""Whose answers have to be right, where it does not refuse."""

EASYDEL = ejkernel.KERNEL.name
OWN, PORTABLE, HOSTS = (
    of_kernel(pallas_tpu.KERNEL, interpreted=pallas_tpu.PallasTPU(interpret=True)),
    of_kernel(xla.KERNEL),
    of_kernel(ejkernel.KERNEL),
)
CONTESTANTS = (
    Contestant(OURS, "v3", "this package, v3", "#7c3aed", OWN),
    Contestant(OURS, "v2", "this package, v2", "#b197f0", OWN),
    Contestant(xla.KERNEL.name, "v3", "this package, XLA, v3", "#3aa99f", PORTABLE),
    Contestant(xla.KERNEL.name, "v2", "this package, XLA, v2", "#b5ded9", PORTABLE),
    Contestant(EASYDEL, "v3", "EasyDeL, v3", "#c9742b", HOSTS),
    Contestant(EASYDEL, "v2", "EasyDeL, v2", "#f0d2b4", HOSTS),
)
