"""``demo --serve``, and the server and the client of docs/serving.md, with a tiny model made on the spot."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import invoke

from easydel_ragged_plugin import host, interrupt
from easydel_ragged_plugin.demo import model, run, serve
from easydel_ragged_plugin.demo.serve import About
from easydel_ragged_plugin.terminal import CommandError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "easydel_ragged_plugin" / "demo" / "chat.html"
ABOUT = About("tiny", "cpu_native", "package.Operation", 64, "EasyDeL 0.0.0")
PROMPT = "w11 w12 w13"
MAX_TOKENS = 8

LIMIT_S = 300.0
"""What nothing here takes, so that a fault ends a test, and not the run."""

CONTEXT = 64
LONGEST = 76
"""Tokens of the served model's conversations: what is asked for, and what whole pages make of it."""

WORD = re.compile(r"w\d+")
"""A token of the tiny model."""

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes")


# The command, without a model


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: [])
    monkeypatch.setattr(host, "host_version", lambda: "0.3.0")
    monkeypatch.setattr(run, "prepare_model", lambda console, name: pytest.fail("too late"))
    monkeypatch.setenv(model.CACHE_VARIABLE, str(tmp_path))
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = invoke("demo", "--serve", "--port", str(port))
    assert result.exit_code == 2
    expected = f"error: --host 127.0.0.1 --port {port}: another program listens there. Give another port, or 0 for any"
    assert result.output == f"{expected} that is free.\n"


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        (
            "nowhere.invalid",
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known",
        ),
        ("a..b", None, "not a name of a host"),  # Python itself refuses it
    ],
)
def test_a_name_that_is_none(name: str, error: OSError | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: object, **options: object) -> None:
        assert error is not None
        raise error

    if error is not None:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(CommandError) as caught:
        serve.listen(name, 0)
    assert str(caught.value) == (
        f"--host {name}: no such address: {reason}. Give 127.0.0.1 for this machine alone, or 0.0.0.0 for all that "
        "reach it."
    )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EADDRNOTAVAIL, "this machine has no such address. Give 127.0.0.1 for this machine alone, or 0.0.0.0"),
        (errno.EACCES, "the system allows it to administrators alone. Give a port from 1024, or 0 for any that"),
        (errno.ENOBUFS, f"can't listen there: {os.strerror(errno.ENOBUFS)}. Give another host or port."),
    ],
)
def test_an_address_that_is_refused(number: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_server(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(CommandError, match=f"^--host 127.0.0.1 --port 80: {re.escape(message)}"):
        serve.listen("127.0.0.1", 80)


@pytest.mark.parametrize("option", [("--compare",), ("--repeats", "5"), ("--prompt", "Why?"), ("--max-tokens", "64")])
def test_options_that_the_server_has_no_use_for(option: tuple[str, ...]) -> None:
    result = invoke("demo", "--serve", *option)
    assert result.exit_code == 2
    expected = f"error: {option[0]} does not go with --serve: each request says what it wants. Leave it out, or leave"
    assert result.output == f"{expected} --serve out.\n"


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("--host", "127.0.0.1", "--serve"),
        ("--port", "0", "--serve"),
        ("--context", "64", "--serve"),
        ("--repeats", "3", "--compare"),
    ],
)
def test_options_that_need_another_one(option: str, value: str, needed: str) -> None:
    result = invoke("demo", option, value)
    assert result.exit_code == 2
    assert result.output == f"error: {option} goes with {needed} alone. Leave it out, or add {needed}.\n"


def test_a_host_whose_streams_have_gaps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: [])
    monkeypatch.setattr(run, "listen", lambda host, port: pytest.fail("too late"))
    monkeypatch.setattr(host, "host_version", lambda: "0.2.0.2")
    result = invoke("demo", "--serve")
    assert result.exit_code == 2
    assert result.output.startswith(
        "error: --serve needs EasyDeL 0.3.0 or newer: the server of 0.2.0.2 leaves words out"
    )
    for version, whole in (("0.3.0", True), ("0.10.1rc1", True), ("1.0", True), ("0.2.9", False), (None, True)):
        monkeypatch.setattr(host, "host_version", lambda version=version: version)
        assert host.streams_whole_answers() == whole


