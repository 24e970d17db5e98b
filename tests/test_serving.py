"""``demo --serve``, its page, and the server and the client of docs/serving.md, with a tiny model made on the spot."""

from __future__ import annotations

import asyncio
import dataclasses
import html.parser
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import invoke

from easydel_ragged_plugin import host, interrupt
from easydel_ragged_plugin.demo import model, run, serve
from easydel_ragged_plugin.demo.serve import About
from easydel_ragged_plugin.hooks import hookimpl, register, unregister
from easydel_ragged_plugin.terminal import CommandError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "easydel_ragged_plugin" / "demo" / "chat.html"
ABOUT = About("tiny", "cpu_native", "package.Operation", 64, "EasyDeL 0.0.0")
PROMPT = "w11 w12 w13"
MAX_TOKENS = 8

WORD = re.compile(r"w\d+")
"""A token of the tiny model."""

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes")


# The page, without a browser


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of the script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


PARTS_OF_PAGES_FROM_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\b|\bFunction\b|srcdoc"
)


def test_the_page_needs_nothing_but_its_server() -> None:
    text = PAGE.read_text(encoding="utf-8")
    links = [value for _, attributes in Elements(text).found for key, value in attributes.items() if key in LINKS]
    assert links == ["data:,"]  # its icon
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"^ *//.*|; // .*", "", text, flags=re.MULTILINE))
    addresses = re.findall(r"fetch\(\s*[\"'`]([^\"'`]*)", text)
    assert sorted(addresses) == ["/about", "/v1/chat/completions"]


LINKS = ("src", "href", "action", "formaction", "data", "poster", "srcset")


def test_texts_never_become_parts_of_the_page() -> None:
    script = Elements(PAGE.read_text(encoding="utf-8")).script
    assert "textContent" in script
    assert not PARTS_OF_PAGES_FROM_TEXT.findall(script)
    assert PARTS_OF_PAGES_FROM_TEXT.search("body.innerHTML += delta")


def test_the_page_can_be_used_by_everybody() -> None:
    elements = Elements(PAGE.read_text(encoding="utf-8")).found
    assert ("html", {"lang": "en"}) in elements
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [each for _, each in elements]
    labeled = [attributes["for"] for tag, attributes in elements if tag == "label"]
    assert [attributes["id"] for tag, attributes in elements if tag in ("input", "select", "textarea")] == labeled
    (log,) = (attributes for _, attributes in elements if attributes.get("role") == "log")
    assert log["aria-live"] == "polite"
    assert not [tag for tag, attributes in elements if any(key.startswith("on") for key in attributes)]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node, which runs the page's script without a browser")
def test_the_page_reads_a_stream_that_is_cut_anywhere() -> None:
    script = Elements(PAGE.read_text(encoding="utf-8")).script
    until_browser = script[: script.index("// Below is what needs a browser.")]
    stream = 'data: {"a": 1}\n\nevent: x\ndata: é<b>\r\n\ndata: [DONE]\n\n'
    check = (
        f"const stream = {json.dumps(stream)}, wrong = [];\n"
        "for (let first = 0; first <= stream.length; first++) for (let then = first; then <= stream.length; then++) {\n"
        "  const events = new Events(), cuts = [0, first, then, stream.length];\n"
        "  const parts = [0, 1, 2].map((part) => stream.slice(cuts[part], cuts[part + 1]));\n"
        "  const found = parts.flatMap((part) => [...events.feed(part)]);\n"
        "  if (JSON.stringify(found) !== JSON.stringify(['{\"a\": 1}', 'é<b>', '[DONE]'])) wrong.push(found);\n"
        "}\n"
        "console.log(JSON.stringify([wrong, complaint(503, {detail: 'busy'}), complaint(500, null),\n"
        "  complaint(400, {error: {message: 'no'}}), complaint(422, {detail: [{loc: 1}]})]));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "-"], input=until_browser + check, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [
        [],
        "The server answered 503: busy",
        "The server answered 500.",
        "The server answered 400: no",
        'The server answered 422: [{"loc":1}]',
    ]


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
    ("name", "message"),
    [
        ("nowhere.invalid", "--host nowhere.invalid: no such address: "),
        ("192.0.2.1", "--host 192.0.2.1 --port 0: this machine has no such address. Give 127.0.0.1"),
    ],
)
def test_an_address_that_is_none(name: str, message: str) -> None:
    with pytest.raises(CommandError, match=f"^{re.escape(message)}"):
        serve.listen(name, 0)


