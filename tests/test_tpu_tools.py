"""What measures on a TPU, without one: ``benchmarks/tpu``, its dry run, and the counting of bundles."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

# At the end: the package is the installed one.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmarks.tpu import processes, report, schedules, sizes
from benchmarks.tpu.listing import Figure, Stretch, figures_of_others, figures_of_ours, inner_loops, stretches
from benchmarks.tpu.run import write
from easydel_ragged_plugin.kernels import pallas_tpu

OURS, PORTABLE = "pallas_tpu", "xla"


# Schedules.

PLAIN = " {{ {number} = sadd.s32 1, %s1 }}"
PRODUCT = " {{ {number} = vmatmul.mubr.bf16.gmra.mxu0 %v1  ;;  {number} = vmatpush1.bf16.msra.mxu1 %v2 }}"


def listing(whole: int = 4, careful: bool = True) -> list[str]:
    """A schedule as libtpu writes it: a loop with a block that is whole, parts of masked ones, and careful parts."""
    lines = ["= control target key start", "LB: loop body", "= control target key end", ""]

    def add(count: int, depth: int, text: str, label: str = "") -> None:
        for index in range(count):
            mark = f"{label}:" if label and index == 0 else "  :"
            address = hex(len(lines) - 4) if len(lines) > 4 else "0"
            lines.append(f"{address:>6} {mark} {'>' * depth}" + text.format(number=f"%{len(lines)}"))

    add(3, 0, PLAIN)
    add(2, 1, PLAIN, "LB")  # the loop over steps
    add(2, 0, PLAIN)  # a branch around what follows is listed without the loop's mark
    add(whole, 1, PRODUCT)
    add(1, 1, PLAIN, "PF")
    add(1, 0, PLAIN)
    add(6, 2, PRODUCT, "LB")
    add(5, 1, PLAIN, "PF")
    if careful:
        add(3, 3, PRODUCT, "LB")
    add(2, 1, PLAIN, "PF")
    return lines


CALL = {"phase": "decode", "tokens": 1, "keys": 512, "part": 256}


def test_stretches_end_at_labels_and_where_the_depth_changes() -> None:
    assert stretches(listing())[:6] == [
        Stretch(0, 3, 0),
        Stretch(1, 2, 0),
        Stretch(0, 2, 0),
        Stretch(1, 4, 8),
        Stretch(1, 1, 0),
        Stretch(0, 1, 0),
    ]
    assert inner_loops(listing()) == [Stretch(1, 4, 8), Stretch(2, 6, 12), Stretch(3, 3, 6)]


def test_figures_by_hand() -> None:
    whole, masked = figures_of_ours(CALL, listing())
    assert whole == Figure("decode", "whole", 1, 512, 4)
    assert masked == Figure("decode", "masked", 1, 256, 6)
    assert whole.per_key == 4 / 512
    # 64 query tokens: 128 take two tiles.
    assert Figure("prefill", "whole", 64, 512, 1000).per_key == 2 * 1000 / 512


def test_a_longer_loop_gives_a_larger_figure() -> None:
    (before, masked), (after, same) = (figures_of_ours(CALL, listing(whole)) for whole in (4, 5))
    assert after.per_key == before.per_key + 1 / 512
    assert same == masked


def test_another_number_of_loops_is_an_error() -> None:
    with pytest.raises(ValueError, match="decode: got 2 stretches that multiply, wanted 3"):
        figures_of_ours(CALL, listing(careful=False))
    with pytest.raises(ValueError, match="got 3 stretches that multiply, wanted 1"):
        figures_of_others("RPAd-p_128-bq_1_1-bkv_4096_4096.1-71-final_bundles.txt", listing())


ONE_LOOP = ["  0x7 LB: >>> { %1 = vmatmul.bf16.gmra.mxu0 %v1 }", "  0x8   : >>> { %2 = sadd.s32 1, %s1 }"]


def test_others_name_their_blocks() -> None:
    assert figures_of_others("1-RPAd-p_128-bq_1_1-bkv_4096_2048.1-71-final_bundles.txt", ONE_LOOP) == [
        Figure("decode", "any", 1, 2048, 2)
    ]
    assert figures_of_others("1-RPA-m-blocksizeQ-32-blocksizeKV-8-pageSize-128.1-71-final_bundles.txt", ONE_LOOP) == [
        Figure("prefill", "any", 32, 1024, 2)
    ]
    assert figures_of_others("1-RPA-p-blocksizeQ-32-blocksizeKV-8-pageSize-128.1-71-final_bundles.txt", ONE_LOOP) == []
    assert figures_of_others("1-copy.8-65-final_bundles.txt", ONE_LOOP) == []


def program(kind: str, kernel: str, figures: list[dict[str, Any]], why: str | None = None) -> dict[str, Any]:
    return {"program": f"{kind} {kernel}", "kind": kind, "geometry": "gqa", "kernel": kernel,
            "figures": figures, "why": why}  # fmt: skip


def test_the_table_has_a_row_for_each_block_and_says_what_is_missing() -> None:
    figures = [
        {"phase": "decode", "block": "whole", "tokens": 1, "keys": 512, "bundles": 690},
        {"phase": "prefill", "block": "whole", "tokens": 128, "keys": 512, "bundles": 5398},
    ]
    host = program("v5e", "ejkernel", [], "does not fit")
    text = schedules.table({"versions": {"jax": "1.2"}, "programs": [host, program("v6e", OURS, figures)]})
    assert "| 32/8, d128 | `pallas_tpu`, whole blocks | — | — | 1.35 (512) | — |" in text
    assert "| 32/8, d128 | `pallas_tpu`, whole blocks | — | — | 5,398 / 10.5 (128 x 512) | — |" in text
    assert "- `ejkernel`, 32/8, d128, on v5e: does not fit" in text


def test_text_is_put_between_markers_and_nowhere_else() -> None:
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert schedules.written_into(page, "x", "new") == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n"
    with pytest.raises(ValueError, match="got a page without the lines <!-- y: begin --> and <!-- y: end -->"):
        schedules.written_into(page, "y", "new")


def test_the_page_has_the_block_sizes_of_the_code() -> None:
    page = schedules.PAGE.read_text(encoding="utf-8")
    assert schedules.written_into(page, "sizes", sizes.table()) == page, "python -m benchmarks.tpu schedules --write"


def test_schedules_without_libtpu_say_so(repository: Path) -> None:
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    result = script(repository, "schedules")
    assert result.returncode == 2
    assert "libtpu is not installed. Install it with JAX: pip install 'jax[tpu]'" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_inner_loops_are_as_short_as_they_were() -> None:
    """What the page says of a v6e, with some room: a loop that spills registers is far longer."""
    (compiled,) = schedules.programs(["v6e"], ["gqa"], [OURS], None)
    found = schedules.measured(compiled, 900)
    assert found["why"] is None
    figures = [Figure(**each) for each in found["figures"]]
    per_key = {(each.phase, each.block): each.per_key for each in figures}
    assert set(per_key) == {(phase, block) for phase in ("decode", "prefill") for block in ("whole", "masked")}
    assert 0.5 < per_key["decode", "whole"] < 1.6
    assert 5 < per_key["prefill", "whole"] < 13


# Answers and times.


def script(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "benchmarks" / "tpu"), *arguments]
    # As in `quick_to_compile`: a dry run interprets.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def test_benchmark_without_a_tpu_says_so(repository: Path) -> None:
    result = script(repository)
    assert result.returncode == 2
    assert "This benchmark needs a TPU, and JAX's default backend is 'cpu'" in result.stderr


def test_benchmark_refuses_an_unknown_workload(repository: Path) -> None:
    result = script(repository, "--dry-run", "--case", "decode-1x9k")
    assert result.returncode == 2
    assert "--case: got decode-1x9k, wanted some of decode-64x2k," in result.stderr


@pytest.mark.once
def test_dry_run_of_the_benchmark(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "tpu.json"
    chosen = [part for name in (OURS, PORTABLE) for part in ("--kernel", name)]
    result = script(repository, "--dry-run", "--repeats", "1", "--json", str(file), "--case", "decode-1x8k", *chosen)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "DRY RUN: short contexts, interpreted. Answers are checked; nothing is timed." in result.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["dry_run"] is True
    assert found["limits"] == []
    assert found["machine"]["versions"]["jax"] == jax.__version__
    assert [(each["kernel"], each["version"], each["status"]) for each in found["results"]] == [
        (OURS, "v3", "refused" if pallas_tpu.unavailable() else "right"),
        (PORTABLE, "v3", "right"),
    ]
    assert not any({"us", "samples_us", "first_call_s"} & set(each) for each in found["results"])
    again = script(repository, "report", str(file))
    assert again.stdout == result.stdout


def test_a_process_that_hangs_or_crashes_leaves_a_line() -> None:
    hung = processes.started({"case": None, "dry": True}, 0.05)
    assert (hung["status"], hung["why"]) == ("timed out", "no answer in 0.05 s")
    crashed = processes.started({"case": "decode-1x8k"}, 120)
    assert (crashed["status"], crashed["why"]) == ("failed", "exit code 1: KeyError: 'dry'")


def measured(**of_ours: Any) -> dict[str, Any]:
    """A report as a TPU would give it: 1 TB/s, 100 TFLOP/s, one workload of 2 GB."""
    limits = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14}
    common = {"case": "w", "version": "v3"}
    right = {"status": "right", "why": None, "error": 0.001, "first_call_s": 1.0}
    return {
        "dry_run": False,
        "machine": {"device": "TPU v6 lite", "platform": "tpu", "driver": None, "date": "2030-01-01",
                    "versions": {"jax": "0.9.2"}, "kernel": {}},
        "limits": [limits, limits],
        "workloads": [{"case": "w", "geometry": "32/8/128, pages of 128", "cache": "bfloat16",
                       "moved_bytes": 2 * 10**9, "flops": 1e9}],
        "results": [
            {**common, "kernel": OURS, **right, "us": 2500.0, "samples_us": [2500.0], **of_ours},
            {**common, "kernel": PORTABLE, **right, "us": 5000.0, "samples_us": [5000.0]},
        ],
    }  # fmt: skip


def test_report_by_hand() -> None:
    found = measured()
    text = report.text(found)
    assert (
        "| w (32/8/128, pages of 128, bfloat16), copying: 2000.0 us | pallas_tpu v3 | 2500.0 | 80 % | 1.0e-03 |" in text
    )
    assert "|  | xla v3 | 5000.0 | 40 % | 1.0e-03 |" in text
    assert "xla v3: 2.00 times the time of pallas_tpu, median" in text
    assert report.unmet(found) == []


def test_what_failed_is_reported_and_fails() -> None:
    found = measured(status="timed out", why="no answer in 600 s")
    assert "| pallas_tpu v3 | timed out | | no answer in 600 s |" in report.text(found)
    assert report.unmet(found) == ["w v3: timed out, no answer in 600 s"]
    assert report.unmet(measured(status="refused", why="head_dim 512")) == []


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib in this environment")
def test_figure(tmp_path: Path) -> None:
    report.figure(measured(), tmp_path / "tpu.png")
    assert (tmp_path / "tpu.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="--figure: got the report of a dry run"):
        report.figure({**measured(), "limits": []}, tmp_path / "dry.png")


def test_the_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "tpu.json"
    write({"first": 1}, file)
    write({"second": 2}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"second": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["tpu.json"]
