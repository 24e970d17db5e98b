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

__all__ = ["INTERRUPTED", "at_leaving", "error_output", "interruptible", "leave"]

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
def interruptible(*, at_once: bool) -> Iterator[None]:
    """Let Ctrl-C end the process while XLA compiles or computes, too.

    Python looks at signals between two steps of its own, and one that is a call of XLA takes minutes. So a thread
    listens. Where Ctrl-C is somebody else's (another handler, none as under ``nohup``, another thread than the main
    one), nothing changes.

    Args:
        at_once: the first Ctrl-C ends the process: nothing has to be put in order. Otherwise the first one raises
            KeyboardInterrupt, as always, and the second one ends the process.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield
        return
    listening, signaling = socket.socketpair()
    signaling.setblocking(False)

    def listen() -> None:
        count = 0
        while received := listening.recv(16):
            count += received.count(signal.SIGINT)
            if count > (0 if at_once else 1):
                time.sleep(0.5)  # the main thread is first, if it is free
                leave()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    if at_once:
        signal.signal(signal.SIGINT, lambda number, frame: leave())
    descriptor = signal.set_wakeup_fd(signaling.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        signaling.close()
        thread.join()
        listening.close()
