"""A kernel that may never end is tried in a process of its own, and chosen by what came of it. No card is needed.

The process is stood in for by short programs that hang, crash, are wrong or slow; the card is described.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_requests import SMALL, request_for
from mosaic_cases import H100, INTERPRETED, not_interpreted, on_hopper
from rich.console import Console
from typer.testing import CliRunner

from easydel_ragged_plugin import RaggedPageConfig, entries, interrupt, select
from easydel_ragged_plugin.bench import contestants, trial, trial_steps, tune
from easydel_ragged_plugin.bench import run as bench
from easydel_ragged_plugin.bench.geometry import Geometry
from easydel_ragged_plugin.bench.problem import build
from easydel_ragged_plugin.cli import app, doctor
from easydel_ragged_plugin.config import CACHE_VARIABLE
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import KERNEL, assembler, verdicts
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.terminal import CommandError
from easydel_ragged_plugin.testing.cases import Row, build_batch, case_named
from easydel_ragged_plugin.testing.kernel_driver import KernelOutcome
from easydel_ragged_plugin.types import AttentionRequest

NAME = KERNEL.name
TODAY = datetime.date.today().isoformat()
STEP = request_for(rows=8, width=16, tokens=2048)
"""8 rows of 4 query heads for a kv head: a tile of 16 queries holds 4 tokens, so 32 tokens may all be decoded."""

COMMAND = "'easydel-ragged tune --q-heads 32 --kv-heads 8 --head-dim 128 --page-size 128 --dtype bfloat16' tries it"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no warning that was logged before."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(select, "_warned", set())
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """What a process reads once."""
    verdicts.read.cache_clear()
    tiles.read_tuned.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)


def keep(reason: str | None = None, changes: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Have the kernel keep a verdict about calls like :data:`STEP`, as read by a later process.

    Args:
        reason: why the kernel has not passed.
        changes: other fields of the entry.
    """
    file = KERNEL.trial().save(STEP, reason, {"checked": ["v3 with one row"]})
    content = json.loads(file.read_text(encoding="utf-8"))
    for entry in content["entries"].values():
        entry.update(changes)
    file.write_text(json.dumps(content), encoding="utf-8")
    forget()


