"""``easydel-ragged demo --serve``: EasyDeL's OpenAI-compatible server on this package's operation, and a page for it.

The server is EasyDeL's own application, run by uvicorn, which EasyDeL requires. Two addresses are added to it: ``/`` is
the page (``chat.html``), ``/about`` says what it shows of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import inspect
import json
import shlex
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from typing import Any

from rich.console import Console

from easydel_ragged_plugin import host
from easydel_ragged_plugin.interrupt import leave
from easydel_ragged_plugin.terminal import CommandError

from .engine import Engine

__all__ = ["About", "application", "listen", "serve"]

STOP_S = 10.0
"""How long a stop waits for answers that are on their way. They are cut short, so it takes less than a second."""

CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load and reach: nothing but this server."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For a model that has none: the texts alone, a line each."""


@dataclasses.dataclass(frozen=True)
class About:
    """What the page and the command say of the server.

    Attributes:
        model: its name in requests.
        kernel: kernels of this package that answer, or that EasyDeL's own class does.
        operation: module and name of the class that calls them.
        context: tokens of the longest conversation, the answer included.
        host: EasyDeL and its version.
    """

    model: str
    kernel: str
    operation: str
    context: int
    host: str

    @classmethod
    def of(cls, engine: Engine, model: str, kernel: str) -> About:
        """Of a running engine, by the name that ``model`` has in requests."""
        return cls(model, kernel, engine.operation, engine.settings.max_model_len, f"EasyDeL {host.host_version()}")


def listen(host_name: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine; port 0 takes any that is free.

    Clients that come before the server is ready wait.

    Raises:
        CommandError: it can't be had. The text says why, and what to give.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError(
            f"--host {host_name}: no such address: {error.strerror}. Give 127.0.0.1 for this machine alone, or "
            "0.0.0.0 for all that reach it."
        ) from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise CommandError(f"--host {host_name} --port {port}: {_refusal(error)}") from error


def _refusal(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there. Give another port, or 0 for any that is free."
    if error.errno == errno.EACCES:
        return "the system allows it to administrators alone. Give a port from 1024, or 0 for any that is free."
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address. Give 127.0.0.1 for this machine alone, or 0.0.0.0 for all."
    return f"can't listen there: {error.strerror or error}. Give another host or port."


def _server_class() -> type:
    """EasyDeL's server, which ends a streamed answer whose reader has gone.

    EasyDeL looks for that between two tokens, but its handler is canceled before; then the engine goes on, unread,
    until the context is full.
    """
    base = importlib.import_module("easydel.inference.esurge.server").eSurgeApiServer
    handlers = ("chat_completions", "completions", "responses")
    return type("Server", (base,), {name: _ends_with_its_reader(getattr(base, name)) for name in handlers})


def _ends_with_its_reader(handler: Any) -> Any:
    @functools.wraps(handler)
    async def handle(self: Any, request: Any, raw_request: Any) -> Any:
        response = await handler(self, request, raw_request)
        if hasattr(response, "body_iterator"):
            (engine,) = self.esurge_map.values()
            response.body_iterator = _read(response.body_iterator, engine, response.headers["X-Request-ID"])
        return response

    # FastAPI makes of it what it parses, and looks for names that it does not know in the wrong module.
    handle.__signature__ = inspect.signature(handler, eval_str=True)  # type: ignore[attr-defined]
    return handle


async def _read(chunks: Any, engine: Any, request_id: str) -> AsyncIterator[Any]:
    finished = False
    try:
        async for chunk in chunks:
            yield chunk
        finished = True
    finally:
        if not finished:
            engine.abort_request(request_id)


def application(engine: Engine, about: About) -> Any:
    """EasyDeL's server for one model, with the page: its attribute ``app`` is an application of FastAPI.

    The tokenizer gets :data:`CHAT_TEMPLATE` where it has no template.
    """
    if not engine.tokenizer.chat_template:
        engine.tokenizer.chat_template = CHAT_TEMPLATE
    server = _server_class()(
        {about.model: engine.esurge},
        enable_persistence=False,  # no keys, and no file for them in the user's home
        enable_audit_logging=False,
        enable_cors=False,  # pages of other origins have no business here
        max_concurrent_generations=0,  # requests wait for their turn; the limiter breaks the streams of those above it
    )
    html = importlib.import_module("fastapi.responses").HTMLResponse
    page = resources.files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": CONTENT_POLICY, "Referrer-Policy": "no-referrer"}
    server.app.add_api_route(
        "/", lambda: html(page, headers=headers), response_model=None, summary="A page to talk to the model."
    )
    said = dataclasses.asdict(about)
    server.app.add_api_route("/about", lambda: said, response_model=None, summary="What answers: model and kernel.")
    return server


def address(listening: socket.socket) -> str:
    """``http://...`` of a socket, as a browser on this machine takes it."""
    name, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def everyone(listening: socket.socket) -> bool:
    """Whether other machines reach a socket."""
    name = listening.getsockname()[0]
    return not (name.startswith("127.") or name == "::1")


def example(url: str, model: str) -> str:
    """A command for a shell that asks the server."""
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    body = shlex.quote(json.dumps(question))
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {body}"


@contextlib.contextmanager
def ends_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, too: what supervisors send, and otherwise nothing would be put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(console: Console, engine: Engine, about: About, listening: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM, then cut short what is on its way, and return."""
    uvicorn = importlib.import_module("uvicorn")
    app = application(engine, about).app
    # In a thread, uvicorn leaves Ctrl-C to us. Its lines about each request would fill the log.
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False))
    # Not the thread itself is waited for: Python 3.11 takes one for ended when Ctrl-C comes meanwhile.
    ended = threading.Event()

    def run() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            ended.set()

    threading.Thread(target=run, name="server", daemon=True).start()
    try:
        while not server.started and not ended.wait(0.05):
            pass
        if server.started:
            _show(console, address(listening), about, for_everyone=everyone(listening))
        while not ended.wait(1.0):
            pass
    except KeyboardInterrupt:
        server.should_exit = True
        _end_answers(engine, ended)
        return
    raise RuntimeError("EasyDeL's server has ended by itself")


def _end_answers(engine: Engine, ended: threading.Event) -> None:
    """Let a server that shall end do so: EasyDeL waits for the threads of its answers.

    Where it does not, the process ends at once: nothing can be put in order.
    """

    def abort() -> None:  # in a thread: without a tokenizer process, which somebody may have ended, it waits for ever
        while not ended.wait(0.1):
            engine.abort()  # also those that have just come

    threading.Thread(target=abort, daemon=True).start()
    if not ended.wait(STOP_S):
        leave()


def _show(console: Console, url: str, about: About, *, for_everyone: bool) -> None:
    def show(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    show(f"page       {url}/")
    show(f"API        {url}/v1, as OpenAI's; model {about.model}")
    show(f"operation  {about.operation}")
    show(f"kernel     {about.kernel}")
    if for_everyone:
        console.print("[yellow]note:[/yellow] whoever reaches this machine may use it: there is no key.")
    show(f"\n{example(url, about.model)}\n\nCtrl-C ends it.")
