"""The command line: exit codes, JSON, and what errors say. ``bench`` and ``doctor`` have files of their own."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import invoke, run_command

import easydel_ragged_plugin
from easydel_ragged_plugin import terminal
from easydel_ragged_plugin.config import CACHE_VARIABLE, KERNEL_VARIABLE
from easydel_ragged_plugin.demo import model
from easydel_ragged_plugin.demo import run as demo
from easydel_ragged_plugin.encoding import PLAIN_ERRORS
from easydel_ragged_plugin.interrupt import INTERRUPTED
from easydel_ragged_plugin.terminal import CommandError

HAS_HOST = importlib.util.find_spec("easydel") is not None

COMMANDS = ("demo", "doctor", "bench", "tune", "cache")

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"easydel-ragged {command}" in result.output
    assert "Examples" in result.output


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_fits_80_columns(command: tuple[str, ...]) -> None:
    """Each line of a paragraph is as full as it can be, and nothing is cut."""
    lines = [line.rstrip() for line in invoke(*command, "--help", columns=80).output.splitlines()]
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line for line in lines)
    panel = next(index for index, line in enumerate(lines) if line.startswith("╭"))
    prose = [line.strip() for line in lines[:panel]]
    for line, following in itertools.pairwise(prose):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 78, line
    if command:
        examples = [line for line in prose[prose.index("Examples") + 1 :] if line]
        assert all(line.startswith(f"easydel-ragged {command[0]}") for line in examples), "one is cut in two"


AS_SCRIPT = ["-c", "from easydel_ragged_plugin import cli; cli.main()"]


@pytest.mark.parametrize("module", [["-m", "easydel_ragged_plugin"], AS_SCRIPT])
def test_version_imports_nothing_of_what_it_names(module: list[str]) -> None:
    result = subprocess.run([sys.executable, "-X", "importtime", *module, "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, jax, host = result.stdout.splitlines()
    assert name == f"easydel-ragged-plugin {easydel_ragged_plugin.__version__}"
    assert jax == f"jax {importlib.metadata.version('jax')}"
    assert host == f"easydel {importlib.metadata.version('easydel') if HAS_HOST else 'not installed'}"
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "easydel_ragged_plugin.cli" in imported
    assert not imported & {"jax", "easydel", "numpy", "rich.progress"}


def test_help_imports_no_jax() -> None:
    code = "import sys, easydel_ragged_plugin.cli; sys.exit('jax' in sys.modules)"
    assert run_command(code=code).returncode == 0


# What goes wrong for every command: encodings, the disk, Ctrl-C, the host's log


def test_what_an_encoding_lacks_is_written_with_what_it_has() -> None:
    assert "3.3 µs ✓ é ×2 — “a” ⠋".encode("ascii", PLAIN_ERRORS) == b'3.3 us ok e x2 - "a" ?'  # noqa: RUF001
    assert "3.3 µs ✓".encode("latin-1", PLAIN_ERRORS).decode("latin-1") == "3.3 µs ok"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", PLAIN_ERRORS)


@pytest.mark.parametrize("options", [("demo",), ("tune", "--interpret"), ("bench", "--case", "soak")])
def test_a_cache_folder_that_can_not_be_used_is_said_first(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: [])
    file = tmp_path / "file"
    file.touch()
    for folder, reason in ((file, "it is a file"), (file / "below", "Not a directory")):
        monkeypatch.setenv(CACHE_VARIABLE, str(folder))
        result = invoke(*options)
        assert result.exit_code == 2
        expected = f"error: the cache folder {folder} can't be used: {reason}. Set {CACHE_VARIABLE} to a folder that"
        assert result.output.endswith(f"{expected} can be written.\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_traceback(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(number, os.strerror(number), "/somewhere/model.safetensors")

    monkeypatch.setattr(demo, "run", full)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "error: there is no room left on the disk for /somewhere/model.safetensors:" in result.output
    assert "Traceback" not in result.output


def test_other_errors_of_files_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    monkeypatch.setattr(demo, "run", denied)
    assert isinstance(invoke("demo").exception, PermissionError)


@pytest.mark.parametrize(("error", "shown"), [("CommandError('a mistake')", False), ("RuntimeError('a fault')", True)])
def test_a_mistake_shows_no_log(error: str, shown: bool, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from easydel_ragged_plugin.terminal import CommandError, hushed\n"
        f"with hushed(Path({str(tmp_path / 'log')!r})):\n"
        "    print('a line of the host')\n"
        f"    raise {error}"
    )
    result = run_command(code=code)
    assert result.returncode == 1
    assert ("a line of the host" in result.stderr) == shown
    assert "a line of the host" not in result.stdout


def test_a_terminal_without_a_size_shows_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((0, 0)))
    assert terminal._width(1) == 80


BUSY = """
import hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where Ctrl-C is ignored
from easydel_ragged_plugin.interrupt import interruptible
with interruptible(at_once={at_once}):
    print("busy", flush=True)
    try:
        # As a program of XLA: without the interpreter's lock, and minutes long.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
    except KeyboardInterrupt:
        print("raised")
