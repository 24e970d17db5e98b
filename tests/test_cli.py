"""The command line: exit codes, JSON, and what errors say. ``bench`` has a file of its own."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import invoke, run_command

import easydel_ragged_plugin
from easydel_ragged_plugin import system, terminal
from easydel_ragged_plugin.cli import doctor
from easydel_ragged_plugin.config import CACHE_VARIABLE, KERNEL_VARIABLE
from easydel_ragged_plugin.demo import model
from easydel_ragged_plugin.demo import run as demo
from easydel_ragged_plugin.encoding import PLAIN_ERRORS
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.interrupt import INTERRUPTED
from easydel_ragged_plugin.kernels import cpu_native
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

WITHOUT_HOST = (
    "from easydel_ragged_plugin import host; host.host_version = lambda: None\n"
    "from easydel_ragged_plugin.cli import main; main()"
)


def test_doctor_without_easydel_is_well() -> None:
    code = (
        "import importlib.metadata as m; from easydel_ragged_plugin import host; host.host_version = lambda: None\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("doctor", code=code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no EasyDeL: functions only" in result.stdout
    assert "pip install 'easydel-ragged-plugin[host]'" in result.stdout
    assert result.stdout.count("ok (largest error") == 2
    assert "all is well" in result.stdout or cpu_native.availability() is not None
    assert result.stdout.endswith("to report a problem: easydel-ragged doctor --markdown\n")


@pytest.mark.host
@pytest.mark.skipif(not HAS_HOST, reason="needs EasyDeL")
def test_doctor_exit_code_when_switched_off() -> None:
    result = run_command("doctor", "--json", EASYDEL_RAGGED_PLUGIN="0")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert not report["activation"]["active"]
    assert report["environment"]["EASYDEL_RAGGED_PLUGIN"] == "0"
    assert any("EASYDEL_RAGGED_PLUGIN=0" in problem for problem in report["problems"])


@pytest.mark.host
@pytest.mark.skipif(not HAS_HOST, reason="needs EasyDeL")
def test_doctor_exit_code_when_active() -> None:
    # By hand, so that the test holds in a checkout that is not installed, too.
    code = "import easydel_ragged_plugin as p; p.activate(); from easydel_ragged_plugin.cli import main; main()"
    result = run_command("doctor", "--json", code=code)
    report = json.loads(result.stdout)
    assert result.returncode == 0, report["problems"]
    assert report["activation"]["operations"] == {
        f"ragged_page_attention_{version}": f"easydel_ragged_plugin.operations.RaggedPageAttn{version.upper()}"
        for version in ("v2", "v3")
    }
    assert all(name.startswith("easydel.") for name in report["activation"]["replaced"].values())
    assert set(report["selection"]) == set(report["self_check"]) == {"v2", "v3"}


def test_doctor_tells_about_kernels() -> None:
    without = run_command("doctor", code=WITHOUT_HOST, EASYDEL_RAGGED_NATIVE_LIBRARY="/nowhere.so")
    assert without.returncode == 0, without.stdout + without.stderr
    reason = "EASYDEL_RAGGED_NATIVE_LIBRARY names '/nowhere.so', which is not a file"
    assert f"cpu_native: not available: {reason}" in without.stdout
    assert without.stdout.count(reason) == 1
    assert "works, without the fast kernel: cpu_native is not available (see kernels)" in without.stdout
    assert "all is well" not in without.stdout
    if cpu_native.availability() is None:
        result = run_command("doctor", "--json", code=WITHOUT_HOST, EASYDEL_RAGGED_ISA="baseline")
        kernels = json.loads(result.stdout)["kernels"]
        assert kernels.keys() >= {"cpu_native", "pallas_gpu", "xla", "ejkernel"}
        native = kernels["cpu_native"]
        assert native["available"]
        assert native["isa"] == "baseline"
        assert tuple(native["isa_levels"]) == cpu_native.isa_levels()
        assert native["threads"] >= 1
        assert Path(native["library"]).is_file()
        compiler, _, levels = native["built_with"].partition(" for ")
        assert re.match(r"(GCC|Clang) \d", compiler)
        assert set(cpu_native.isa_levels()) <= set(levels.split(","))


def test_doctor_says_a_bad_variable_once() -> None:
    result = run_command("doctor", code=WITHOUT_HOST, **{KERNEL_VARIABLE: "warp"})
    assert result.returncode == 1
    problem = "kernel 'warp' is unknown. Known: cpu_native,"
    assert result.stdout.count(problem) == 1
    assert f"\nproblems\n  v2 and v3 with {KERNEL_VARIABLE}=warp: {problem}" in result.stdout
    assert "v3: not run, see problems" in result.stdout


def test_doctor_says_once_what_both_operations_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    refused = {
        f"{name} decode": Unsupported(f"warp: not on cpu. Request: {name} of 8 tokens.") for name in ("v2", "v3")
    }
    problems: list[str] = []
    selection = doctor._selection(refused, problems)
    assert problems == ["v2 and v3: warp: not on cpu."]
    assert selection["v3"]["error"] == "warp: not on cpu. Request: v3 of 8 tokens."
    problems.clear()
    doctor._selection({**refused, "v2 decode": ValueError("another")}, problems)
    assert problems == ["v2: another", "v3: warp: not on cpu."]


def test_doctor_reports_a_wrong_kernel() -> None:
    code = (
        "from easydel_ragged_plugin import api, host; host.host_version = lambda: None\n"
        "right = api.ragged_page_attention_v2\n"
        "api.ragged_page_attention_v2 = lambda *a, **k: right(*a, **k) * 1.01\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("doctor", "--json", code=code, EASYDEL_API_KEY="abc123")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["self_check"]["v2"].startswith("WRONG: the answer is off by up to")
    assert report["self_check"]["v3"].startswith("ok")
    # JSON has what a reader of another machine must know.
    assert "abc123" not in result.stdout
    assert report["machine"].keys() == {"operating_system", "processor", "memory", "huge_pages"}
    assert report["machine"]["processor"]["usable"] == system.processors()
    assert report["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert report["jax"]["jax_numpy_dtype_promotion"] == "standard"
    assert report["cache"].keys() == {"folder", "entries", "others"}
    assert report["fingerprint"].keys() >= {"jaxlib", "platform", "kernel xla", "selection of v3 decode"}


def test_doctor_prints_the_whole_report_as_markdown(tmp_path: Path) -> None:
    """In a terminal of ASCII that has colors: plain, and without what is nobody else's business."""
    (tmp_path / "demo.log").write_text("a line")
    (tmp_path / "secret plan.txt").touch()
    environment = {
        CACHE_VARIABLE: str(tmp_path),
        "EASYDEL_API_KEY": "abc123",
        "EJKERNEL_LOG_AUTOTUNE": "\x1b[31m|é`",
        "FORCE_COLOR": "1",
        "HOME": "/home/somebody",
        "MY_PASSWORD": "abc123",
        "PYTHONIOENCODING": "ascii",
    }
    shown = run_command("doctor", "--markdown", code=WITHOUT_HOST, **environment)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    text = shown.stdout
    assert text.isascii()
    assert "\x1b" not in text
    assert "abc123" not in text
    assert "MY_PASSWORD" not in text
    assert "EASYDEL_API_KEY=(set, not shown)" in text
    assert "EJKERNEL_LOG_AUTOTUNE=|e`" in text
    heading, first, fold, rest, end = re.split(r"\n\n```text\n|\n```\n", text)
    assert heading.startswith("### easydel-ragged doctor: ")
    assert fold.strip() == "<details><summary>machine, packages, settings, cache, fingerprint</summary>"
    assert end == "\n</details>\n"
    assert first.startswith("versions\n  python ")
    assert first.count("ok (largest error") == 2
    for line in (f"operating system: system {platform.system()}", "numpy ", "jax_enable_x64: ", "config: RaggedPage"):
        assert f"\n  {line}" in rest
    assert f"cache folder {tmp_path}\n  demo.log: log of the last run, 6 bytes\n  things of others: 1\n" in rest
    assert "secret plan" not in rest