def chosen(request: AttentionRequest = STEP, **config: Any) -> tuple[str, str]:
    """(the kernel that is chosen, what is said of the one for Hopper)."""
    _, selection = select.select(request, RaggedPageConfig(**config))
    reasons = {refusal.kernel: refusal.reason for refusal in selection.refusals}
    return selection.kernel, reasons.get(NAME, "chosen")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged as a warning."""
    caplog.set_level(logging.WARNING, logger="easydel_ragged_plugin")
    return lambda: [record.getMessage() for record in caplog.records]


# Selection.


@pytest.mark.usefixtures("hopper")
def test_a_passed_trial_has_it_chosen_for_steps_with_long_rows(warnings: Callable[[], list[str]]) -> None:
    keep()
    assert chosen() == (NAME, "chosen")
    assert chosen(dataclasses.replace(STEP, num_tokens=33)) == (NAME, "chosen")
    for tokens in (32, 8):
        few = dataclasses.replace(STEP, num_tokens=tokens)
        told = f"only by name: it is for long rows, and a step of {tokens} tokens in 8 rows may have none"
        assert chosen(few) == ("pallas_gpu", told)
        assert chosen(few, kernel=NAME) == (NAME, "chosen")
    assert warnings() == []


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("reason", "changes", "told"),
    [
        ("prompt-4k: wrong answer", {}, f"its trial did not pass on {TODAY}: prompt-4k: wrong answer"),
        (
            None,
            {"made_with": {"jax": "0.12.9"}},
            f"its trial passed on {TODAY} with jax 0.12.9, and here is {verdicts.made_with()['jax']}; {COMMAND} again",
        ),
        (
            None,
            {"made_with": {**verdicts.made_with(), "assembler": "ptxas 12.4"}},
            f"its trial passed on {TODAY} with assembler ptxas 12.4, and here is ",
        ),
        (
            None,
            {"made_with": {**verdicts.made_with(), "sources of the kernel": "older"}},
            f"its trial passed on {TODAY} with sources of the kernel older, and here is ",
        ),
        (
            "slow",
            {"made_with": {}, "date": "2026-01-02"},
            "its trial did not pass on 2026-01-02 with jax unknown, and here is ",
        ),
    ],
)
def test_any_other_verdict_leaves_it_to_its_name(
    reason: str | None, changes: dict[str, Any], told: str, warnings: Callable[[], list[str]]
) -> None:
    keep(reason, changes)
    kernel, said = chosen()
    assert kernel == "pallas_gpu"
    assert said.startswith(f"only by name: {told}")
    assert chosen(kernel=NAME) == (NAME, "chosen")
    assert warnings() == []


@pytest.mark.usefixtures("hopper")
def test_a_verdict_is_about_its_card_and_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    untried = f"only by name: it has not been tried on this card: {COMMAND}"
    assert chosen() == ("pallas_gpu", untried)
    keep()
    others: list[dict[str, Any]] = [{"head_dim": 64}, {"page_size": 64}, {"q_heads": 64}, {"dtype": jnp.float16}]
    for changes in others:
        kernel, said = chosen(request_for(rows=8, width=16, tokens=2048, **changes))
        assert kernel == "pallas_gpu"
        assert said.startswith("only by name: it has not been tried on this card")
    # As many query heads for a kv head: a shard of the same model.
    assert chosen(request_for(rows=8, width=16, tokens=2048, q_heads=16, kv_heads=4))[0] == NAME
    monkeypatch.setattr(tiles, "card", lambda: (f"{H100}e", tiles.CARDS["H100"]))
    assert chosen() == ("pallas_gpu", untried)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 0, "entries": {}}', {"reason": 3}, {"date": None}, {"made_with": "jax"}]
)
def test_an_unusable_file_is_named_and_ignored(content: Any, warnings: Callable[[], list[str]]) -> None:
    if isinstance(content, str):
        verdicts.file().write_text(content, encoding="utf-8")
    else:
        keep(None, content)
    assert chosen()[0] == "pallas_gpu"
    assert chosen()[0] == "pallas_gpu"
    (told,) = warnings()
    assert told.startswith(f"trials of {verdicts.file()} are ignored: ")
    assert told.endswith("Run 'easydel-ragged tune' to write them anew.")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("request_", "config"),
    [
        (request_for(rows=8, width=16, tokens=2048, dtype=jnp.float32), {}),
        (dataclasses.replace(STEP, options=Options(scale_arrays=("k_scale",))), {}),
        (STEP, {"kernel_config": SMALL}),
        (STEP, {"platform": "triton"}),
    ],
)
@pytest.mark.parametrize("passed", [True, False])
def test_what_it_does_not_take_is_no_fallback(
    request_: AttentionRequest, config: dict[str, Any], passed: bool, warnings: Callable[[], list[str]]
) -> None:
    """The kernel that it improves on is what would have run without it."""
    if passed:
        keep()
    kernel, said = chosen(request_, **config)
    assert kernel == "pallas_gpu"
    assert not said.startswith("only by name")
    assert warnings() == []


@pytest.mark.usefixtures("hopper")
def test_another_card_logs_what_it_did_before(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA A100-SXM4-80GB", tiles.CARDS["A100"]))
    assert chosen() == ("pallas_gpu", "takes compute capability 9.0 alone (Hopper), this is 8.0")
    assert warnings() == []
    assert doctor._without({"v3 prefill": select.select(STEP)[1]}) == []
    assert chosen(request_for(head_dim=320))[0] == "xla"
    assert warnings() == ["pallas_gpu was passed over for xla: head_dim 320, more than 256"]


def test_without_a_card_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def nothing(file: Path, *_: Any) -> dict[str, Any]:
        read.append(file)
        return {}

    monkeypatch.setattr(entries, "read", nothing)
    assert chosen()[0] == "pallas_gpu"
    assert KERNEL.facts()["tried"] == []
    assert KERNEL.notes("cpu") == KERNEL.notes("gpu") == ()
    assert KERNEL.fingerprint().endswith(", chosen for: nothing")
    assert verdicts.file() not in read


# What the kernel says of itself.

GEOMETRY = "head_dim=128 group=4 page_size=128 queries=bfloat16 compute=bfloat16 cache=bfloat16"


@pytest.mark.usefixtures("hopper")
def test_facts_notes_and_fingerprint_tell_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNEL.facts() == {"available": True, "reason": None, "card": H100, "tried": []}
    (note,) = KERNEL.notes("gpu")
    assert note.startswith(f"The kernel {NAME}, for long rows on this GPU, has not been tried on it: 'easydel-ragged")
    assert KERNEL.fingerprint().endswith(", chosen for: nothing")

    keep()
    assert KERNEL.facts()["tried"] == [f"{GEOMETRY}: passed on {TODAY}"]
    assert KERNEL.notes("gpu") == ()
    assert KERNEL.fingerprint().endswith(f", chosen for: {GEOMETRY}")

    # Where it would be chosen, but for what has changed since.
    monkeypatch.setattr(assembler, "miscompiles", lambda: "ptxas of CUDA 12.9 miscompiles causal masks")
    (note,) = KERNEL.notes("gpu")
    told = f"The kernel {NAME} passed its trial for {GEOMETRY}, and is not chosen now: "
    assert note == f"{told}ptxas of CUDA 12.9 miscompiles causal masks."
    monkeypatch.setattr(assembler, "miscompiles", lambda: None)
    keep(None, {"made_with": {"jax": "0.12.9"}})
    (note,) = KERNEL.notes("gpu")
    assert note.startswith(f"{told}that was with jax 0.12.9, and here is ")
    assert note.endswith("; 'easydel-ragged tune' tries it again.")
    assert KERNEL.fingerprint().endswith(", chosen for: nothing")

    keep("prompt-4k did not end within 300 s")
    assert KERNEL.facts()["tried"] == [f"{GEOMETRY}: did not pass on {TODAY}: prompt-4k did not end within 300 s"]
    assert KERNEL.notes("gpu") == ()


# The file.


def test_a_file_appears_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache / "below" / "a_kernel.json"
    entries.write(file, 1, "a card", {"passed": True})
    before = file.read_text(encoding="utf-8")

    def full(source: str, target: Path) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no room"):
            entries.write(file, 1, "another card", {"passed": False})
    assert file.read_text(encoding="utf-8") == before
    assert [path.name for path in file.parent.iterdir()] == ["a_kernel.json"]
    entries.write(file, 1, "another card", {"passed": False})
    assert entries.read(file, 1, "trials", dict) == {"a card": {"passed": True}, "another card": {"passed": False}}
    entries.write(file, 2, "a card", {})  # another form: none of the entries can be read
    assert entries.read(file, 2, "trials", dict) == {"a card": {}}


# The process.

SAY = "import json, os, signal, subprocess, sys, time\ndef say(**fields): print(json.dumps(fields), flush=True)\n"
CHECKED = SAY + (
    "say(begin='v3 with one row', limit_s=60)\n"
    "say(end='v3 with one row', problem=None)\n"
)  # fmt: skip
BEGUN = CHECKED + "say(begin='v3 with sinks', limit_s=0.5)\n"
SLEEPS = "time.sleep(60)\n"


def timed(us: float, end: str = "say(done=True)\n") -> str:
    return (
        CHECKED
        + f"say(begin='prompt-4k', limit_s=60)\nsay(end='prompt-4k', problem=None, us={us}, beside_us=100)\n{end}"
    )


def tried(program: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str | None, dict[str, Any]]:
    """(why the kernel has not passed, the entry that it kept) with ``program`` in place of the process."""
    monkeypatch.setattr(trial, "command", lambda *_: [sys.executable, "-c", program])
    file, reason = trial.try_kernel(Console(quiet=True), KERNEL, KERNEL.trial(), STEP, Geometry(), False)
    forget()
    (entry,) = json.loads(file.read_text(encoding="utf-8"))["entries"].values()
    assert entry["reason"] == reason
    assert entry["passed"] == (reason is None)
    return reason, entry


@pytest.mark.usefixtures("hopper")
def test_right_and_faster_is_what_passes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    reason, entry = tried(f"print('a line of somebody else')\n{timed(97)}{SLEEPS}", monkeypatch)
    assert reason is None
    assert entry["checked"] == ["v3 with one row"]
    assert entry["timed"] == {"prompt-4k": {"us": 97, "beside_us": 100}}
    assert (entry["date"], entry["made_with"]) == (TODAY, verdicts.made_with())
    assert chosen() == (NAME, "chosen")
    assert [path.name for path in cache.iterdir()] == ["pallas_mosaic_gpu.json"]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (BEGUN + SLEEPS, "v3 with sinks did not end within 0.5 s"),
        (CHECKED + SLEEPS, "what follows v3 with one row did not end within 3 s"),
        (BEGUN + "sys.exit('no memory')", "its process ended in v3 with sinks (exit code 1: no memory)"),
        (BEGUN + "os.kill(os.getpid(), signal.SIGSEGV)", "its process ended in v3 with sinks (SIGSEGV)"),
        (CHECKED, "its process ended in what follows v3 with one row (exit code 0)"),
        (
            BEGUN + "say(end='v3 with sinks', problem='wrong answer, off by up to 0.5')\n" + SLEEPS,
            "v3 with sinks: wrong answer, off by up to 0.5",
        ),
        (timed(99), "not faster in prompt-4k: 99 us, and pallas_gpu takes 100"),
        (timed(97).replace("us=97", "us=float('nan')"), "not faster in prompt-4k: nan us, and pallas_gpu takes 100"),
        (CHECKED + "say(done=True)", "nothing was timed"),
        (timed(97, "say(begin='chunk', limit_s=0.5)\n" + SLEEPS), "chunk did not end within 0.5 s"),
    ],
)
def test_what_does_not_pass(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "within 3 s" in reason:
        monkeypatch.setattr(trial, "START_LIMIT_S", 3.0)
    keep()  # an earlier verdict is replaced
    begin = time.monotonic()
    assert tried(program, monkeypatch)[0] == reason
    assert time.monotonic() - begin < 20
    kernel, said = chosen()
    assert kernel == "pallas_gpu"
    assert said == f"only by name: its trial did not pass on {TODAY}: {reason}"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("program", "why"),
    [
        (SAY + "say(unable='its process got the backend cpu')\n" + SLEEPS, "its process got the backend cpu"),
        (SAY + SLEEPS, "the start did not end within 1 s"),
        ("import nil", r"its process ended in the start \(exit code 1: ModuleNotFoundError: No module named 'nil'\)"),
    ],
)
def test_a_process_that_can_not_try_keeps_no_verdict(
    program: str, why: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The kernel has not run yet."""
    if "within 1 s" in why:
        monkeypatch.setattr(trial, "START_LIMIT_S", 1.0)
    with pytest.raises(CommandError, match=f"the trial can't run: {why}. Nothing is written") as refused:
        tried(program, monkeypatch)
    assert refused.value.exit_code == 1
    assert list(cache.iterdir()) == []