"""


@needs_posix
@pytest.mark.parametrize("at_once", [True, False])
def test_ctrl_c_ends_what_python_does_not_interrupt(at_once: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(at_once=at_once)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.5)  # it is in the long call by now
        process.send_signal(signal.SIGINT)
        if not at_once:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.5)
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (INTERRUPTED, "", "interrupted\n")


@needs_posix
def test_ctrl_c_raises_where_python_is_at_work() -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from easydel_ragged_plugin.demo import run as demo\n"
        "def run(**options):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "demo.run = run\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("demo", code=code)
    assert (result.returncode, result.stdout, result.stderr) == (INTERRUPTED, "cleaned up\n", "interrupted\n")


# cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one thing of each kind, files of others, and links to what lies outside."""
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    outside.mkdir()
    (outside / "precious").write_bytes(bytes(1000))
    converted = folder / "smollm2-135m-instruct-1"
    converted.mkdir(parents=True)
    (converted / "model.safetensors").write_bytes(bytes(2_500_000))
    (converted / "linked").symlink_to(outside)
    (folder / "smollm2-135m-instruct-2").symlink_to(outside)
    (folder / ".staging-abc").mkdir()
    (folder / model.GGUF_NAME).write_bytes(bytes(1_200_000))
    (folder / "demo.log").write_text("a line")
    (folder / "a_kernel.json").write_text(json.dumps({"format": 3, "entries": {"card head_dim=64": {}}}))
    tried = {"card head_dim=64": {"passed": False}, "card head_dim=128": {"passed": True}}
    (folder / "tried.json").write_text(json.dumps({"format": 1, "entries": tried}))
    (folder / "results.json").write_text(json.dumps({"results": []}))
    (folder / "notes.txt").write_text("mine")
    os.utime(folder / "demo.log", (0, time.mktime((2026, 1, 2, 3, 4, 0, 0, 0, -1))))
    return folder


def test_cache_shows_what_is_there(cache: Path) -> None:
    before = sorted(cache.rglob("*"))
    result = invoke("cache")
    assert result.exit_code == 0, result.output
    title, *lines = [" ".join(line.split()) for line in result.output.splitlines() if line.strip()]
    assert title == str(cache)
    assert any(line.startswith("downloaded model 1.2 MB 2") and line.endswith(model.GGUF_NAME) for line in lines)
    assert any(line.startswith("converted model 2.5 MB 2") for line in lines)
    assert any(line.startswith("tuned tiles for 1 geometries") and line.endswith("a_kernel.json") for line in lines)
    assert any(line.startswith("trials for 2 geometries") and line.endswith("tried.json") for line in lines)
    assert "log of the last run 6 bytes 2026-01-02 03:04 demo.log" in lines
    stays = [line for line in lines if line.startswith("not made by this package: stays")]
    assert [line.split()[-1] for line in stays] == ["notes.txt", "results.json"]
    assert sorted(cache.rglob("*")) == before


