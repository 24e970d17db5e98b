"""``easydel-ragged bench``: what it writes, shows, draws and refuses; the machine's limits are not measured here.

Some need seconds to compile and no host: one JAX runs them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import invoke, run_command
from conftest import RunPython

from easydel_ragged_plugin import host
from easydel_ragged_plugin.bench import cases as bench_cases
from easydel_ragged_plugin.bench import engine_case, figure, soak_case
from easydel_ragged_plugin.bench import report as bench_report
from easydel_ragged_plugin.bench import run as bench
from easydel_ragged_plugin.bench import timing as bench_timing
from easydel_ragged_plugin.bench.machine import Limits
from easydel_ragged_plugin.bench.problem import build
from easydel_ragged_plugin.bench.timing import Candidate
from easydel_ragged_plugin.bench.work import work
from easydel_ragged_plugin.demo import engine
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.terminal import CommandError, require_writable
from easydel_ragged_plugin.testing.batches import Case, Version


@pytest.mark.usefixtures("quick_machine")
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_bench_writes_json(version: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ("--version", version, "--kernel", "xla", "--repeats", "1", "--no-host", "--dtype", "float32")
    result = invoke("bench", "--case", "smoke", *options, "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    (line,) = report["results"]
    (timing,) = line["timings"]
    assert (line["case"], line["version"], line["dtype"], line["notes"]) == ("smoke", version, "float32", [])
    assert timing["kernel"] == "xla"
    assert timing["error"] < 1e-4
    assert timing["us"] > 0
    assert len(timing["samples_us"]) == 1
    assert timing["share"] == pytest.approx(line["limit_us"] / timing["us"])
    assert report["limits"]["read_bytes_per_s"] == 1e10
    assert report["machine"]["processors"] >= 1
    assert report["kernels"]["xla"]["facts"]["available"]
    assert [name for name, kernel in report["kernels"].items() if kernel["is_hosts"]] == list(report["kernels"])[-1:]


def _available_kernels() -> list[str]:
    """What this environment can time on the smoke case: the native kernel needs a compiler, the host's the host."""
    native = ["cpu_native"] if cpu_native.availability() is None else []
    return [*native, "xla", *(["ejkernel"] if importlib.util.find_spec("ejkernel") else [])]