def test_what_is_printed_and_shown() -> None:
    with serve.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert serve.address(listening) == f"http://127.0.0.1:{port}"
        assert serve.others(listening) is None
        assert not serve.everyone(listening)
    with serve.listen("0.0.0.0", 0) as listening:
        port = listening.getsockname()[1]
        assert serve.address(listening) == f"http://127.0.0.1:{port}"
        assert serve.others(listening) == f"http://{socket.gethostname()}:{port}"
        assert serve.everyone(listening)
    command = shlex.split(serve.example("http://127.0.0.1:1", "it's"))
    assert command[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == "it's"


def test_the_servers_settings() -> None:
    config = SimpleNamespace(max_position_embeddings=1000)
    # Whole pages, with 4 tokens that EasyDeL keeps back.
    assert run._server_settings(config, 300, 128, "float32").max_model_len == 384
    assert run._server_settings(config, 380, 128, "float32").max_model_len == 384
    assert run._server_settings(config, 381, 128, "float32").max_model_len == 512
    assert run._server_settings(config, 892, 128, "float32").max_model_len == 896
    assert run._server_settings(config, None, 128, "float32").max_model_len == 896
    assert run._server_settings(SimpleNamespace(), 4096, 128, "float32").max_model_len == 4224
    assert run._server_settings(SimpleNamespace(), None, 128, "float32").max_model_len == 2176
    with pytest.raises(CommandError) as caught:
        run._server_settings(config, 893, 128, "float32")
    assert str(caught.value) == (
        "--context 893: the model has 1000 positions, of which pages of 128 tokens and the 4 tokens that EasyDeL "
        "keeps back leave 892. Give at most 892."
    )
    with pytest.raises(CommandError, match=r"^--page-size 1024: the model has 1000 positions. Give a smaller page.$"):
        run._server_settings(config, None, 1024, "float32")
    assert run._name("owner/name") == "owner/name"
    assert run._name("./models/") == "models"


class Base:
    """Of EasyDeL's server, what makes streams: their producers are threads."""

    def __init__(self, engine: Any) -> None:
        self.esurge_map = {"tiny": engine}

    def _start_stream_task(self, stream: Callable[[], Iterator[str]]) -> asyncio.Queue[str | None]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def produce() -> None:
            for chunk in itertools.chain(stream(), [None]):
                with contextlib.suppress(RuntimeError):  # the loop may have ended
                    loop.call_soon_threadsafe(queue.put_nowait, chunk)

        threading.Thread(target=produce, daemon=True).start()
        return queue

    async def chat_completions(self, request: object, raw_request: object) -> Any:
        (engine,) = self.esurge_map.values()

        async def chunks() -> AsyncIterator[str]:
            try:
                queue = self._start_stream_task(engine.stream)
                while (chunk := await queue.get()) is not None:
                    yield chunk
            finally:
                engine.closed = True

        return SimpleNamespace(body_iterator=chunks(), headers={"X-Request-ID": "a request"})

    completions = responses = chat_completions


class Streaming:
    """Of an engine: an answer of two parts, and between them what ends it, where it shall."""

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole
        self.closed = False
        self.aborted: list[str] = []
        self.ended = threading.Event()

    def stream(self) -> Iterator[str]:
        yield "one"
        # The first one finds no request: the scheduler has none yet.
        while not self.whole and len(self.aborted) < 2:
            time.sleep(0.01)
        self.ended.set()
        yield "two"

    def abort_request(self, name: str) -> None:
        self.aborted.append(name)
        if len(self.aborted) == 1:
            raise RuntimeError("as where a tokenizer process has gone")


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_whose_reader_goes_is_ended(whole: bool) -> None:
    streaming = Streaming(whole=whole)

    async def read() -> list[str]:
        response = await serve._ends_unread(Base)(streaming).chat_completions(None, None)
        found = []
        async for chunk in response.body_iterator:
            found.append(chunk)
            if not whole:
                await response.body_iterator.aclose()
                break
        assert streaming.closed
        return found

    assert asyncio.run(read()) == (["one", "two"] if whole else ["one"])
    assert streaming.ended.wait(LIMIT_S)
    time.sleep(0.3)
    assert streaming.aborted == ([] if whole else ["a request"] * 2)


def test_an_answer_that_was_never_begun_needs_no_end() -> None:
    streaming = Streaming(whole=True)

    async def read() -> None:
        response = await serve._ends_unread(Base)(streaming).chat_completions(None, None)
        await response.body_iterator.aclose()

    asyncio.run(read())
    assert not streaming.aborted


OWN, OTHER = "127.0.0.1:8000", "evil.example:8000"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"host": OWN}, None),
        ({"host": OWN, "origin": f"http://{OWN}"}, None),
        ({"host": "LocalHost"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "given:1"}, None),
        ({"host": OTHER}, "Host 'evil.example:8000': wanted one of 127.0.0.1, [::1], given, localhost. --host names"),
        ({"host": "127.0.0.1.evil.example"}, "Host '127.0.0.1.evil.example': wanted one of "),
        ({}, "Host '': wanted one of "),
        ({"host": OWN, "origin": f"http://{OTHER}"}, "Origin 'http://evil.example:8000': pages of other sites may not"),
        ({"host": OWN, "origin": "http://127.0.0.1:9000"}, "Origin 'http://127.0.0.1:9000': pages of other"),
        ({"host": OWN, "origin": "null"}, "Origin 'null': pages of other sites"),
    ],
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], message: str | None) -> None:
    sent: list[dict[str, Any]] = []

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    async def app(scope: object, receive: object, send: Callable[..., Any]) -> None:
        await send({"type": "answered"})

    guarded = serve.OwnPagesOnly(app, (*serve.HERE, "given"))
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    asyncio.run(guarded({"type": "http", "headers": raw}, None, send))
    asyncio.run(guarded({"type": "websocket", "headers": raw}, None, send))
    asyncio.run(guarded({"type": "lifespan"}, None, send))
    if message is None:
        assert sent == [{"type": "answered"}] * 3
        return
    assert [event.get("status") or event.get("code") for event in sent] == [403, None, 1008, None]
    assert json.loads(sent[1]["body"])["detail"].startswith(message)


