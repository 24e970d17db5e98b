"""Fixtures that more than one test file needs: the repository, its distributions, interpreters that have them."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

RunPython = Callable[..., str]

LONGEST = (
    "test_pallas_gpu.py",
    "test_xla.py",
    "test_turboquant.py",
    "test_demo.py",
    "test_sharding.py",
    "test_startup_host.py",
    "test_processes.py",
    "test_numbers.py",
    "test_kernels.py",
    "test_docs.py",
    "test_gpu_lowering.py",
    "test_quantized_caches.py",
    "test_contract.py",
    "test_gpu_contract.py",
    "test_engine.py",
)
"""A file goes to one worker: these begin first, so that none of them is left to one worker when the other is done."""


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("easydel_ragged_plugin")
    versions = []
    for name in ("jax", "easydel", "ejkernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return f"tested: {spec.origin if spec else 'nothing'}, with {', '.join(versions)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist; a run without workers keeps the usual order
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if importlib.util.find_spec("easydel") is None:
        skip = pytest.mark.skip(reason="no EasyDeL in this environment")
        for item in items:
            if item.get_closest_marker("host") is not None:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """The garbage collector passes over what is in memory by now: a host and thousands of tests, which stay.

    Tracing makes many objects, and with a million others to look through a quarter of its time went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module() -> Iterator[None]:
    """Programs are freed with the module that compiled them: see ``testing.kernel_driver.MOST_MEMORY_MAPS``."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure and are not what such tests are about."""
    from easydel_ragged_plugin.bench import run
    from easydel_ragged_plugin.bench.machine import Limits

    class Machine(contextlib.nullcontext):
        limits = Limits(1e10, 1e11)

        def read_rate_for(self, size: float) -> float:
            return 1e10

        def gemm_rate(self) -> float:
            return 1e11

    monkeypatch.setattr(run, "Machine", lambda: Machine(Machine()))


@pytest.fixture
def quick_to_compile() -> Iterator[None]:
    """XLA optimizes little: for large programs that run once and whose code is not what is tested.

    Such is Pallas' interpreter.
    """
    yield from _optimizing_little(True)


@pytest.fixture
def as_users_compile() -> Iterator[None]:
    """XLA optimizes as it does for users, also where the environment says that it shall not."""
    yield from _optimizing_little(False)


def _optimizing_little(little: bool) -> Iterator[None]:
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", little)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def uv() -> str:
    """The uv executable: the one installed beside pytest, or the one on PATH."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        pytest.fail("got no uv executable, wanted one beside pytest or on PATH; run: pip install uv")
    return found


@pytest.fixture(scope="session")
def run() -> RunPython:
    """Run a command in a clean environment and return its output, stdout and stderr together.

    Fails with the output when the exit status is not ``status``. ``environment`` adds variables.
    """

    def run(
        *command: str | os.PathLike[str],
        environment: dict[str, str] | None = None,
        status: int = 0,
        cwd: Path | None = None,
        timeout_s: float = 300,
    ) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EASYDEL_RAGGED")}
        for name in ("PYTHONPATH", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"):
            clean.pop(name, None)
        finished = subprocess.run(
            [os.fspath(part) for part in command],
            env={**clean, **(environment or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert finished.returncode == status, f"exit status {finished.returncode}:\n{finished.stdout}"
        return finished.stdout

    return run


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory, repository: Path, uv: str, run: RunPython) -> Path:
    """A folder with the sdist, and with the wheel that is built from it, without the native library."""
    folder = tmp_path_factory.mktemp("dist")
    pure = {"EASYDEL_RAGGED_NATIVE_BUILD": "off"}
    run(uv, "build", "--quiet", repository, "--out-dir", folder, environment=pure)
    return folder


@pytest.fixture(scope="session")
def new_python(tmp_path_factory: pytest.TempPathFactory, uv: str, run: RunPython) -> Callable[..., Path]:
    """Make a fresh virtual environment with the given installs (no dependencies) and return its interpreter."""

    def new_python(*installs: str | os.PathLike[str]) -> Path:
        folder = tmp_path_factory.mktemp("venv")
        run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv")
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        # Copies: tests spoil installed files, which uv would otherwise share with its cache.
        how = ("--quiet", "--no-deps", "--compile-bytecode", "--link-mode=copy")
        # Where the files land does not depend on the native library, which takes a minute to compile.
        pure = {"EASYDEL_RAGGED_NATIVE_BUILD": "off"}
        run(uv, "pip", "install", *how, "--python", python, *installs, environment=pure)
        return python

    return new_python


@pytest.fixture(scope="session")
def bare_python(distributions: Path, new_python: Callable[..., Path]) -> Path:
    """An interpreter that has this package's wheel and nothing else: no JAX, no EasyDeL."""
    (wheel,) = distributions.glob("*.whl")
    return new_python(wheel)


@pytest.fixture
def python(bare_python: Path, run: RunPython) -> Callable[..., str]:
    """Run code in the bare environment with some folders on PYTHONPATH."""

    def python(code: str, *paths: str, options: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> str:
        variables = {"PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        return run(bare_python, *options, "-c", textwrap.dedent(code), environment=variables)

    return python
