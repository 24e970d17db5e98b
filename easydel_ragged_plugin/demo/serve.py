"""``easydel-ragged demo --serve``: EasyDeL's OpenAI-compatible server on this package's operation, and a page for it.

The server is EasyDeL's own application, run by uvicorn, which EasyDeL requires. Two addresses are added to it: ``/`` is
the page (``chat.html``), ``/about`` says what it shows of the server.
"""

from __future__ import annotations

import base64
import contextlib
import contextvars
import dataclasses
import errno
import functools
import hashlib
import importlib
import inspect
import json
import shlex
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from importlib import resources
from typing import Any

from rich.console import Console

from easydel_ragged_plugin import host
from easydel_ragged_plugin.interrupt import leave
from easydel_ragged_plugin.terminal import CommandError

from .engine import Engine

__all__ = ["About", "OwnPagesOnly", "application", "listen", "serve"]

STOP_S = 10.0
"""How long a stop waits for answers that are on their way. They are cut short, so it takes less than a second."""

CONNECTIONS_S = 3
"""How long a stop waits for clients that do not close their connections."""

CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "script-src '{script}'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load, run and reach: nothing but its script and this server."""

HERE = ("localhost", "127.0.0.1", "[::1]")
"""Names that this machine has for itself, as a ``Host`` header has them."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For a model that has none: the texts alone, a line each."""


@dataclasses.dataclass(frozen=True)
class About:
    """What the page and the command say of the server.

    Attributes:
        model: its name in requests.
        kernel: kernels of this package that answer, or that EasyDeL's own class does.
        operation: module and name of the class that calls them.
        context: tokens of the longest conversation, the answer included. EasyDeL keeps a few of the engine's back.
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
        context = engine.settings.max_model_len - engine.esurge.reserve_tokens
        return cls(model, kernel, engine.operation, context, f"EasyDeL {host.host_version()}")


def listen(host_name: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine; port 0 takes any that is free.

    Clients that come before the server is ready wait.

    Raises:
        CommandError: it can't be had. The text says why, and what to give.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:  # the second where no host can have such a name
        reason = error.strerror if isinstance(error, OSError) else "not a name of a host"
        raise CommandError(
            f"--host {host_name}: no such address: {reason}. Give 127.0.0.1 for this machine alone, or "
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


class _Producer:
    """The thread of EasyDeL that runs one streamed answer.

    Attributes:
        started: whether it was asked to begin.
        ended: set when the engine has ended the answer.
    """

    def __init__(self) -> None:
        self.started = False
        self.ended = threading.Event()

    def run(self, stream: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        try:
            yield from stream()
        finally:
            self.ended.set()


_producer: contextvars.ContextVar[_Producer] = contextvars.ContextVar("_producer")
"""Of the request that a task of the event loop answers."""


def _server_class() -> type:
    """EasyDeL's server, which ends a streamed answer whose reader has gone."""
    return _ends_unread(importlib.import_module("easydel.inference.esurge.server").eSurgeApiServer)


def _ends_unread(base: Any) -> type:
    """A subclass of EasyDeL's server that ends the answers that nobody reads.

    EasyDeL looks for that between two tokens, but its handler is canceled before; then the engine goes on, unread,
    until the context is full.
    """

    def start_stream_task(self: Any, stream_fn: Callable[[], Iterator[Any]]) -> Any:
        producer = _producer.get(_Producer())
        producer.started = True
        return base._start_stream_task(self, lambda: producer.run(stream_fn))

    handlers = ("chat_completions", "completions", "responses")
    replaced: dict[str, Any] = {name: _ends_with_its_reader(getattr(base, name)) for name in handlers}
    return type("Server", (base,), {**replaced, "_start_stream_task": start_stream_task})


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
    producer = _Producer()
    _producer.set(producer)
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    finally:
        if producer.started and not producer.ended.is_set():
            # In a thread: it waits for the engine, and others read meanwhile.
            threading.Thread(target=_abort, args=(engine, request_id, producer.ended), daemon=True).start()


def _abort(engine: Any, request_id: str, ended: threading.Event) -> None:
    """End one answer, also one that the scheduler does not have yet."""
    while not ended.is_set():
        with contextlib.suppress(Exception):  # EasyDeL tells its log
            engine.abort_request(request_id)
        ended.wait(0.1)


class OwnPagesOnly:
    """An ASGI application that refuses what pages of other sites send.

    A browser lets any page send requests to this machine, and, where that page's own name leads here, read the answers.

    Args:
        app: what answers the others.
        names: under which this server is reached, as ``Host`` headers have them, without port.
    """

    def __init__(self, app: Any, names: Collection[str]) -> None:
        self.app = app
        self.names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        reason = None if scope["type"] == "lifespan" else self._reason(dict(scope["headers"]))
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})

    def _reason(self, headers: dict[bytes, bytes]) -> str | None:
        """Why a request is refused; None where it is not."""
        host_header, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        name, _, port = host_header.rpartition(":")
        if (name if name and port.isdecimal() else host_header).lower() not in self.names:
            return f"Host {host_header!r}: wanted one of {', '.join(sorted(self.names))}. --host names another one."
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host_header:
            return f"Origin {origin.decode('latin-1')!r}: pages of other sites may not call this server."
        return None


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
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = CONTENT_POLICY.format(script=f"sha256-{digest}")
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
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


def others(listening: socket.socket) -> str | None:
    """``http://...`` for other machines, where :func:`address` is for this one alone; None where they are equal."""
    name, port = listening.getsockname()[:2]
    return f"http://{socket.gethostname()}:{port}" if name in ("0.0.0.0", "::") else None


def example(url: str, model: str) -> str:
    """A command for a shell that asks the server."""
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    body = shlex.quote(json.dumps(question))
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {body}"


def serve(
    console: Console, engine: Engine, about: About, listening: socket.socket, host_name: str
) -> Callable[[], None]:
    """Answer until Ctrl-C or SIGTERM.

    Args:
        host_name: under which the server is reached, beside :data:`HERE`.

    Returns:
        Cuts short what is on its way, and waits for the server's end.
    """
    uvicorn = importlib.import_module("uvicorn")
    app = application(engine, about).app
    if not everyone(listening):
        app = OwnPagesOnly(app, (*HERE, f"[{host_name}]" if ":" in host_name else host_name))
    # In a thread, uvicorn leaves Ctrl-C to us. Its lines about each request would fill the log.
    config = uvicorn.Config(
        app, lifespan="on", log_level="warning", access_log=False, timeout_graceful_shutdown=CONNECTIONS_S
    )
    server = uvicorn.Server(config)
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
            _show(console, listening, about)
        while not ended.wait(1.0):
            pass
    except KeyboardInterrupt:
        server.should_exit = True
        return functools.partial(_end_answers, engine, ended)
    raise RuntimeError("EasyDeL's server has ended by itself. Run it with --verbose: its log says why.")


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


def _show(console: Console, listening: socket.socket, about: About) -> None:
    def show(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    url, elsewhere = address(listening), others(listening)
    show(f"page       {url}/")
    if elsewhere:
        show(f"           {elsewhere}/ from other machines, or this machine's address in place of its name")
    show(f"API        {url}/v1, as OpenAI's; model {about.model}")
    show(f"operation  {about.operation}")
    show(f"kernel     {about.kernel}")
    show(f"context    {about.context} tokens, answer included")
    if everyone(listening):
        console.print("[yellow]note:[/yellow] whoever reaches this machine may use it: there is no key.")
    show(f"\n{example(url, about.model)}\n\nCtrl-C ends it.")