# Signals, and the tokenizer processes

BUSY = """
import hashlib, signal, time
from easydel_ragged_plugin.interrupt import ends_like_ctrl_c, interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
with ends_like_ctrl_c(), interruptible(at_once=False):
    try:
        print("idle", flush=True)
        time.sleep(100)
    except KeyboardInterrupt:
        print("raised", flush=True)
with ends_like_ctrl_c(), interruptible(at_once=False):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # as a program of XLA: minutes, without the lock
"""


@needs_posix
def test_sigterm_is_as_ctrl_c() -> None:
    """One raises where Python is at work; of two, of either kind, the second one ends the process."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        killing = threading.Timer(LIMIT_S, it.kill)
        killing.start()
        try:
            assert it.stdout is not None
            assert it.stdout.readline() == "idle\n"
            it.send_signal(signal.SIGTERM)
            assert it.stdout.readline() == "raised\n"
            assert it.stdout.readline() == "busy\n"
            time.sleep(0.5)  # it is in the long call by now
            it.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert it.poll() is None
            it.send_signal(signal.SIGTERM)
            _, errors = it.communicate()
        finally:
            it.kill()
            killing.cancel()
    assert (it.returncode, errors) == (interrupt.INTERRUPTED, "interrupted\n")


def test_leaving_calls_what_asked_for_it() -> None:
    code = (
        "from easydel_ragged_plugin import interrupt\n"
        "interrupt.at_leaving += [lambda: 1 / 0, lambda: print('killed', flush=True)]\n"
        "interrupt.leave()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (interrupt.INTERRUPTED, "killed\n", "interrupted\n")


COMPLAINT = (
    "E1127 08:11:28.393159 1729 cpu_aot_loader.cc:220] Loading XLA:CPU AOT result. Target machine feature {} is not"
)


def test_a_failure_shows_no_complaints_that_mean_nothing(tmp_path: Path) -> None:
    lines = [COMPLAINT.format(name) for name in ("+prefer-no-gather", "+prefer-no-scatter", "+amx-tile")]
    log = tmp_path / "log"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom easydel_ragged_plugin.terminal import hushed\n"
        f"with hushed(Path({str(log)!r})):\n    os.write(2, {chr(10).join(lines).encode()!r})\n    raise RuntimeError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert [line.strip() for line in done.stderr.splitlines() if "cpu_aot" in line] == lines[2:]
    assert log.read_text() == "\n".join(lines)


# The command, with EasyDeL

needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("easydel", "torch", "openai"))
    or not host.streams_whole_answers(),
    reason="needs EasyDeL 0.3.0, torch and openai",
)


@dataclasses.dataclass(frozen=True)
class Served:
    """A running ``demo --serve``: its process, what it printed, where it answers, and its log file."""

    process: subprocess.Popen[str]
    printed: str
    url: str
    log: Path


def _ask(url: str, name: str, **further: Any) -> list[Any]:
    """Chunks of a streamed chat, as OpenAI's client reads them."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        message = {"role": "user", "content": PROMPT}
        return list(client.chat.completions.create(model=name, messages=[message], stream=True, **further))


