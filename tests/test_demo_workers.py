"""Tokenizer processes of the demo end in any case, with a stand-in for EasyDeL's manager."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from easydel_ragged_plugin import interrupt
from easydel_ragged_plugin.demo import workers as workers_module

LIMIT_S = 300.0
"""What nothing here takes, so that a fault ends a test, and not the run."""


class Manager:
    """EasyDeL's, as far as :class:`workers_module.Workers` uses it: its processes sleep."""

    fails = False
    hangs = False
    waits = False

    def __init__(self, model: str, *, startup_timeout: float) -> None:
        self.tokenizer_endpoint = self.detokenizer_endpoint = None
        self.stopped: list[bool] = []

    def start(self, **options: object) -> None:
        folder = Path(options_folder[0])
        for name in ("tokenizer", "detokenizer"):
            endpoint = f"ipc://{folder / name}"
            command = [sys.executable, "-c", "import time; time.sleep(600)", name, "--endpoint", endpoint]
            process = subprocess.Popen(command)
            setattr(self, f"_{name}_process", process)
            folder.joinpath(name).touch()
            while self.waits:
                if process.poll() is not None:
                    raise RuntimeError("ended")
                time.sleep(0.01)
            if self.fails and name == "detokenizer":
                process.kill()
                self._detokenizer_process = None
                raise TimeoutError("too slow")
            setattr(self, f"{name}_endpoint", endpoint)

    def shutdown(self) -> None:
        """As EasyDeL's, it forgets a process before that has ended."""
        self.stopped.append(any(getattr(call, "__self__", None) in made for call in interrupt.at_leaving))
        if self.hangs:
            time.sleep(600)
        self._tokenizer_process = self._detokenizer_process = None


options_folder: list[str] = []
made: list[workers_module.Workers] = []


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., workers_module.Workers]]:
    """Makes :class:`workers_module.Workers` with a :class:`Manager`; what is left at the end is killed."""
    module = "easydel.workers.esurge.pipeline.worker_manager"
    monkeypatch.setattr(workers_module, "SHUTDOWN_S", 0.3)
    options_folder[:] = [str(tmp_path)]

    def make(**flags: bool) -> workers_module.Workers:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(WorkerManager=type("Manager", (Manager,), flags)))
        made.append(workers_module.Workers("model"))
        return made[-1]

    yield make
    for each in made:
        each._kill()
        with contextlib.suppress(ValueError):
            interrupt.at_leaving.remove(each._kill)
    made.clear()


def _nothing_left(workers: workers_module.Workers, folder: Path) -> bool:
    ended = all(process.returncode is not None for process in workers._known)
    return ended and not list(folder.iterdir()) and workers._kill not in interrupt.at_leaving


@pytest.mark.parametrize("hangs", [False, True])
def test_tokenizer_processes_are_ended(hangs: bool, workers: Any, tmp_path: Path) -> None:
    made = workers(hangs=hangs)
    assert made.endpoints["detokenizer_endpoint"] == f"ipc://{tmp_path / 'detokenizer'}"
    assert made._kill in interrupt.at_leaving
    made.close()
    assert made._manager.stopped == [True]  # a Ctrl-C meanwhile would have killed them
    assert len(made._known) == 2
    assert _nothing_left(made, tmp_path)
    made.close()  # does nothing
    assert made._manager.stopped == [True]


def test_a_tokenizer_process_that_has_ended_is_not_asked(workers: Any, tmp_path: Path) -> None:
    made = workers()
    assert made.endpoints
    made._manager._detokenizer_process.kill()
    made._manager._detokenizer_process.wait(timeout=LIMIT_S)
    made.close()
    assert not made._manager.stopped
    assert _nothing_left(made, tmp_path)


def test_tokenizer_processes_whose_start_fails_are_ended(workers: Any, tmp_path: Path) -> None:
    made = workers(fails=True)
    with pytest.raises(TimeoutError, match="too slow"):
        made.endpoints  # noqa: B018
    (tmp_path / "detokenizer").unlink()  # EasyDeL does so
    made.close()
    assert _nothing_left(made, tmp_path)


def test_tokenizer_processes_are_ended_while_they_start(workers: Any, tmp_path: Path) -> None:
    made = workers(waits=True)
    made.close()
    assert len(made._known) == 1
    assert _nothing_left(made, tmp_path)
    with pytest.raises(RuntimeError, match="ended"):
        made.endpoints  # noqa: B018


def test_leaving_kills_tokenizer_processes(workers: Any, tmp_path: Path) -> None:
    made = workers()
    assert made.endpoints
    made._kill()
    assert [process.returncode for process in made._known] == [-signal.SIGKILL] * 2
    assert not list(tmp_path.iterdir())
