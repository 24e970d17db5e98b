"""``easydel-ragged doctor``: its verdict and exit code, its forms, and the facts that it shows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import invoke, run_command

from easydel_ragged_plugin import system, terminal
from easydel_ragged_plugin.cli import doctor
from easydel_ragged_plugin.config import CACHE_VARIABLE, KERNEL_VARIABLE
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import cpu_native

HAS_HOST = importlib.util.find_spec("easydel") is not None

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
    assert "Run: pip install easydel pillow torch" in result.stdout
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


@pytest.mark.parametrize(
    ("backend", "transparent", "libc", "tunables", "native", "noted"),
    [
        ("cpu", "madvise", "glibc 2.36", "", "not used", True),
        ("cpu", "madvise", "glibc 2.36", "", None, True),
        ("cpu", "madvise", "glibc 2.36", "", "used", False),
        ("cpu", "madvise", "glibc 2.35", "glibc.malloc.check=3", "not used", True),
        ("cpu", "madvise", "glibc 2.36", "glibc.malloc.check=3:glibc.malloc.hugetlb=1", "not used", False),
        ("cpu", "madvise", "glibc 2.34", "", "not used", False),
        ("cpu", "madvise", None, "", "not used", False),
        ("cpu", "always", "glibc 2.36", "", "not used", False),
        ("cpu", None, "glibc 2.36", "", "not used", False),
        ("tpu", "madvise", "glibc 2.36", "", "not used", False),
    ],
)
def test_huge_pages_are_named_where_they_can_be_requested(
    backend: str,
    transparent: str | None,
    libc: str | None,
    tunables: str,
    native: str | None,
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "huge_pages", lambda: {"transparent": transparent})
    monkeypatch.setattr(system, "operating_system", lambda: {"libc": libc})
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    notes = doctor._huge_pages(backend, {"xla": {}, "cpu_native": {} if native is None else {"huge_pages": native}})
    assert ("GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in "".join(notes)) == noted