def _words(chunks: list[Any]) -> list[str]:
    return WORD.findall("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Folder of the tiny model, and the words of transformers' answer."""
    import tiny_model

    folder = tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", positions=512)
    (tokens,) = tiny_model.expected(folder, [PROMPT], MAX_TOKENS)
    assert min(tokens) >= len(tiny_model.SPECIAL)
    return folder, [f"w{token}" for token in tokens]


@pytest.fixture(scope="module")
def served(expected: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cache = tmp_path_factory.mktemp("cache")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests may run where it is ignored
        "from easydel_ragged_plugin.cli import main; main()"
    )
    options = ["--model", expected[0], "--port", "0", "--context", str(CONTEXT), "--page-size", "16"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, model.CACHE_VARIABLE: str(cache), "COLUMNS": "200"},
        start_new_session=True,
    )
    assert process.stdout is not None

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    killing = threading.Timer(3 * LIMIT_S, kill)
    killing.start()
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("Ctrl-C"):
                break
        address = re.search(r"^page +(http://127\.0\.0\.1:\d+)/$", printed, re.MULTILINE)
        assert address, printed
        yield Served(process, printed, address[1], cache / "demo.log")
    finally:
        killing.cancel()
        kill()
        process.wait(timeout=LIMIT_S)
        process.stdout.close()


def _running(group: int) -> list[str]:
    """Processes of a group. One that has ended may wait for its parent to look, and is left out."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = file.read_text()
            state, _, its_group = text.rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(text)
    return found


def _until(true: Callable[[], bool], seconds: float = LIMIT_S) -> bool:
    """Wait for something; whether it came."""
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def _open_answers(url: str) -> Iterator[list[Any]]:
    """More streams than it answers at once; the first one has begun, and the last ones wait."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "stream": True, "temperature": 0}
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), header)
    with contextlib.ExitStack() as opened:
        answers = [
            opened.enter_context(urllib.request.urlopen(request, timeout=LIMIT_S))
            for _ in range(5 * run.SERVED_AT_ONCE)
        ]
        assert answers[0].readline().startswith(b"data: ")
        yield answers