def test_doctor_prints_one_form() -> None:
    result = invoke("doctor", "--json", "--markdown")
    assert result.exit_code == 2
    assert "error: --json and --markdown: got both, wanted one of them." in result.output


def test_doctor_reports_a_jax_that_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code = "import os; os.environ['JAX_PLATFORMS'] = 'warp'\n" + WITHOUT_HOST
    result = run_command("doctor", "--markdown", code=code, **{CACHE_VARIABLE: str(file)})
    assert result.returncode == 1, result.stderr
    assert "### easydel-ragged doctor: problems\n\n```text\nproblems\n  JAX does not start: Unable to" in result.stdout
    assert "JAX_PLATFORMS=warp" in result.stdout
    assert f"\n  the cache folder {file} can't be read: Not a directory." in result.stdout


def test_doctor_reports_an_easydel_that_can_not_be_imported() -> None:
    code = (
        "from easydel_ragged_plugin import host; host.host_version = lambda: '0.3.0'\n"
        "def registry(): raise ImportError('no module named gone')\n"
        "host.registry = registry\n"
        "from easydel_ragged_plugin.cli import main; main()"
    )
    result = run_command("doctor", code=code)
    assert result.returncode == 1
    assert "  EasyDeL can't be imported, see problems\n" in result.stdout
    assert "\nproblems\n  EasyDeL 0.3.0 can't be imported: ImportError: no module named gone\n" in result.stdout
    assert result.stdout.count("ok (largest error") == 2


def test_a_block_of_markdown_is_shown_as_it_is() -> None:
    lines = ["| a | <b> *c* #1", "```", "at /home/al/x:/home/al, /home/alice", "\x1b[1;31mred\x1b[0m"]
    assert terminal.markdown_block({"one": lines, "two": []}, "/home/al") == (
        "````text\none\n  | a | <b> *c* #1\n  ```\n  at ~/x:~, /home/alice\n  red\n\ntwo\n````"
    )
    assert "/x" in terminal.markdown_block({"one": ["/x"]}, "/")


