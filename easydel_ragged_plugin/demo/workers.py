"""The tokenizer processes of EasyDeL's engine, which it calls workers: started once, and ended in any case."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import threading
from typing import Any

from easydel_ragged_plugin.interrupt import at_leaving

__all__ = ["Workers"]

SHUTDOWN_S = 10.0
"""How long tokenizer processes may take to end by themselves. They are killed then."""


class Workers:
    """The host's two tokenizer processes, started once and shared by engines.

    Importing their libraries takes longer than anything they do, and an engine that owns its processes leaves
    them behind unless they are shut down.
    """

    def __init__(self, model: str) -> None:
        manager = importlib.import_module("easydel.workers.esurge.pipeline.worker_manager").WorkerManager
        # The default of 30 s in EasyDeL 0.2.0.2 is short for a loaded machine.
        self._manager = manager(model, startup_timeout=300.0)
        self._error: BaseException | None = None
        self._known: list[Any] = []
        # Not the thread itself is waited for: Python 3.11 takes one for ended when Ctrl-C comes meanwhile.
        self._started = threading.Event()
        at_leaving.append(self._kill)
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        # Terminals send Ctrl-C to them, too, and supervisors SIGTERM. They would end at once, and EasyDeL wait for
        # their answer for ever. A SIGTERM that ends this process at once has to end them, too.
        if hasattr(signal, "pthread_sigmask"):
            handled = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
            blocked = {signal.SIGINT, signal.SIGTERM} if handled else {signal.SIGINT}
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # of this thread, and of processes that it starts
        try:
            self._manager.start(detokenizer_max_states=1 << 12, tokenizer_endpoint=None, detokenizer_endpoint=None)
        except BaseException as error:  # raised again where the endpoints are read
            self._error = error
        finally:
            self._started.set()

    @property
    def endpoints(self) -> dict[str, str]:
        """Arguments of the engine that make it use these processes; waits until they answer."""
        self._started.wait()
        if self._error is not None:
            raise self._error
        return {
            "tokenizer_endpoint": self._manager.tokenizer_endpoint,
            "detokenizer_endpoint": self._manager.detokenizer_endpoint,
        }

    def _processes(self) -> list[Any]:
        """Those that were started, also where the manager has forgotten them: it does so before they have ended."""
        for name in ("tokenizer", "detokenizer"):
            process = getattr(self._manager, f"_{name}_process", None)
            if process is not None and process not in self._known:
                self._known.append(process)
        return self._known

    def _kill(self) -> None:
        """End the processes at once, and remove their sockets. Those that have ended are left alone."""
        processes = list(self._processes())
        for process in processes:
            process.kill()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
            endpoint = process.args[process.args.index("--endpoint") + 1]  # the manager's own comes later
            with contextlib.suppress(OSError):
                os.unlink(endpoint.removeprefix("ipc://"))

    def close(self) -> None:
        """End the processes, also while they start, and remove their sockets. A second call does nothing."""
        while not self._started.wait(0.1):
            self._kill()
        if self._kill not in at_leaving:
            return
        if self._error is None and all(process.poll() is None for process in self._processes()):
            # In a thread: it waits for ever for one that ends meanwhile.
            stopping = threading.Event()

            def shutdown() -> None:
                try:
                    self._manager.shutdown()
                finally:
                    stopping.set()

            threading.Thread(target=shutdown, daemon=True).start()
            stopping.wait(SHUTDOWN_S)
        self._kill()
        at_leaving.remove(self._kill)  # last: a second Ctrl-C comes while this waits

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
