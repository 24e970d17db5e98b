"""What is reported: the driver, and the lines on the terminal."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from .table import MOST_WIDER, WIDER


def driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none: the device's name says what there is."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.split("\n")[0].strip()


def show(result: dict[str, Any], dry: bool) -> None:
    figures = ""
    if not dry:
        wider, ratio = "", result["wider_table"]
        if ratio is not None:
            verdict = "" if ratio <= MOST_WIDER else f" MISSED {MOST_WIDER}"
            wider = f"; table {WIDER} times as wide: {ratio:.2f} of the time{verdict}"
        figures = f": floor {result['limit_us']:.1f} us, wanted {result['target']}{wider}"
    print(f"{result['case']} ({result['geometry']}){figures}")
    own = {each["version"]: each["us"] for each in result["timings"] if each["kernel"] == result["kernel"]}
    for each in result["timings"]:
        verdict = {None: "", True: "  reached", False: "  MISSED"}[each["met"]]
        if not dry and each["kernel"] != result["kernel"] and each["version"] in own:
            verdict = f"  {each['us'] / own[each['version']]:.2f} times {result['kernel']}"
        times = "" if dry else f"{each['us']:10.1f} us {100 * each['share']:5.0f} %"
        print(f"  {each['kernel'] + ' ' + each['version']:24}{times}  error {each['error']:.1e}{verdict}")
    for note in result["notes"]:
        print(f"  - {note}")
    sys.stdout.flush()
