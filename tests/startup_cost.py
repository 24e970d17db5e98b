"""Measures what the start-up line costs: ``python tests/startup_cost.py [RUNS]`` in an environment with the package.

Two commands take turns, so that a busy machine slows both: ``python -c pass`` with the start-up files in place and
the same with them moved away. Printed are the medians, and the median of the paired differences.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path


def start_ms() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1e3


def main(runs: int = 41) -> None:
    pth = Path(sysconfig.get_path("purelib"), "easydel_ragged_plugin.pth")
    away = pth.with_suffix(".away")
    pairs: list[tuple[float, float]] = []
    for turn in range(runs + 2):
        order = (True, False) if turn % 2 else (False, True)
        taken: dict[bool, float] = {}
        for with_line in order:
            if with_line:
                taken[True] = start_ms()
            else:
                pth.rename(away)
                try:
                    taken[False] = start_ms()
                finally:
                    away.rename(pth)
        if turn >= 2:  # the first turns fill caches
            pairs.append((taken[True], taken[False]))
    with_ms, without_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    difference_ms = statistics.median(one - other for one, other in pairs)
    print(f"{runs} pairs: with {with_ms:.2f} ms, without {without_ms:.2f} ms, median difference {difference_ms:.2f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
