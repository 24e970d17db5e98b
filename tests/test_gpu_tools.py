"""What measures on a GPU, without one: workloads and their checks, ``tune``, and the benchmark's dry run.

No host takes part but in the dry run, so what takes long is run with one JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu import half_hour
from benchmarks.gpu.report import show
from benchmarks.gpu.rivals import CONTESTANTS
from benchmarks.gpu.table import MOSAIC, OURS, TABLE
from benchmarks.processes import NOT_HERE
from easydel_ragged_plugin import RaggedPageConfig, entries
from easydel_ragged_plugin.bench import tune
from easydel_ragged_plugin.bench.cases import workload
from easydel_ragged_plugin.bench.problem import Problem, build, check, few_rows
from easydel_ragged_plugin.bench.timing import seconds_per_call
from easydel_ragged_plugin.bench.work import work
from easydel_ragged_plugin.cli import app
from easydel_ragged_plugin.config import CACHE_VARIABLE
from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles
from easydel_ragged_plugin.kernels.pallas_gpu.tuning import TileTuning
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import PallasMosaicGPU
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import Row
from easydel_ragged_plugin.types import AttentionRequest, Operands

SMALL: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_size": 16}
ROWS = (Row(70, 1), Row(20, 1), Row(50, 9))


def answered(version: Any, **fields: Any) -> tuple[Problem, jax.Array, jax.Array]:
    case = workload("a workload", ROWS, **{**SMALL, **fields})
    problem = build(case, version, copies=2)
    return problem, *answer(problem.request, problem.operands)


# What is tested is who judges the answer, so it need not be fast.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def answer(request: AttentionRequest, operands: Operands) -> tuple[jax.Array, jax.Array]:
    return xla.KERNEL.forward(request, RaggedPageConfig(), operands)[:2]


@pytest.mark.once
@pytest.mark.parametrize(
    "fields",
    [{}, {"options": Options(sliding_window=20), "sinks": "heads"}, {"pages_per_row": 20}, {"dtype": "float32"}],
)
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_right_answer_is_found_right(version: Any, fields: dict[str, Any]) -> None:
    problem, output, pages = answered(version, **fields)
    error, right = check(problem, output, pages, few_rows(problem.case))
    assert right
    assert error < 0.02


@pytest.mark.once
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_wrong_answer_is_found_wrong(version: Any) -> None:
    problem, output, pages = answered(version)
    for wrong in (output * 1.05, jnp.zeros_like(output), jnp.roll(output, 1, axis=1), output.at[-1].set(jnp.nan)):
        assert not check(problem, wrong, pages, few_rows(problem.case))[1]
    # Queries of another block table are right over its pages alone.
    other = problem.operands._replace(block_tables=problem.tables[1])
    elsewhere, _ = answer(problem.request, other)
    assert not check(problem, elsewhere, pages, few_rows(problem.case))[1]


def test_new_keys_that_were_not_written_are_found() -> None:
    problem, output, _ = answered("v3")
    assert not check(problem, output, problem.operands.pages, few_rows(problem.case))[1]


def test_block_tables_share_no_page() -> None:
    problem, _, _ = answered("v2")
    first, second = (set(map(int, table.ravel())) - {0} for table in problem.tables)
    assert len(first) == len(second) == 5 + 2 + 4
    assert not first & second


def test_floor_by_hand() -> None:
    found = work(workload("w", (Row(10, 1), Row(6, 3)), **SMALL))
    # Keys and values of 16 tokens, 2 heads, 64 elements of 2 bytes; queries and outputs of 4 tokens, 4 heads.
    assert found.moved_bytes == 2 * 16 * 2 * 64 * 2 + 2 * 4 * 4 * 64 * 2
    assert found.flops == 4 * (10 + 4 + 5 + 6) * 4 * 64
    window = Options(sliding_window=4)
    windowed = work(workload("w", (Row(10, 1), Row(6, 3)), options=window, **SMALL))
    # The last 4 of 10; of 6, the first of the 3 new ones sees from the second on... 5 of them.
    assert windowed.moved_bytes == 2 * (4 + 6) * 2 * 64 * 2 + 2 * 4 * 4 * 64 * 2
    assert windowed.flops == 4 * (4 + 4 + 4 + 4) * 4 * 64


def test_every_timed_call_runs() -> None:
    """Each of them with its own block table, on the output of the one before it."""
    problem, _, _ = answered("v2")
    seen: list[tuple[int, float]] = []

    def step(operands: Any) -> Any:
        jax.debug.callback(lambda page, first: seen.append((int(page), float(first))), operands.block_tables[0, 0],
                           operands.queries[0, 0, 0])  # fmt: skip
        return operands.queries + 1, operands.pages

    seconds_per_call(problem, step, expected_s=1e-2, repeats=2, least_s=0.06)
    jax.effects_barrier()
    assert len(seen) == 3 * 3 * 2  # warm-up and two repeats, of three trips over two tables
    assert [page for page, _ in seen[:2]] == [int(table[0, 0]) for table in problem.tables]
    assert len({first for _, first in seen[:6]}) == 6


# tune


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_to_compile: None) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def two_candidates(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, AttentionRequest], list[tiles.Tiles]]:
    """Leave two candidates of each part: measuring all takes minutes. Returns what gives all of them."""
    every = TileTuning.candidates
    monkeypatch.setattr(TileTuning, "candidates", lambda *arguments: iter(list(every(*arguments))[:2]))
    tuning = TileTuning(interpreted=PallasGPU(interpret=True), interpret=True)
    return lambda part, request: list(every(tuning, part, request))


TINY = ["--interpret", "--q-heads", "4", "--kv-heads", "2", "--head-dim", "32", "--page-size", "16"]


def test_tune_without_a_gpu_says_so(cache: Path) -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert "There is nothing to tune: JAX's default backend is 'cpu'" in text
    assert "what can be tuned or tried is pallas_gpu on gpu, pallas_mosaic_gpu on gpu." in text
    assert "pip install 'jax[cuda12]'" in text
    assert not cache.exists()


@pytest.mark.once
def test_tune_checks_times_and_writes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One other candidate for each part will do here; its time is made to win.
    every = two_candidates(monkeypatch)
    times = iter([1.0, 0.5, 1.0, 0.985])
    monkeypatch.setattr(tune, "seconds_per_call", lambda *_, **__: (next(times), ()))
    other = {"format": tiles.FORMAT, "entries": {"another card": {"tiles": {}}}}
    cache.mkdir()
    (cache / "pallas_gpu.json").write_text(json.dumps(other), encoding="utf-8")
    result = CliRunner().invoke(app, ["tune", *TINY])
    assert result.exit_code == 0, result.output
    content = json.loads((cache / "pallas_gpu.json").read_text(encoding="utf-8"))
    key = "interpreter head_dim=32 group=2 page_size=16 queries=bfloat16 compute=bfloat16 cache=bfloat16"
    assert set(content["entries"]) == {"another card", key}
    entry = content["entries"][key]
    assert entry["decode"]["us"] == 0.5e6
    assert entry["prefill"]["us"] == 1e6  # 1.5 % faster is not enough to change
    written = tiles.tiles_from_json(entry["tiles"])
    request = tune.Geometry(4, 2, 32, 16).problem("decode", True).request
    present, second = every("decode", request)[:2]
    assert written == dataclasses.replace(second, prefill=present.prefill)
    assert [path.name for path in cache.iterdir()] == ["pallas_gpu.json"]


@pytest.mark.once
def test_tune_never_takes_a_wrong_candidate(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = two_candidates(monkeypatch)
    monkeypatch.setattr(tune, "seconds_per_call", lambda *_, **__: (1.0, ()))
    answers = iter([(0.0, True), (0.5, False), (0.0, True), (0.5, False)])
    monkeypatch.setattr(tune, "check", lambda *_: next(answers))
    result = CliRunner().invoke(app, ["tune", *TINY])
    assert result.exit_code == 0, result.output
    assert result.output.count("wrong answer") >= 1
    (entry,) = json.loads((cache / "pallas_gpu.json").read_text(encoding="utf-8"))["entries"].values()
    request = tune.Geometry(4, 2, 32, 16).problem("decode", True).request
    assert tiles.tiles_from_json(entry["tiles"]) == every("decode", request)[0]


@pytest.mark.once
def test_tune_stops_when_the_present_tiles_are_wrong(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "check", lambda *_: (0.5, False))
    result = CliRunner().invoke(app, ["tune", *TINY])
    assert result.exit_code == 1
    assert "the present sizes fail: wrong answer, off by up to 0.5. Nothing is written." in " ".join(
        result.output.split()
    )
    assert not cache.exists()


def test_tune_refuses_what_the_kernel_refuses(cache: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--interpret", "--head-dim", "320"])
    assert result.exit_code == 1
    assert "pallas_gpu does not take this: head_dim 320, more than 256" in " ".join(result.output.split())
    assert not cache.exists()


def test_tuned_tiles_are_found_by_a_call(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tune writes is what a later process on that card reads."""
    problem = tune.Geometry().problem("decode", True)
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(tiles, "card", lambda: (name, tiles.CARDS["H100"]))
    tiles.read_tuned.cache_clear()
    try:
        before = tiles.choose(problem.request, RaggedPageConfig())
        wanted = dataclasses.replace(before, programs=7)
        key = tiles.tuned_key(name, problem.request)
        entries.write(tiles.tuned_file(), tiles.FORMAT, key, {"tiles": dataclasses.asdict(wanted)})
        tiles.read_tuned.cache_clear()
        assert tiles.choose(problem.request, RaggedPageConfig()) == wanted
    finally:
        tiles.read_tuned.cache_clear()