@pytest.mark.parametrize("option", [("--compare",), ("--prompt", "Why?"), ("--max-tokens", "64")])
def test_options_that_the_server_has_no_use_for(option: tuple[str, ...]) -> None:
    result = invoke("demo", "--serve", *option)
    assert result.exit_code == 2
    assert result.output == f"error: {option[0]} does not go with --serve: each request says what it wants.\n"


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
        assert not serve.everyone(listening)
    with serve.listen("0.0.0.0", 0) as listening:
        assert serve.address(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert serve.everyone(listening)
    command = shlex.split(serve.example("http://127.0.0.1:1", "it's"))
    assert command[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == "it's"


def test_the_servers_settings() -> None:
    config = SimpleNamespace(max_position_embeddings=1000)
    assert run._server_settings(config, 300, 128, "float32").max_model_len == 384
    assert run._server_settings(config, 4096, 128, "float32").max_model_len == 896
    assert run._server_settings(SimpleNamespace(), 4096, 128, "float32").max_model_len == 4096
    assert run._name("owner/name") == "owner/name"
    assert run._name("./models/") == "models"


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_whose_reader_goes_is_ended(whole: bool) -> None:
    aborted: list[str] = []
    engine = SimpleNamespace(abort_request=aborted.append)

    class Server:
        esurge_map = {"tiny": engine}  # noqa: RUF012

        async def chat_completions(self, request: object, raw_request: object) -> Any:
            async def chunks() -> AsyncIterator[str]:
                yield "one"
                yield "two"

            return SimpleNamespace(body_iterator=chunks(), headers={"X-Request-ID": "a request"})

    async def read() -> list[str]:
        response = await serve._ends_with_its_reader(Server.chat_completions)(Server(), None, None)
        found = []
        async for chunk in response.body_iterator:
            found.append(chunk)
            if not whole:
                await response.body_iterator.aclose()
                break
        return found

    assert asyncio.run(read()) == (["one", "two"] if whole else ["one"])
    assert aborted == ([] if whole else ["a request"])


def test_leaving_calls_what_asked_for_it() -> None:
    code = (
        "from easydel_ragged_plugin import interrupt\n"
        "interrupt.at_leaving += [lambda: 1 / 0, lambda: print('killed', flush=True)]\n"
        "interrupt.leave()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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
    """A running ``demo --serve``."""

    process: subprocess.Popen[str]
    printed: str
    url: str
    folder: str


def _ask(url: str, name: str, **further: Any) -> list[Any]:
    """Chunks of a streamed chat, as OpenAI's client reads them."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
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
    options = ["--model", expected[0], "--port", "0", "--context", "64", "--page-size", "16"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, model.CACHE_VARIABLE: str(cache), "COLUMNS": "200"},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("Ctrl-C"):
                break
        address = re.search(r"^page +(http://127\.0\.0\.1:\d+)/$", printed, re.MULTILINE)
        assert address, printed
        yield Served(process, printed, address[1], expected[0])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


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
        assert not any(line.startswith("note:") for line in lines)

    def test_the_command_that_it_prints_works(self, served: Served) -> None:
        (line,) = (line for line in served.printed.splitlines() if line.startswith("curl "))
        _, url, _, header, _, body = shlex.split(line)
        request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
        with urllib.request.urlopen(request, timeout=100) as response:
            assert json.load(response)["choices"][0]["message"]["role"] == "assistant"

    def test_the_page(self, served: Served) -> None:
        with urllib.request.urlopen(f"{served.url}/", timeout=100) as response:
            assert response.read() == PAGE.read_bytes()
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; connect-src 'self'; ")
        with urllib.request.urlopen(f"{served.url}/about", timeout=100) as response:
            about = json.load(response)
        assert (about["model"], about["kernel"], about["context"]) == ("tiny", "cpu_native", 64)
        assert about["host"].startswith("EasyDeL ")

    def test_a_streamed_chat(self, served: Served, expected: tuple[str, list[str]]) -> None:
        chunks = _ask(served.url, "tiny", temperature=0, max_tokens=MAX_TOKENS)
        assert _words(chunks) == expected[1]
        assert chunks[-1].choices[0].finish_reason is not None

    def test_more_requests_than_it_answers_at_once(self, served: Served, expected: tuple[str, list[str]]) -> None:
        answers: list[list[str]] = []

        def ask() -> None:
            answers.append(_words(_ask(served.url, "tiny", temperature=0, max_tokens=MAX_TOKENS)))

        threads = [threading.Thread(target=ask) for _ in range(3 * run.SERVED_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [expected[1]] * len(threads)

    def test_ctrl_c_leaves_nothing(self, served: Served) -> None:
        """As a terminal has it: it goes to all processes. The last test: the server is gone."""
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.process.stdout is not None
        rest = served.process.stdout.read()
        assert served.process.wait(timeout=100) == 0
        assert re.fullmatch(r"(✓ stopping \d+\.\d s\n)?", rest)
        with pytest.raises(ProcessLookupError):
            os.killpg(served.process.pid, 0)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))


# The programs of docs/serving.md


def _programs(folder: str, port: int) -> tuple[str, str, str]:
    """The engine's, the server's and the client's, for the tiny model."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"tests/test_serving\.py does with a tiny model -->\n```python\n(.*?)^```$", page, re.S | re.M)
    engine, server, client = (block.replace("8000", str(port)) for block in blocks)
    assert "path/to/a/model" in engine
    return engine.replace("path/to/a/model", folder), server, client


class Watcher:
    """Notes the kernels that calls of v3 got."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @hookimpl
    def ragged_selected(self, selection: Any) -> None:
        self.seen.add(selection.kernel)


@needs_server
@pytest.mark.host
@pytest.mark.slow
def test_the_programs_of_the_page(
    expected: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client's text is what the engine generates itself, greedily, and what transformers does."""
    import uvicorn

    from easydel_ragged_plugin.demo.engine import import_host
    from easydel_ragged_plugin.host import load

    import_host()
    cache_module = sys.modules[load().RaggedPagesCacheConfig.__module__]
    monkeypatch.setattr(cache_module, "per_device_hbm_budget_bytes", lambda *args, **kwargs: 1 << 24)
    with serve.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    folder, words = expected
    engine_program, server_program, client_program = _programs(folder, port)
    client_program = client_program.replace("What is the capital of France?", PROMPT)
    client_program = client_program.replace("temperature=0,", f"temperature=0, max_tokens={MAX_TOKENS},")
    names: dict[str, Any] = {"__name__": "server"}
    exec(compile(engine_program, "engine.py", "exec"), names)
    engines = []
    make_engine = names["make_engine"]

    def make_and_keep() -> Any:
        engine = make_engine()
        engine.tokenizer.chat_template = serve.CHAT_TEMPLATE
        engines.append(engine)
        return engine

    names["make_engine"] = make_and_keep
    exec(compile(server_program, "server.py", "exec"), names)
    found: dict[str, Any] = {}

    def uvicorn_run(**config: Any) -> None:
        """While the server answers, the client runs."""
        assert (config["host"], config["port"]) == ("127.0.0.1", port)
        server = uvicorn.Server(uvicorn.Config(**{**config, "log_level": "warning"}))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        try:
            capsys.readouterr()
            exec(compile(client_program, "client.py", "exec"), {"__name__": "__main__"})
            found["printed"] = capsys.readouterr().out
            found["completions"] = _completions(port)
            sampling = names["easydel"].SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
            (output,) = engines[0].generate([PROMPT], sampling, use_tqdm=False)
            found["own"] = output.accumulated_text
        finally:
            server.should_exit = True
            thread.join()

    monkeypatch.setattr(uvicorn, "run", uvicorn_run)
    watcher = Watcher()
    register(watcher)
    try:
        names["main"]()
    finally:
        unregister(watcher)
        for engine in engines:  # it ends them with the engine alone, which much refers to
            engine._worker_manager.shutdown()
    assert watcher.seen == {"cpu_native"}
    assert WORD.findall(found["own"]) == WORD.findall(found["printed"]) == words
    # What the page says of /v1/completions: with stream, the text is where a chat has it.
    whole, texts, deltas = found["completions"]
    assert WORD.findall(whole) == WORD.findall("".join(deltas)) == words
    assert not any(texts)


def _completions(port: int) -> tuple[str, list[Any], list[str]]:
    """Of /v1/completions: the text without stream, and with it what the client has as text and as delta."""
    from openai import OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "my-model", "prompt": PROMPT, "temperature": 0, "max_tokens": MAX_TOKENS}
        whole = client.completions.create(**asked)
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    deltas = [getattr(choice, "delta")["content"] for choice in choices]  # noqa: B009 a field that the client lacks
    return whole.choices[0].text, [choice.text for choice in choices], deltas
