"""The programs of docs/serving.md in a process of their own: ``served_programs.py FOLDER PROMPT TOKENS`` prints JSON.

The engine and the server are the page's, of the tiny model in FOLDER, and while the server answers, the page's client
asks it PROMPT. The keys are ``kernels`` that calls of v3 got, the client's text ``printed``, the engine's ``own``, and
of ``/v1/completions`` the ``whole`` text, and with stream the ``texts`` and ``deltas``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn
from openai import OpenAI

from easydel_ragged_plugin.demo import serve
from easydel_ragged_plugin.demo.engine import import_host
from easydel_ragged_plugin.hooks import hookimpl, register
from easydel_ragged_plugin.host import load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
LIMIT_S = 300


class Watcher:
    """Notes the kernels that calls of v3 got."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @hookimpl
    def ragged_selected(self, selection: Any) -> None:
        self.seen.add(selection.kernel)


def programs(folder: str, port: int) -> tuple[str, str, str]:
    """The engine's, the server's and the client's."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"tests/test_serving\.py does with a tiny model -->\n```python\n(.*?)^```$", page, re.S | re.M)
    engine, server, client = (block.replace("8000", str(port)) for block in blocks)
    assert "path/to/a/model" in engine
    return engine.replace("path/to/a/model", folder), server, client


def completions(port: int, prompt: str, tokens: int) -> dict[str, Any]:
    """Of /v1/completions: the text without stream, and with it what the client has as text and as delta."""
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        asked: dict[str, Any] = {"model": "my-model", "prompt": prompt, "temperature": 0, "max_tokens": tokens}
        whole = client.completions.create(**asked)
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    deltas = [getattr(choice, "delta")["content"] for choice in choices]  # noqa: B009 a field that the client lacks
    return {"whole": whole.choices[0].text, "texts": [choice.text for choice in choices], "deltas": deltas}


def main(folder: str, prompt: str, number: str) -> None:
    tokens = int(number)
    import_host()
    cache = sys.modules[load().RaggedPagesCacheConfig.__module__]
    setattr(cache, "per_device_hbm_budget_bytes", lambda *args, **kwargs: 1 << 24)  # noqa: B010 else it takes 4 GiB
    listening = serve.listen("127.0.0.1", 0)  # the server's, which closes it
    port = listening.getsockname()[1]
    engine_program, server_program, client_program = programs(folder, port)
    client_program = client_program.replace("What is the capital of France?", prompt)
    client_program = client_program.replace("temperature=0,", f"temperature=0, max_tokens={tokens}, timeout={LIMIT_S},")
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

    def run(**config: Any) -> None:
        """In place of ``uvicorn.run``: while the server answers, the client runs."""
        assert (config["host"], config["port"]) == ("127.0.0.1", port)
        server = uvicorn.Server(uvicorn.Config(**{**config, "log_level": "warning"}))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + LIMIT_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.05)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(client_program, "client.py", "exec"), {"__name__": "__main__"})
            found["printed"] = printed.getvalue()
            found.update(completions(port, prompt, tokens))
            sampling = names["easydel"].SamplingParams(max_tokens=tokens, temperature=0.0)
            (output,) = engines[0].generate([prompt], sampling, use_tqdm=False)
            found["own"] = output.accumulated_text
        finally:
            server.should_exit = True
            thread.join(timeout=LIMIT_S)
        assert not thread.is_alive()

    watcher = Watcher()
    register(watcher)
    try:
        with mock.patch.object(uvicorn, "run", run):
            names["main"]()
    finally:
        for engine in engines:  # it ends them with the engine alone, which much refers to
            engine._worker_manager.shutdown()
    print(json.dumps(found | {"kernels": sorted(watcher.seen)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
