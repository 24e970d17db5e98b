"""What workloads are made of, and what is reported of any of them."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from easydel_ragged_plugin import workers
from easydel_ragged_plugin.bench.cases import workload
from easydel_ragged_plugin.testing.batches import Case, Row
from easydel_ragged_plugin.types import Kernel

from .contestants import Contestant
from .limits import Limits

K = 1024


def decodes(count: int, context: int) -> tuple[Row, ...]:
    """``count`` rows with one new token each."""
    return (Row(context, 1),) * count


def heads(q_heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """The fields of a geometry."""
    return {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}


GQA = heads(32, 8, 128)
OSS: dict[str, Any] = {**heads(64, 8, 64), "sinks": "heads"}


def shortened(case: Case) -> Case:
    """A workload of the same kind that an interpreter can do: tens of tokens, and a row or two of each kind."""
    rows = [Row(max(2, row.context // 256), max(1, row.new // 256)) for row in case.rows]
    rows = rows[:1] + (rows[-1:] if len(rows) > 1 else [])
    lanes = heads(min(case.q_heads, 4), min(case.kv_heads, 2), min(case.head_dim, 128))
    options = dataclasses.replace(case.options, sliding_window=None if case.window is None else 20)
    kept: dict[str, Any] = {"sinks": case.sinks, "cache_dtype": case.cache_dtype}
    return workload(case.name, tuple(rows), **lanes, page_size=16, options=options, **kept)


def geometry(case: Case) -> str:
    """Heads and pages, as a report has them."""
    return f"{case.q_heads}/{case.kv_heads}/{case.head_dim}, pages of {case.page_size}"


def machine(kernel: Kernel, driver: str | None = None) -> dict[str, Any]:
    """Device, driver, versions and date, and what ``kernel`` says of itself."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": driver,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version for name, version in workers.versions().items() if version is not None},
        "kernel": kernel.facts(),
    }


def ratio(results: Sequence[dict[str, Any]], other: Contestant, ours: str) -> float | None:
    """Median of (the other's time / that of the kernel ``ours``), over the workloads where both are right."""
    found = []
    for each in results:
        us = {(t["kernel"], t["version"]): t["us"] for t in each["timings"]}
        if (other.name, other.version) in us and (ours, other.version) in us:
            found.append(us[other.name, other.version] / us[ours, other.version])
    return statistics.median(found) if found else None


def draw(
    results: Sequence[dict[str, Any]],
    contestants: Sequence[Contestant],
    facts: dict[str, Any],
    found: Limits,
    dry: bool,
    file: Path,
) -> None:
    """The picture: for each workload, the share of the limit that each contestant reaches."""
    from easydel_ragged_plugin.bench import figure

    versions = " · ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = f"{found.copy_bytes_per_s / 1e9:.0f} GB/s, bfloat16 {found.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    subtitle = f"{facts['device']}{driver}: copies {rates}\n{versions} · {facts['date']}"
    if dry:
        subtitle = "DRY RUN in an interpreter: these bars mean nothing\n" + versions
    shown = [
        {
            **each,
            "version": "v2 and v3",
            "timings": [{**t, "kernel": f"{t['kernel']} {t['version']}"} for t in each["timings"]],
        }
        for each in results
    ]
    about = {
        "results": shown,
        "subtitle": subtitle,
        "limit_names": {"read": "copy", "gemm": "matmul"},
        "kernels": {f"{each.name} {each.version}": {"label": each.label, "color": each.color} for each in contestants},
        "dry_run": dry,
    }
    figure.draw(about, file)