# What a system says of itself


def write(root: Path, **files: str) -> Path:
    """Files below ``root``; in the names ``__`` stands for ``/``, ``_d_`` for a dot."""
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_d_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_facts_of_a_linux(tmp_path: Path) -> None:
    cpu = "processor : {}\nmodel name\t: A Chip: 9000 @ 2GHz\nflags\t\t: fpu avx2 avx512f_not fma amx_bf16\n\n"
    root = write(
        tmp_path,
        proc__cpuinfo=cpu.format(0) + cpu.format(1).replace("9000", "1"),
        proc__meminfo="MemTotal:  2048 kB\nMemAvailable:  1024 kB\nSwapTotal: 0 kB\nHugePages_Total:  7\n",
        sys__fs__cgroup__memory_d_max="1048576\n",
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n",
        sys__devices__system__cpu__cpu0__cache__index0__size="48K\n",
        sys__devices__system__cpu__cpu0__cache__index3__size="32M\n",
    )
    write(root / "etc", **{"os-release": 'NAME="Some"\nPRETTY_NAME="Some Linux 12 (name)"\n'})
    assert system.operating_system(root)["distribution"] == "Some Linux 12 (name)"
    found = system.machine(root)
    assert found["processor"] == {
        "model": "A Chip: 9000 @ 2GHz",
        "processors": os.cpu_count(),
        "usable": system.processors(),
        "last_level_cache_bytes": 32 << 20,
        "instruction_sets": ["avx2", "fma", "amx_bf16"],
    }
    expected = {"total_bytes": 2 << 20, "available_bytes": 1 << 20, "swap_bytes": 0, "limit_bytes": 1 << 20}
    assert found["memory"] == expected
    assert found["huge_pages"] == {"transparent": "madvise", "defrag": None, "reserved": 7}
    assert terminal.fields_as_text(found["memory"]) == "total 2.1 MB; available 1.0 MB; swap 0 bytes; limit 1.0 MB"


def test_facts_of_an_arm_and_of_no_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__cpuinfo="processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
        proc__meminfo="MemTotal:  2048 kB\n",
        sys__fs__cgroup__memory__memory_d_limit_in_bytes="9223372036854771712\n",
    )
    assert system.processor_name(root) == "implementer 0x41, part 0xd40"
    assert system.processor(root)["instruction_sets"] == ["asimd", "bf16", "sve"]
    assert system.memory(root)["limit_bytes"] is None
    write(root, sys__fs__cgroup__memory_d_max="max\n")
    assert system.memory(root)["limit_bytes"] is None


def test_facts_of_a_system_that_says_nothing(tmp_path: Path) -> None:
    found = system.machine(tmp_path)
    assert set(found["memory"].values()) == set(found["huge_pages"].values()) == {None}
    assert found["processor"]["instruction_sets"] == []
    assert found["operating_system"]["system"] == platform.system()
    assert terminal.fields_as_text(found["memory"]) == ""


def test_environment_shows_what_leads_programs_and_no_secret() -> None:
    shown = {
        "EASYDEL_RAGGED_KERNEL": "xla",
        "EASURGE_TOKENIZER_ENDPOINT": "ipc:///tmp/x",
        "FORCE_NATIVE_RUNTIME": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/x",
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "--xla_a=b",
    }
    hidden = {
        "EASYDEL_HUB_TOKEN": "a",
        "EASYDEL_GCS_CLIENT": "/key.json",
        "EJKERNEL_DB_PASSWORD": "a",
        "JAX_KEY": "a",
        "XLA_PROXY": "https://me:pass@host",
    }
    others = {"HF_TOKEN": "a", "AWS_SECRET_ACCESS_KEY": "a", "PATH": "/bin", "AJAX_X": "a", "EASYDELX": "a"}
    found = system.environment({**others, **hidden, **shown})
    assert found == {**shown, **dict.fromkeys(hidden, system.HIDDEN)}
    assert list(found) == sorted(found)


def test_plugins_of_jax_are_found_by_their_names_and_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(dist=SimpleNamespace(name="a-chip-for-jax")), SimpleNamespace(dist=None)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points if group == "jax_plugins" else [])
    names = ("jax", "jax-cuda12-plugin", "jax_cuda12_pjrt", "jaxtyping", "jaxlib", None)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [SimpleNamespace(name=name) for name in names])
    assert system.jax_plugins() == ["a-chip-for-jax", "jax-cuda12-plugin", "jax_cuda12_pjrt"]


# demo, as far as it goes without a model


def test_demo_without_the_host_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda *, converts: ["easydel", "gguf"])
    result = invoke("demo")
    assert result.exit_code == 2
    assert "pip install 'easydel-ragged-plugin[demo]'" in result.output


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