# benchmarks/gpu


def script(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "benchmarks" / "gpu"), *arguments]
    # As in `quick_to_compile`: a dry run interprets.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def test_benchmark_without_a_gpu_says_so(repository: Path) -> None:
    result = script(repository)
    assert result.returncode == 2
    assert "This benchmark needs a GPU, and JAX's default backend is 'cpu'" in result.stderr


def test_dry_run_of_the_benchmark(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    cases = [part for name in ("decode-1x8k", "update-8k") for part in ("--case", name)]
    picture = tmp_path / "gpu.png"
    figure = ["--figure", str(picture)] if importlib.util.find_spec("matplotlib") else []
    result = script(repository, "--dry-run", "--repeats", "1", "--json", str(file), *figure, *cases)
    assert result.returncode == 0, result.stderr[-2000:]
    assert picture.exists() == bool(figure)
    assert "no time or rate in here means anything" in result.stdout
    assert " us" not in result.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["dry_run"] is True
    assert report["machine"]["versions"]["jax"] == jax.__version__
    decode, update = report["results"]
    assert {(each["kernel"], each["version"]) for each in decode["timings"]} >= {
        ("pallas_gpu", "v2"),
        ("pallas_gpu", "v3"),
        ("xla", "v2"),
    }
    # Whoever gives no answer says why.
    said = [each["kernel"] for each in decode["timings"]] + [note.split(" v")[0] for note in decode["notes"]]
    assert {"unified_attention", "ejkernel", "jax paged_attention", "cudnn"} <= set(said)
    assert [each["kernel"] for each in update["timings"]] == ["pallas_gpu"]
    assert all(each["right"] and each["met"] is None for each in decode["timings"])


@pytest.mark.once
def test_dry_run_of_the_mosaic_benchmark(repository: Path, tmp_path: Path) -> None:
    """It measures what it is compared with, too. Where the kernel can't run, that is what comes out."""
    file = tmp_path / "mosaic.json"
    case = ("--case", "prefill-8k", "--json", str(file))
    result = script(repository, "--dry-run", "--kernel", "pallas_mosaic_gpu", *case)
    reason = PallasMosaicGPU(interpret=True).facts()["reason"]
    if reason is not None:
        assert result.returncode == NOT_HERE
        assert f"pallas_mosaic_gpu: {reason}" in result.stderr
        assert not file.exists()
        return
    assert result.returncode == 0, result.stderr[-2000:]
    (found,) = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert found["kernel"] == "pallas_mosaic_gpu"
    timings = {(each["kernel"], each["version"]): each for each in found["timings"]}
    assert timings.keys() >= {(name, v) for name in ("pallas_mosaic_gpu", "pallas_gpu") for v in ("v2", "v3")}
    assert all(each["right"] for each in found["timings"])


def test_what_is_compared_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def timing(kernel: str, version: str, us: float, met: bool | None) -> dict[str, Any]:
        return {"kernel": kernel, "version": version, "us": us, "share": 0.5, "error": 1e-3, "met": met}

    result = {
        "case": "prefill-8k", "kernel": "pallas_mosaic_gpu", "geometry": "32/8/128", "limit_us": 200.0,
        "target": ">= 60 %", "wider_table": None, "notes": [],
        "timings": [
            timing("pallas_mosaic_gpu", "v2", 400.0, False), timing("pallas_gpu", "v2", 500.0, None),
            timing("pallas_gpu", "v3", 510.0, None),
        ],
    }  # fmt: skip
    show(result, False)
    _, ours, other, without = capsys.readouterr().out.splitlines()
    assert ours.endswith("MISSED")
    assert other.endswith("1.25 times pallas_mosaic_gpu")
    assert "times" not in without


def test_benchmark_refuses_an_unknown_workload(repository: Path) -> None:
    result = script(repository, "--dry-run", "--case", "decode-1x9k")
    assert result.returncode == 2
    assert "--case: got decode-1x9k, wanted some of decode-64x2k," in result.stderr


class TestHalfHour:
    """The commands for a first half hour on a card, with others in their place."""

    def test_each_command_ends_and_what_it_found_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        programs = {"good": "print('found')", "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}
        commands = [half_hour.Command(name, ("-c", program)) for name, program in programs.items()]
        monkeypatch.setattr(half_hour, "commands", lambda out, dry: iter(commands))
        run = ["--out", str(tmp_path), "--limit", "5"]
        assert half_hour.main(run) == 1
        done = json.loads((tmp_path / "done.json").read_text(encoding="utf-8"))
        found = {name: each["status"] for name, each in done.items()}
        assert found == {"good": "ok", "bad": "exit code 3", "slow": "timed out"}
        assert (tmp_path / "good.log").read_text(encoding="utf-8").strip() == "found"
        assert "1 of 3 commands ended well; not bad, slow" in capsys.readouterr().out
        commands[1:] = [half_hour.Command(name, ("-c", "")) for name in ("bad", "slow")]
        assert half_hour.main(run) == 0
        again = capsys.readouterr().out
        assert "good ..." not in again
        assert "3 of 3 commands ended well" in again

    def test_what_this_machine_can_not_run_is_skipped_with_the_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And what follows from it, but nothing else."""
        commands = [
            half_hour.Command("first", ("-c", f"print('this is 8.0'); raise SystemExit({NOT_HERE})")),
            half_hour.Command("second", ("-c", "raise SystemExit(3)"), needs="first"),
            half_hour.Command("slow", ("-c", "import time; time.sleep(60)"), limit_s=0.5),
            half_hour.Command("after", ("-c", ""), needs="slow"),
            half_hour.Command("other", ("-c", ""), needs="not tried"),
        ]
        monkeypatch.setattr(half_hour, "commands", lambda out, dry: iter(commands))
        assert half_hour.main(["--out", str(tmp_path)]) == 1
        done = json.loads((tmp_path / "done.json").read_text(encoding="utf-8"))
        assert {name: each["status"] for name, each in done.items()} == {
            "first": "skipped", "second": "skipped", "slow": "timed out", "after": "skipped", "other": "ok",
        }  # fmt: skip
        assert done["first"]["last"] == ["this is 8.0"]
        assert done["second"]["last"] == ["first: skipped", "this is 8.0"]
        assert "1 of 5 commands ended well; not slow; skipped first, second, after" in capsys.readouterr().out
        del commands[2:4]
        (tmp_path / "done.json").unlink()
        assert half_hour.main(["--out", str(tmp_path)]) == 0  # there is nothing wrong with it

    def test_both_kernels_are_measured_on_prompts(self, tmp_path: Path) -> None:
        """Mosaic comes last, in files of its own, and only where one case has ended: it may never end."""
        commands = {command.name: command for command in half_hour.commands(tmp_path, False)}
        names = list(commands)
        first = names.index("mosaic-first")
        mosaic = names[first + 1 :]
        assert not any(name.startswith("mosaic") for name in names[:first])
        assert mosaic[0] == "mosaic-trial-32-8-128"
        assert [name for name in mosaic[1:] if "contract" not in name] == [
            "mosaic-prefill-8k", "mosaic-chunk-2k-on-32k", "mosaic-mixed-63x4k-and-1k",
        ]  # fmt: skip
        assert all(commands[name].needs == "mosaic-first" for name in mosaic)
        assert all(command.limit_s <= 480 for command in commands.values())
        written = [part for command in commands.values() for part in command.arguments if part.endswith(".json")]
        assert len(written) == len(set(written)) == len(TABLE) + 3
        for name in ("prefill-8k", "chunk-2k-on-32k", "mixed-63x4k-and-1k"):
            assert "--kernel" not in commands[f"table-{name}"].arguments
            assert commands[f"mosaic-{name}"].arguments[-2:] == ("--kernel", "pallas_mosaic_gpu")
        kernels = {kernel: {each.name for each in CONTESTANTS[kernel]} for kernel in (OURS, MOSAIC)}
        assert MOSAIC not in kernels[OURS]
        assert {OURS, MOSAIC} <= kernels[MOSAIC]

    @pytest.mark.parametrize("dry", [True, False])
    def test_what_is_tuned_is_what_the_other_kernel_is_tried_beside(self, dry: bool, tmp_path: Path) -> None:
        commands = {command.name: command for command in half_hour.commands(tmp_path, dry)}
        tune, trial = commands["tune-32-8-128"], commands["mosaic-trial-32-8-128"]
        assert list(commands).index(tune.name) < list(commands).index(trial.name)
        assert tune.variables == trial.variables == (("EASYDEL_RAGGED_CACHE", str(tmp_path / "tuned")),)
        for command, kernel in ((tune, OURS), (trial, MOSAIC)):
            assert command.arguments[:5] == ("-m", "easydel_ragged_plugin", "tune", "--kernel", kernel)
            assert ("--interpret" in command.arguments) == dry
        assert dry or tune.arguments[5:] == trial.arguments[5:]

    def test_a_missed_target_is_measured_again_with_the_tuned_tiles(self, tmp_path: Path) -> None:
        names = [command.name for command in half_hour.commands(tmp_path, False)]
        assert len(names) == len(set(names))
        assert not any(name.startswith("again-") for name in names)
        workloads = [name.removeprefix("table-") for name in names if name.startswith("table-")]
        for name, met in zip(workloads, (False, True), strict=False):
            report = {"results": [{"timings": [{"met": met}, {"met": None}]}]}
            (tmp_path / f"table-{name}.json").write_text(json.dumps(report), encoding="utf-8")
        again = [each for each in half_hour.commands(tmp_path, False) if each.name.startswith("again-")]
        assert [each.name for each in again] == [f"again-{workloads[0]}"]
        assert dict(again[0].variables)["EASYDEL_RAGGED_CACHE"] == str(tmp_path / "tuned")
