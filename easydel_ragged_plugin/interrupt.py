"""Ctrl-C: what it ends, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["INTERRUPTED", "at_leaving", "ends_like_ctrl_c", "error_output", "interruptible", "leave"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

error_output = 2
"""Descriptor of the error stream, also while ``terminal.hushed`` leads descriptor 2 elsewhere."""


at_leaving: list[Callable[[], object]] = []
"""What :func:`leave` calls before it ends the process: quick, from any thread, and without a lock of another one."""


def leave() -> None:
    """End the process at once, as after Ctrl-C, without Python's own way out.

    JAX may be at work in threads of its own, or half way through a program. Taking its objects down then crashes.
    """
    if threading.current_thread() is threading.main_thread():  # another one would wait for it
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # in use by the very code that was interrupted, or closed
                stream.flush()
    for call in at_leaving:
        with contextlib.suppress(Exception):
            call()
    # Without the line that a progress bar is drawn in, and with the cursor that it hides.
    clean = "\r\x1b[2K\x1b[?25h" if os.isatty(error_output) else ""
    with contextlib.suppress(OSError):
        os.write(error_output, f"{clean}interrupted\n".encode())
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def ends_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, too: what supervisors send, and otherwise nothing would be put in order.

    Enter it before :func:`interruptible`, which then counts both.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible(*, at_once: bool) -> Iterator[None]:
    """Let Ctrl-C end the process while XLA compiles or computes, too.

    Python looks at signals between two steps of its own, and one that is a call of XLA takes minutes. So a thread
    listens. Where Ctrl-C is somebody else's (another handler, none as under ``nohup``, another thread than the main
    one), nothing changes. SIGTERM counts as Ctrl-C where it has the same handler (:func:`ends_like_ctrl_c`).

    Args:
        at_once: the first Ctrl-C ends the process: nothing has to be put in order. Otherwise the first one raises
            KeyboardInterrupt, as always, and the second one ends the process.
    """
    handler = signal.default_int_handler
    ending = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread() or signal.SIGINT not in ending:
        yield
        return
    listening, signaling = socket.socketpair()
    signaling.setblocking(False)

    def listen() -> None:
        count = 0
        while received := listening.recv(16):
            count += sum(received.count(number) for number in ending)
            if count > (0 if at_once else 1):
                time.sleep(0.5)  # the main thread is first, if it is free
                leave()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    if at_once:
        for number in ending:
            signal.signal(number, lambda number, frame: leave())
    descriptor = signal.set_wakeup_fd(signaling.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number in ending:
            signal.signal(number, handler)
        signaling.close()
        thread.join()
        listening.close()