@pytest.mark.usefixtures("quick_machine")
@pytest.mark.parametrize("choice", [("--all-kernels",), ("--kernel", "cpu_native", "-k", "xla", "--kernel", "xla")])
def test_bench_times_several_kernels_in_turns(
    choice: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    time_us = Candidate.time_us

    def recorded(self: Candidate, calls: int) -> float:
        order.append(self.kernel)
        return time_us(self, calls)

    monkeypatch.setattr(Candidate, "time_us", recorded)
    file = tmp_path / "results.json"
    result = invoke("bench", "--case", "smoke", *choice, "--repeats", "2", "--json", str(file))
    assert result.exit_code == 0, result.output
    (line,) = json.loads(file.read_text())["results"]
    kernels = _available_kernels()
    assert [timing["kernel"] for timing in line["timings"]] == kernels
    assert all(timing["error"] < 0.03 and timing["share"] > 0 for timing in line["timings"])
    assert order == kernels * 2
    if "cpu_native" not in kernels and choice != ("--all-kernels",):
        assert "cpu_native does not run" in line["notes"][0]


@pytest.mark.once
@pytest.mark.usefixtures("quick_machine")
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_bench_gives_tiny_calls_no_share_of_a_limit(version: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ("--version", version, "--kernel", "xla", "--repeats", "2", "--no-host", "--json", str(file))
    result = invoke("bench", "--case", "tiny", *options)
    assert result.exit_code == 0, result.output
    (line,) = json.loads(file.read_text())["results"]
    (timing,) = line["timings"]
    assert (line["bound"], line["limit_us"], timing["share"]) == ("call", None, None)
    assert timing["us"] > 0
    # The unit follows the time, which follows the machine's load: the table must show what the file holds.
    assert bench_report.in_unit(timing["us"]) in result.output


@pytest.mark.parametrize(
    ("microseconds", "shown"),
    [(None, "-"), (3.34, "3.3 µs"), (999.4, "999.4 µs"), (1500.0, "1.50 ms"), (24600.0, "24.6 ms"), (1.73e6, "1.73 s")],
)
def test_bench_shows_times_in_a_fitting_unit(microseconds: float | None, shown: str) -> None:
    assert bench_report.in_unit(microseconds) == shown


@pytest.mark.once
@pytest.mark.usefixtures("quick_machine")
def test_bench_compares_with_the_case_of_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = next(case for case in bench_cases.BENCH_CASES if case.name == "smoke")
    wide = dataclasses.replace(smoke, name="smoke-wide-table", pages_per_row=32)
    monkeypatch.setattr(bench_cases, "BENCH_CASES", (smoke, wide))
    monkeypatch.setitem(bench_cases.SCALED, wide.name, smoke.name)
    file = tmp_path / "results.json"
    options = ("--kernel", "xla", "--repeats", "1", "--no-host", "--json", str(file))
    result = invoke("bench", "--case", wide.name, *options)
    assert result.exit_code == 0, result.output
    (line,) = json.loads(file.read_text())["results"]
    assert line["scaled_from"] == "smoke"
    assert line["timings"][0]["ratio"] > 0
    assert "x the time of smoke, timed in turns" in result.output


def test_every_compared_case_is_the_same_work() -> None:
    known = bench_cases.by_name()
    assert set(known) >= bench_cases.CALL_BOUND
    for name, other in bench_cases.SCALED.items():
        assert work(known[name]) == work(known[other])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_case_beyond_the_cache_is(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "last_level_cache", lambda: 100 << 20)
    case = bench_cases.with_dtype(bench_cases.by_name()["decode-beyond-cache"], dtype)
    data = work(case).cache_bytes
    assert 1.25 <= data / (100 << 20) < 1.4
    assert case.num_rows == case.num_tokens == len(case.rows)


@pytest.mark.once
@pytest.mark.parametrize("call_us", [40, 100, 1_000])
def test_what_starting_costs_does_not_choose_between_two_ways(call_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way costs 100 us to start, the other 10 us in each call."""
    now_us = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_us * 1e-6)

    def takes(start_us: float, each_us: float) -> Callable[[int], None]:
        def run(calls: int) -> None:
            nonlocal now_us
            now_us += start_us + calls * each_us

        return run

    together, one_by_one = bench_timing.least_us([takes(100, call_us), takes(0, call_us + 10)])
    assert one_by_one == pytest.approx(call_us + 10)
    assert call_us < together < one_by_one


@pytest.mark.once
@pytest.mark.parametrize("together_us", [90, 110])
def test_a_candidate_takes_the_faster_way(together_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now_us = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_us * 1e-6)

    def run(self: Candidate, in_one_program: bool, calls: int) -> None:
        nonlocal now_us
        now_us += calls * (together_us if in_one_program else 100)

    monkeypatch.setattr(Candidate, "_run", run)
    candidate = Candidate.__new__(Candidate)  # without a program
    assert candidate.choose() == pytest.approx(min(together_us, 100))
    assert candidate.in_one_program == (together_us < 100)


@pytest.mark.once
def test_a_busy_moment_does_not_choose_between_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    now_us = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_us * 1e-6)

    def takes(call_us: float, busy: bool) -> Callable[[int], None]:
        def run(calls: int) -> None:
            nonlocal now_us
            now_us += calls * call_us * (2 if busy and now_us < 50_000 else 1)

        return run

    assert bench_timing.least_us([takes(100, busy=True), takes(110, busy=False)]) == pytest.approx([100, 110])
    assert now_us > 100_000


@pytest.mark.once
@pytest.mark.usefixtures("quick_machine")
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_calls_in_one_program_are_as_many_as_requested(version: Version) -> None:
    """Each takes the result of the one before as its queries."""
    problem = build(bench_cases.with_dtype(bench_cases.by_name()["smoke"], "float32"), version)
    candidate = Candidate(problem, "xla")
    together, first = np.asarray(candidate.run(3)), np.asarray(candidate.run(1))
    candidate.in_one_program = False  # from here on, one by one
    np.testing.assert_allclose(candidate.run(3), first, rtol=1e-5, atol=1e-6)
    error, right = candidate.check()
    assert right
    assert error < 1e-4
    for _ in range(3):
        queries = candidate.run(1)
        candidate._operands = candidate._operands._replace(queries=queries)
    np.testing.assert_allclose(together, queries, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("quick_machine")
def test_bench_stops_at_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidate, "check", lambda self: (0.5, False))
    result = invoke("bench", "--case", "smoke", "--kernel", "xla", "--no-host")
    assert result.exit_code == 1
    assert "xla is WRONG (largest error 0.5" in result.output


@pytest.mark.usefixtures("quick_machine")
def test_bench_fails_when_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native.CpuNativeKernel, "refuses", lambda self, request: "not today")
    result = invoke("bench", "--case", "smoke", "--kernel", "cpu_native", "--no-host")
    assert result.exit_code == 1
    assert "cpu_native does not run: cpu_native: not today" in result.output


@pytest.fixture
def report_file(tmp_path: Path) -> Path:
    """Results of two workloads and of one that has no limit, as ``--json`` writes them."""

    def result(case: str, bound: str, **shares: float) -> dict[str, object]:
        timings = [
            bench_report.Timing(kernel, 100.0, None if bound == "call" else share, 1e-3, None, (99.0, 100.0, 101.0))
            for kernel, share in shares.items()
        ]
        limit = None if bound == "call" else 90.0
        made = bench_report.Result(case, "v3", "bfloat16", bound, limit, None, None, None, tuple(timings), ("a note",))
        return dataclasses.asdict(made)

    report = {
        "machine": {
            "date": "2026-01-02",
            "platform": "cpu",
            "device": "A processor",
            "processors": 2,
            "last_level_cache_bytes": None,
            "versions": {"easydel-ragged-plugin": "0.1.0", "jax": "0.9.2"},
        },
        "kernels": {
            "made_up": {"label": "made up", "color": None, "is_hosts": False, "facts": {"available": True}},
            "xla": {"label": "XLA", "color": "#7cc5bd", "is_hosts": False, "facts": {"available": True, "isa": "avx2"}},
            "untimed": {"label": "untimed", "color": None, "is_hosts": False, "facts": {"available": False}},
            "hosts": {"label": "EasyDeL", "color": "#c9742b", "is_hosts": True, "facts": {"available": True}},
        },
        "repeats": 3,
        "limits": dataclasses.asdict(Limits(2e10, 1e11)),
        "results": [
            result("decode-8x2k", "read", made_up=0.9, xla=0.08, hosts=0.006),
            result("prefill-1k", "gemm", made_up=1.4, xla=0.3),
            result("tiny", "call", made_up=1.0),
        ],
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    return file


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the bench extra")
def test_bench_draws_a_figure_from_json(report_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "figure.png"
    result = invoke("bench", "--from-json", str(report_file), "--figure", str(picture))
    assert result.exit_code == 0, result.output
    assert "0.6 %" in result.output  # the table, too
    assert "made_up" in result.output
    assert "EasyDeL" in result.output
    assert "xla: available; isa avx2" in result.output
    assert "untimed" not in result.output
    assert "a note" in result.output
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width == round(figure.WIDTH * figure.DPI)
    assert 300 < height < width
    assert len(content) > 10_000


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the bench extra")
def test_a_figure_needs_a_workload_with_a_limit(report_file: Path, tmp_path: Path) -> None:
    report = json.loads(report_file.read_text())
    report["results"] = report["results"][2:]
    report_file.write_text(json.dumps(report))
    result = invoke("bench", "--from-json", str(report_file), "--figure", str(tmp_path / "figure.png"))
    assert result.exit_code == 2
    assert "no workload with a limit" in result.output


def test_a_figure_without_matplotlib_says_what_to_install(report_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke("bench", "--from-json", str(report_file), "--figure", "never.png")
    assert result.exit_code == 2
    assert "Run: pip install matplotlib" in result.output
    assert not Path("never.png").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}', '{"results": [{"case": "x"}]}'])
def test_bench_refuses_a_file_of_something_else(content: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    result = invoke("bench", "--from-json", str(file))
    assert result.exit_code == 2
    assert "not a result of this command" in result.output


def test_bench_hands_its_options_to_the_engine_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[engine_case.Plan] = []

    def measured(plan: engine_case.Plan, *, repeats: int, with_host: bool) -> dict[str, object]:
        seen.append(plan)
        engines = {
            label: {"result": rate, "of_ceiling": rate / 50, "same_tokens": label != "ceiling"}
            for label, rate in (("this package's v3", 46.0), ("ceiling", 50.0))
        }
        return {
            "model": "a model",
            "dtype": "float32",
            "easydel": "0.3.0",
            "repeats": repeats,
            "start_s": {"decode": dict.fromkeys(engines, 9.0)},
            "kernels": {"this package's v3": ["cpu_native"]},
            "workloads": [{"name": "4 requests", "unit": "tokens/s", "context": 9, "engines": engines}],
        }

    monkeypatch.setattr(engine_case, "run", measured)
    monkeypatch.setattr(bench, "check_environment", lambda what, *, converts: None)
    file = tmp_path / "results.json"
    options = ("--engine-context", "0", "--engine-context", "500", "--engine-prompt", "64", "--json", str(file))
    result = invoke("bench", "--case", "engine", *options)
    assert result.exit_code == 0, result.output
    assert [(plan.contexts, plan.prompt_tokens) for plan in seen] == [((0, 500), 64)]
    assert "92 %" in result.output
    assert json.loads(file.read_text())["engine"]["workloads"][0]["name"] == "4 requests"


PLAN = soak_case.Plan(requests=100, intervals=5)
QUIET = soak_case.Interval(20, 4, 300, 1.0, 1 << 30, 1 << 20, 40, 30, ())


def test_a_soak_sends_its_references_in_each_interval() -> None:
    references, parts = soak_case.requests_of(PLAN)
    assert soak_case.requests_of(PLAN) == (references, parts)
    assert sum(map(len, parts)) == PLAN.requests
    settings = PLAN.settings()
    for part in parts:
        assert {each.reference for each in part} == {None, *range(PLAN.references)}
        for each in part:
            assert len(each.words) + each.max_tokens + settings.max_requests <= settings.max_model_len
            assert each.cancel_after is None or 0 <= each.cancel_after < each.max_tokens
        assert any(each.cancel_after is not None for each in part)


@pytest.mark.parametrize(
    ("last", "finding"),
    [
        ({}, None),
        ({"resident_bytes": (1 << 30) + soak_case.ALLOWED_GROWTH_BYTES}, None),
        ({"resident_bytes": (1 << 30) + (40 << 20)}, "the process grew by 40 MiB"),
        ({"arrays": 41}, "JAX holds 1 arrays more"),
        ({"wrong": ("reference 2: got (1,), wanted (2,)",)}, "1 wrong answers, the first: reference 2"),
    ],
)
def test_a_soak_finds_drift(last: dict[str, Any], finding: str | None) -> None:
    # The first interval is the warm-up: what it holds does not count, a wrong answer in it does.
    first = dataclasses.replace(QUIET, resident_bytes=1 << 28, arrays=10)
    found = soak_case.verdict(PLAN, [first, QUIET, QUIET, QUIET, dataclasses.replace(QUIET, **last)])
    assert found["drift"] == (finding is not None)
    assert [text for text in found["findings"] if finding and text.startswith(finding)] == found["findings"]
    early = soak_case.verdict(PLAN, [dataclasses.replace(first, wrong=("short",)), QUIET, QUIET, QUIET, QUIET])
    assert early["findings"] == ["1 wrong answers, the first: short"]


class FakeEngine(engine.Engine):
    """Answers with as many tokens as are wanted; one request is answered wrongly, and ``lost`` tokens are missing."""

    def __init__(self, wrong: soak_case.Request, lost: int = 0) -> None:
        self.tokenizer = lambda text: {"input_ids": text.split()}
        self.wrong = soak_case._text(wrong.words, self.tokenizer)
        self.lost = lost

    def answer(self, text: str, max_tokens: int, *, cancel_after: int | None = None) -> engine.Answer:
        count = max_tokens if cancel_after is None else cancel_after
        tokens, cancelled = (int(text == self.wrong),) * count, cancel_after is not None
        return engine.Answer(text, tokens, cancelled=cancelled, generated=count - self.lost)


def test_a_soak_compares_the_answers_of_its_references() -> None:
    references, parts = soak_case.requests_of(PLAN)
    first = {place: (0,) * each.max_tokens for place, each in enumerate(references)}
    interval = soak_case._interval(FakeEngine(references[3]), PLAN, parts[0], first, lambda done, total: None)
    assert interval.requests == 20
    assert interval.cancelled == sum(each.cancel_after is not None for each in parts[0])
    assert interval.resident_bytes > 1 << 20
    count = references[3].max_tokens
    assert interval.wrong == (f"reference 3: got {(1,) * count}, wanted {(0,) * count}",)


def test_a_soak_counts_the_tokens_that_were_generated() -> None:
    """An engine leaves end-of-text tokens out of an answer that has nothing else."""
    references, parts = soak_case.requests_of(PLAN)
    first = {place: (0,) * each.max_tokens for place, each in enumerate(references)}
    short = soak_case._interval(FakeEngine(references[3], lost=1), PLAN, parts[0], first, lambda done, total: None)
    complete = [each for each in parts[0] if each.cancel_after is None]
    assert sum(text.startswith("an answer of") for text in short.wrong) == len(complete)


def test_a_prompt_of_the_soak_has_no_more_tokens_than_words() -> None:
    words = tuple(range(10, 30))
    for tokens_per_word in (1, 3):
        text = soak_case._text(words, lambda text: {"input_ids": text.split() * tokens_per_word})  # noqa: B023
        assert 20 // tokens_per_word * 3 // 4 <= len(text.split()) <= 20 // tokens_per_word
    assert soak_case._text((7,), lambda text: {"input_ids": [1, 2, 3]}) == "w7"


def test_bench_fails_for_drift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[soak_case.Plan] = []

    def soaked(plan: soak_case.Plan) -> dict[str, Any]:
        seen.append(plan)
        intervals = [QUIET] * 4 + [dataclasses.replace(QUIET, wrong=("short",) * (plan.requests == 99))]
        return {
            "model": plan.model,
            "easydel": "0",
            "plan": dataclasses.asdict(plan),
            "kernels": ["xla"],
            "intervals": [dataclasses.asdict(each) for each in intervals],
            "verdict": soak_case.verdict(plan, intervals),
        }

    monkeypatch.setattr(soak_case, "run", soaked)
    monkeypatch.setattr(bench, "check_environment", lambda what, *, converts: None)
    file = tmp_path / "soak.json"
    result = invoke("bench", "--case", "soak", "--soak-requests", "200", "--version", "v2", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "no drift: every answer as at first" in result.output
    assert (seen[-1].requests, seen[-1].mechanism) == (200, "ragged_page_attention_v2")
    result = invoke("bench", "--case", "soak", "--soak-requests", "99")
    assert result.exit_code == 1
    assert "drift: 1 wrong answers, the first: short" in result.output
    result = invoke("bench", "--from-json", str(file))
    assert "no drift" in result.output


def test_a_soak_needs_enough_requests() -> None:
    with pytest.raises(CommandError, match="--soak-requests: got 50, wanted at least 90"):
        soak_case.run(soak_case.Plan(requests=50))


def test_the_engine_case_fits_its_requests() -> None:
    plan = engine_case.Plan()
    settings = plan.decode_settings()
    longest = max(plan.contexts) + plan.answer_length(max(plan.contexts))
    assert settings.max_model_len >= longest + plan.requests
    assert settings.max_model_len % settings.page_size == 0
    prompt = plan.prompt_settings()
    assert prompt.tokens_per_step == prompt.decode_bucket >= plan.prompt_tokens


def test_the_decode_rate_counts_while_all_requests_decode() -> None:
    slow_start = [(5.0, 1), (6.0, 2), (7.0, 3), (8.0, 4)]
    early = [(0.0, 1), (2.0, 5), (5.0, 6), (7.0, 8)]
    assert engine._decode_rate([slow_start, early]) == pytest.approx((2 + 2) / 2.0)
    assert engine._decode_rate([slow_start, [(0.0, 1), (4.0, 9)]]) is None


@pytest.mark.parametrize("case", bench_cases.BENCH_CASES, ids=lambda case: case.name)
def test_bench_work_is_counted_by_hand(case: Case) -> None:
    counted = work(case)
    window = case.window or 10**9
    pairs, read = 0, 0
    for index, row in enumerate(case.rows):
        seen: set[int] = set()
        for position in range(row.context - row.new, row.context):
            visible = range(max(0, position - window + 1), position + 1)
            pairs += len(visible)
            seen.update((visible.start, position))
        read += max(seen) - min(seen) + 1
        if index > 0:
            read -= case.shared_pages * case.page_size
    assert counted.cache_bytes == 2 * read * case.kv_heads * case.head_dim * case.np_cache_dtype.itemsize
    assert counted.flops == 4 * pairs * case.q_heads * case.head_dim


def test_bench_lists_every_case() -> None:
    result = invoke("bench", "--list")
    assert result.exit_code == 0
    assert all(case.name in result.output for case in bench_cases.BENCH_CASES)
    assert {bench.ENGINE_CASE, bench.SOAK_CASE} <= set(result.output.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--json", "{tmp}/missing/x.json"),
            "--json {tmp}/missing/x.json: can't be written: No such file or directory.",
        ),
        (("--json", "{tmp}"), "--json {tmp}: can't be written: Is a directory."),
        (("--figure", "{tmp}/missing/x.png"), "--figure {tmp}/missing/x.png: can't be written: No such file"),
        (("--figure", "{tmp}/x.xyz"), "--figure {tmp}/x.xyz: got .xyz, wanted one of "),
        (("--case", "tiny", "--figure", "{tmp}/x.png"), "--figure: got the cases tiny, none of which has a limit"),
    ],
)
def test_bench_checks_its_files_first(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    if "--figure" in options:
        pytest.importorskip("matplotlib")
    result = invoke("bench", *(each.format(tmp=tmp_path) for each in options))  # without a fake machine: minutes
    assert result.exit_code == 2
    assert f"error: {said.format(tmp=tmp_path)}" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_checked_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("earlier")
    require_writable("--json", file)
    assert file.read_text() == "earlier"
    require_writable("--json", Path("/dev/stdout"))


def test_bench_in_an_ascii_terminal(report_file: Path) -> None:
    result = run_command("bench", "--from-json", str(report_file), PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "100.0 us" in result.stdout
    assert result.stdout.isascii()


def test_bench_names_the_cases_when_one_is_unknown() -> None:
    result = invoke("bench", "--case", "decode-9x9k")
    assert result.exit_code == 2
    assert "got decode-9x9k, wanted some of decode-1x4k" in result.output


def test_bench_names_the_kernels_when_one_is_unknown() -> None:
    result = invoke("bench", "--case", "smoke", "--kernel", "warp")
    assert result.exit_code == 2
    assert "got 'warp', wanted one of" in result.output
    assert "xla" in result.output


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch for the tiny model")
@pytest.mark.host
@pytest.mark.slow
def test_a_short_soak_finds_no_drift(run: RunPython, tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    command = ("-m", "easydel_ragged_plugin", "bench", "--case", "soak", "--soak-requests", "120")
    variables = {"JAX_PLATFORMS": "cpu", "EASYDEL_RAGGED_CACHE": str(tmp_path)}
    # EasyDeL 0.2.0.2 ends some answers early under such a load, with its own kernels, too.
    known = host.host_version() == "0.2.0.2"
    run(sys.executable, *command, "--json", file, environment=variables, timeout_s=500, status=int(known))
    report = json.loads(file.read_text())["soak"]
    findings = [each for each in report["verdict"]["findings"] if not (known and "an answer of" in each)]
    assert findings == []
    assert report["kernels"]
    assert sum(each["requests"] for each in report["intervals"]) == 120
    assert sum(each["cancelled"] for each in report["intervals"]) > 0
