"""What is reported: the machine, the lines on the terminal, the picture."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rivals import CONTESTANTS, OURS
from table import MOST_WIDER, WIDER

from easydel_ragged_plugin import workers
from easydel_ragged_plugin.kernels import pallas_gpu


def machine() -> dict[str, Any]:
    """Card, driver, versions and date."""
    driver = None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        driver = finished.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        pass  # no NVIDIA driver: the device's name says what there is
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": driver,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version for name, version in workers.versions().items() if version is not None},
        "kernel": pallas_gpu.KERNEL.facts(),
    }


def ratio_to(results: Sequence[dict[str, Any]], kernel: str, version: str) -> float | None:
    """Median of (its time / ours), over the workloads where both are right."""
    found = []
    for each in results:
        us = {(t["kernel"], t["version"]): t["us"] for t in each["timings"]}
        if (kernel, version) in us and (OURS, version) in us:
            found.append(us[kernel, version] / us[OURS, version])
    return statistics.median(found) if found else None


def show(result: dict[str, Any], dry: bool) -> None:
    figures = ""
    if not dry:
        wider, ratio = "", result["wider_table"]
        if ratio is not None:
            verdict = "" if ratio <= MOST_WIDER else f" MISSED {MOST_WIDER}"
            wider = f"; table {WIDER} times as wide: {ratio:.2f} of the time{verdict}"
        figures = f": floor {result['limit_us']:.1f} us, wanted {result['target']}{wider}"
    print(f"{result['case']} ({result['geometry']}){figures}")
    for each in result["timings"]:
        verdict = {None: "", True: "  reached", False: "  MISSED"}[each["met"]]
        times = "" if dry else f"{each['us']:10.1f} us {100 * each['share']:5.0f} %"
        print(f"  {each['kernel'] + ' ' + each['version']:24}{times}  error {each['error']:.1e}{verdict}")
    for note in result["notes"]:
        print(f"  - {note}")
    sys.stdout.flush()


def draw(report: dict[str, Any], file: Path) -> None:
    """The picture: for each workload, the share of the limit that each contestant reaches."""
    from easydel_ragged_plugin.bench import figure

    facts, found = report["machine"], report["limits"][0]
    versions = " · ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = f"{found['copy_bytes_per_s'] / 1e9:.0f} GB/s, bfloat16 {found['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    subtitle = f"{facts['device']}, driver {facts['driver'] or 'unknown'}: copies {rates}\n{versions} · {facts['date']}"
    if report["dry_run"]:
        subtitle = "DRY RUN in an interpreter: these bars mean nothing\n" + versions
    results = [
        {
            **each,
            "version": "v2 and v3",
            "timings": [{**t, "kernel": f"{t['kernel']} {t['version']}"} for t in each["timings"]],
        }
        for each in report["results"]
    ]
    about = {
        "results": results,
        "subtitle": subtitle,
        "limit_names": {"read": "copy", "gemm": "matmul"},
        "kernels": {f"{each.name} {each.version}": {"label": each.label, "color": each.color} for each in CONTESTANTS},
        "dry_run": report["dry_run"],
    }
    figure.draw(about, file)