@needs_server
@needs_posix
@pytest.mark.host
@pytest.mark.slow
class TestServe:
    def test_what_it_prints(self, served: Served) -> None:
        lines = served.printed.splitlines()
        assert "kernel     cpu_native" in lines
        assert "operation  easydel_ragged_plugin.operations.RaggedPageAttnV3" in lines
        assert f"API        {served.url}/v1, as OpenAI's; model tiny" in lines
        assert f"context    {LONGEST} tokens, answer included" in lines
        assert not any(line.startswith("note:") for line in lines)

    def test_the_command_that_it_prints_works(self, served: Served) -> None:
        (line,) = (line for line in served.printed.splitlines() if line.startswith("curl "))
        _, url, _, header, _, body = shlex.split(line)
        request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["total_tokens"] == LONGEST  # it names no limit, and the model would go on

    def test_the_page(self, served: Served) -> None:
        with urllib.request.urlopen(f"{served.url}/", timeout=LIMIT_S) as response:
            assert response.read() == PAGE.read_bytes()
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            script = re.search(r"<script>(.*?)</script>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
            assert script is not None
            digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
            allowed = f"script-src 'sha256-{digest}'"
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith(f"default-src 'none'; connect-src 'self'; {allowed}; ")
        with urllib.request.urlopen(f"{served.url}/about", timeout=LIMIT_S) as response:
            about = json.load(response)
        assert (about["model"], about["kernel"], about["context"]) == ("tiny", "cpu_native", LONGEST)
        assert about["host"].startswith("EasyDeL ")

    def test_a_streamed_chat(self, served: Served, expected: tuple[str, list[str]]) -> None:
        chunks = _ask(served.url, "tiny", temperature=0, max_tokens=MAX_TOKENS)
        assert _words(chunks) == expected[1]
        assert chunks[-1].choices[0].finish_reason is not None

    def test_more_requests_than_it_answers_at_once(self, served: Served, expected: tuple[str, list[str]]) -> None:
        answers: list[list[str]] = []

        def ask() -> None:
            answers.append(_words(_ask(served.url, "tiny", temperature=0, max_tokens=MAX_TOKENS)))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3 * run.SERVED_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert answers == [expected[1]] * len(threads)

    def test_a_page_of_another_site(self, served: Served) -> None:
        request = urllib.request.Request(f"{served.url}/about", headers={"Origin": "http://evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            urllib.request.urlopen(request, timeout=LIMIT_S)
        with caught.value as response:
            assert json.load(response)["detail"].startswith("Origin 'http://evil.example': ")

    def test_answers_whose_reader_goes(self, served: Served) -> None:
        def ended() -> int:
            """How many requests the engine has ended that it had."""
            lines = re.findall(r"Aborted request .* matched_scheduler_ids=1 ", served.log.read_text(errors="replace"))
            return len(lines)

        before = ended()
        with _open_answers(served.url):
            pass
        assert _until(lambda: ended() > before)

        def idle() -> bool:
            with urllib.request.urlopen(f"{served.url}/health", timeout=LIMIT_S) as response:
                return bool(json.load(response)["running_requests"] == 0)

        assert _until(idle)

    def test_ctrl_c_leaves_nothing(self, served: Served) -> None:
        """As a terminal has it: it goes to all processes. The last test: the server is gone."""
        with _open_answers(served.url) as answers:
            os.killpg(served.process.pid, signal.SIGINT)
            rest, _ = served.process.communicate(timeout=LIMIT_S)
            begun = [bool(WORD.search(answer.read().decode())) for answer in answers]
        assert served.process.returncode == 0
        assert not all(begun)  # some waited, and were cut, too
        assert re.fullmatch(r"(✓ stopping \d+\.\d s\n)?", rest)
        assert _until(lambda: not _running(served.process.pid), 10)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=LIMIT_S)


@needs_server
@pytest.mark.host
@pytest.mark.slow
def test_the_programs_of_the_page(expected: tuple[str, list[str]]) -> None:
    """The client's text is what the engine generates itself, greedily, and what transformers does."""
    folder, words = expected
    command = [sys.executable, str(ROOT / "tests" / "served_programs.py"), folder, PROMPT, str(MAX_TOKENS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["kernels"] == ["cpu_native"]
    assert WORD.findall(found["own"]) == WORD.findall(found["printed"]) == words
    # What the page says of /v1/completions: with stream, the text is where a chat has it.
    assert WORD.findall(found["whole"]) == WORD.findall("".join(found["deltas"])) == words
    assert not any(found["texts"])