def test_cache_clear_removes_ours_and_nothing_else(cache: Path) -> None:
    result = invoke("cache", "--clear")
    assert result.exit_code == 0, result.output
    assert "converted model" in result.output
    assert result.output.endswith("removed 3.7 MB\n")
    assert sorted(path.name for path in cache.iterdir()) == ["notes.txt", "results.json"]
    assert (cache.parent / "outside" / "precious").stat().st_size == 1000
    for path in list(cache.iterdir()):
        path.unlink()
    (cache / "bench.log").touch()
    assert invoke("cache", "--clear").exit_code == 0
    assert not cache.exists()
    result = invoke("cache", "--clear")
    assert (result.exit_code, result.output) == (0, f"{cache}: nothing there\n")


def test_cache_as_json(cache: Path) -> None:
    report = json.loads(invoke("cache", "--json").output)
    assert (report["folder"], report["cleared"]) == (str(cache), False)
    found = {each["name"]: each for each in report["entries"]}
    assert found["notes.txt"] == {
        "name": "notes.txt",
        "kind": None,
        "size_bytes": 4,
        "modified": found["notes.txt"]["modified"],
    }
    assert found[model.GGUF_NAME]["size_bytes"] == 1_200_000


def test_cache_says_what_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(file))
    result = invoke("cache", "--clear")
    assert result.exit_code == 2
    assert f"error: the cache folder {file} can't be read: Not a directory." in result.output
    assert file.exists()


# doctor


def test_demo_without_the_host_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: ["easydel", "gguf"])
    result = invoke("demo")
    assert result.exit_code == 2
    assert "Run: pip install easydel gguf" in result.output


def test_bench_without_the_host_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    converted = []

    def missing(*, converts: bool) -> list[str]:
        converted.append(converts)
        return ["torch"]

    monkeypatch.setattr(model, "missing_packages", missing)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for case in ("engine", "soak"):
        result = invoke("bench", "--case", case)
        assert result.exit_code == 2
        assert f"error: --case {case} needs torch, which this environment lacks." in result.output
    assert converted == [True, False]  # gguf and accelerate are for SmolLM2 alone
    (tmp_path / "smollm2-135m-instruct-1").mkdir()
    invoke("bench", "--case", "engine")
    assert converted == [True, False, False]  # and not once it is there


def test_serving_names_an_unknown_kernel_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, "warp")
    with pytest.raises(CommandError, match=f"{KERNEL_VARIABLE}: got 'warp', wanted one of cpu_native, .*, or unset it"):
        demo._check_kernel_variable()
    monkeypatch.setenv(KERNEL_VARIABLE, "xla")
    demo._check_kernel_variable()


def test_an_answer_longer_than_the_model_is_refused() -> None:
    config = SimpleNamespace(max_position_embeddings=100)
    demo._check_length(config, [3, 40], 60)
    expected = "--max-tokens 61: a prompt of 40 tokens and such an answer are 101, and the model has 100 positions"
    with pytest.raises(CommandError, match=expected):
        demo._check_length(config, [3, 40], 61)
    demo._check_length(SimpleNamespace(), [40], 10**6)


def test_demo_refuses_a_folder_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: [])
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    result = invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "no config.json there" in result.output


def test_demo_knows_what_the_host_cannot_run() -> None:
    with pytest.raises(CommandError, match="EasyDeL's own v3 does not run with head_dim 64"):
        demo._variants("v3", True, False, 64)
    assert list(demo._variants("v3", True, False, 128).values()) == [
        {"mechanism": "ragged_page_attention_v3", "host_kernels": True}
    ]
    assert len(demo._variants("v3", False, True, 64)) == 3
    assert len(demo._variants("v3", False, True, 128)) == 4