def has_ended(process_id: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the state of a process")
WITH_ANOTHER = SAY + "say(pid=subprocess.Popen(['sleep', '60']).pid)\n" + SLEEPS


@needs_proc
def test_what_it_has_started_ends_with_it() -> None:
    before = list(interrupt.at_leaving)
    with trial.Child([sys.executable, "-c", WITH_ANOTHER], {}) as child:
        line = child.line(20)
        assert len(interrupt.at_leaving) == len(before) + 1
        with pytest.raises(TimeoutError):
            child.line(0.1)
    assert line is not None
    assert has_ended(line["pid"])
    assert interrupt.at_leaving == before


@needs_proc
def test_ctrl_c_ends_it(repository: Path) -> None:
    program = (
        "import signal, sys\n"
        "from easydel_ragged_plugin.bench.trial import Child\n"
        "from easydel_ragged_plugin.interrupt import interruptible\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests may run where it is ignored
        f"with interruptible(at_once=True), Child([sys.executable, '-c', {WITH_ANOTHER!r}], {{}}) as child:\n"
        "    print(child.line(20)['pid'], child._process.pid, flush=True)\n"
        "    child.line(60)\n"
    )
    path = os.pathsep.join(filter(None, (str(Path(trial.__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as parent:
        assert parent.stdout is not None
        started = [int(each) for each in parent.stdout.readline().split()]
        assert len(started) == 2
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) == interrupt.INTERRUPTED
    assert all(map(has_ended, started))


def test_it_ends_with_the_process_that_started_it() -> None:
    """Also where that one could do nothing about it."""
    program = (
        "import time\n"
        "from easydel_ragged_plugin.bench import trial_steps\n"
        "trial_steps._end_with_parent()\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    variables = {**os.environ, **trial.variables(False)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(20) == 1


def test_the_process_says_what_keeps_it_from_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX falls back to the CPU where it can't have the card, which another process may hold."""
    told = json.loads(trial.command(KERNEL, Geometry(), False)[-1])
    told["platform"] = "gpu"
    command = [*trial.command(KERNEL, Geometry(), False)[:-1], json.dumps(told)]
    with trial.Child(command, trial.variables(False)) as child:
        assert child.line(60) == {"unable": "its process got JAX's backend 'cpu', wanted 'gpu'"}
        assert child.line(60) is None


@pytest.mark.once
def test_what_the_kernel_raises_is_what_the_trial_has_found() -> None:
    """It ends there."""
    with trial.Child(trial.command(KERNEL, Geometry(4, 2, 96, 16), True), trial.variables(True)) as child:
        lines = [child.line(60) for _ in range(3)]
    name = "v3 with every option"
    begin, end = {"begin": name, "limit_s": trial_steps.INTERPRETED_LIMIT_S}, {"end": name, "problem": "KeyError: 96"}
    assert lines == [begin, end, None]


# The steps.


def test_every_option_that_a_kernel_declares_is_tried() -> None:
    names = [each.case.name for each in trial_steps.checks(KERNEL, Geometry(), False)]
    options = {name.removeprefix("with ").removesuffix(" off") for name in names}
    assert options >= KERNEL.features.options - {"vmem_limit_bytes"}
    assert names[0] == "with one row"
    both = [each for each in trial_steps.checks(KERNEL, Geometry(), False) if each.case.name == "with every option"]
    assert [(each.version, each.return_lse) for each in both] == [("v3", True), ("v2", True)]
    given = both[0].case.options.given(hints=False)
    assert set(given) == KERNEL.features.options - {"vmem_limit_bytes", "sinks", "update_pages"}
    assert both[0].case.sinks == "heads"


def test_rows_are_long_with_any_heads() -> None:
    """Those of the checks but the one that is decoded, and steps of the workloads by their shapes."""
    for q_heads, kv_heads in ((32, 32), (32, 8), (64, 1)):
        geometry = Geometry(q_heads, kv_heads)
        most = tiles.default_tiles(request_for(q_heads=q_heads, kv_heads=kv_heads), tiles.CARDS["H100"]).decoded_tokens(
            request_for(q_heads=q_heads, kv_heads=kv_heads)
        )
        assert most < min(row.new for row in trial_steps.ROWS[:-1])
        for name, rows in trial_steps.WORKLOADS.items():
            case = geometry.workload(name, rows)
            assert case.num_tokens > case.num_rows * most


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.once
def test_a_right_kernel_passes_every_check() -> None:
    geometry = Geometry(4, 2, 32, 16, "float32")
    tried = [step for step in trial_steps.steps(xla.KERNEL, xla.KERNEL, geometry, False) if step.name.startswith("v")]
    assert len(tried) > 10
    for step in tried:
        assert step.run() == {"problem": None}, step.name


@pytest.mark.long
@pytest.mark.once
@pytest.mark.skipif(not_interpreted() is not None, reason=str(not_interpreted()))
@pytest.mark.parametrize("geometry", [Geometry(8, 2, 128, 32), Geometry(16, 1, 64, 256, "float16")])
def test_the_kernel_for_hopper_passes_every_check_interpreted(geometry: Geometry) -> None:
    """What is right must not be refused on a card for a fault of the steps."""
    beside = INTERPRETED.trial().beside
    tried = [step for step in trial_steps.steps(INTERPRETED, beside, geometry, False) if step.name.startswith("v")]
    assert len(tried) > 10
    for step in tried:
        assert step.run() == {"problem": None}, step.name


@pytest.mark.usefixtures("quick_to_compile")
def test_times_are_of_both_kernels_and_right_answers() -> None:
    class Wrong(xla.XlaKernel):
        name = "wrong"

        def forward(self, *call: Any) -> Any:
            attended = super().forward(*call)
            return attended._replace(output=1.5 * attended.output)

    geometry, wrong = Geometry(4, 2, 32, 16, "float32"), Wrong()

    def found(kernel: Any, beside: Any) -> dict[str, Any]:
        (step,) = [each for each in trial_steps.steps(kernel, beside, geometry, True) if each.name == "prompt-48"]
        return step.run()

    right = found(xla.KERNEL, xla.KERNEL)
    assert right["problem"] is None
    assert right["us"] > 0
    assert right["beside_us"] > 0
    assert found(wrong, xla.KERNEL)["problem"].startswith("wrong answer, off by up to ")
    assert found(xla.KERNEL, wrong)["problem"].startswith("wrong answer of wrong, off by up to ")


def test_what_is_wrong_is_said() -> None:
    batch = build_batch(case_named("mixed"), "v3")
    output, pages, lse = batch.expected_with_lse()
    right = KernelOutcome(output.astype(np.float32), pages, lse.astype(np.float32))
    assert trial_steps.what_is_wrong(batch, right) is None
    assert trial_steps.what_is_wrong(batch, dataclasses.replace(right, lse=None)) is None
    written = np.argwhere(batch.written_slots)[0]
    unwritten = pages.copy()
    unwritten[tuple(written)] = batch.pages[tuple(written)]
    at_padding, nan = right.output.copy(), right.output.copy()
    at_padding[-1], nan[0] = 1e-6, np.nan
    finite = np.where(np.isneginf(lse), -1e30, lse).astype(np.float32)
    for change, told in (
        ({"output": right.output * 1.5}, "wrong answer, off by up to "),
        ({"output": nan}, "wrong answer, off by up to nan"),
        ({"output": at_padding}, "wrong answer, tokens of no row are not zero"),
        ({"lse": lse.astype(np.float32) + 1}, "wrong logsumexp, off by up to 1"),
        ({"lse": finite}, "wrong logsumexp, off by up to inf"),
        ({"pages": unwritten}, "wrong pages after the call"),
    ):
        found = trial_steps.what_is_wrong(batch, dataclasses.replace(right, **change))
        assert found is not None
        assert found.startswith(told)


# The command.

TINY = ["--interpret", "--q-heads", "4", "--kv-heads", "2", "--head-dim", "64", "--page-size", "16"]


def test_kernels_are_tried_when_all_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(tune, "_tune", lambda console, kernel, *_: seen.append(f"tune {kernel.name}"))
    monkeypatch.setattr(tune, "_try", lambda console, kernel, *_, **__: seen.append(f"try {kernel.name}"))
    tune.run(Geometry(), interpret=True)
    assert seen == ["tune pallas_gpu", f"try {NAME}"]
    for name, wanted in (("pallas_gpu", "tune"), (NAME, "try")):
        seen.clear()
        tune.run(Geometry(), kernels=(name,), interpret=True)
        assert seen == [f"{wanted} {name}"]


def test_kernels_that_are_neither_tuned_nor_tried_are_refused() -> None:
    result = CliRunner().invoke(app, ["tune", "--kernel", "xla", "--kernel", NAME])
    assert result.exit_code == 2
    assert f"--kernel: got xla, wanted some of pallas_gpu, {NAME}." in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["tune", "--kernel", NAME])
    assert result.exit_code == 1
    assert f"what can be tuned or tried is {NAME} on gpu." in " ".join(result.output.split())


def test_why_a_kernel_is_not_tried_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error for one that is named on a machine, and none for one that is not."""
    seen: list[str] = []
    console: Any = type("Console", (), {"print": lambda self, text, **how: seen.append(text)})()
    small, how = Geometry(4, 2, 32, 16), {"named": False, "interpret": False}
    tune._try(console, KERNEL, KERNEL.trial(), small, **how)
    assert seen == [f"  {NAME} is not tried: runs on gpu, not on cpu"]
    with pytest.raises(CommandError, match=f"{NAME} does not take this: runs on gpu, not on cpu"):
        tune._try(console, KERNEL, KERNEL.trial(), small, **{**how, "named": True})
    assert list(cache.iterdir()) == []


def test_what_comes_of_it_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of compilers have brackets, which are no marks of a terminal's text."""
    outcomes: list[str | None] = ["v3 with sinks: INTERNAL: [/unknown] failed", None]
    monkeypatch.setattr(tune, "try_kernel", lambda *_: (Path("tried.json"), outcomes.pop(0)))
    for told in ("✗ {}: v3 with sinks: INTERNAL: [/unknown] failed; written to tried.json", "✓ {}: passed, written to"):
        kernel: Any = type("Any", (xla.XlaKernel,), {"name": "any"})()
        tune._try(Console(), kernel, KERNEL.trial(), Geometry(4, 2, 32, 16), named=False, interpret=False)
        assert told.format("any") in " ".join(capsys.readouterr().out.split())


@pytest.mark.once
def test_an_interpreted_trial_from_end_to_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command, in the process that a card's trial has. Where the interpreter is missing it says so."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    result = CliRunner().invoke(app, ["tune", "--kernel", NAME, *TINY])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    reason = INTERPRETED.facts()["reason"]
    if reason is not None:
        assert f"{NAME} is not tried: {reason}" in text
        assert list(cache.iterdir()) == []
        return
    assert f"✓ {NAME}: passed, written to " in text
    (name,) = [path.name for path in cache.iterdir()]
    content = json.loads((cache / name).read_text(encoding="utf-8"))
    assert (name, content["format"]) == (verdicts.file().name, verdicts.FORMAT)
    ((key, entry),) = content["entries"].items()
    assert key == "interpreter head_dim=64 group=2 page_size=16 queries=bfloat16 compute=bfloat16 cache=bfloat16"
    assert entry["checked"] == ["v3 with every option"]
    assert entry["timed"]["prompt-48"].keys() == {"us", "beside_us"}
    assert (entry["passed"], entry["made_with"]) == (True, verdicts.made_with())


def test_all_kernels_are_timed_but_those_that_run_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """``bench`` measures in its own process, which one that was never tried might stop for good."""

    class Untried(xla.XlaKernel):
        name = "untried"

        def only_by_name(self, request: AttentionRequest) -> str | None:
            return "it has not been tried"

    monkeypatch.setitem(select.BUILT_IN, Untried.name, Untried())
    monkeypatch.setattr(contestants, "Candidate", lambda problem, name: name)
    problem = build(Geometry(4, 2, 32, 16, "float32").workload("few", (Row(20, 4),)), "v3")
    everyone: dict[str, Any] = {each.label: each for each in bench._contestants((), True, (), False)}
    assert everyone["xla"].enter(problem) == "xla"
    told = "untried runs only by name: it has not been tried. To time it, name it with --kernel."
    with pytest.raises(Unsupported, match=told):
        everyone["untried"].enter(problem)
    named: Any = bench._contestants(("untried",), False, (), False)[0]
    assert named.enter(problem) == "untried"
