"""Everything that CI runs, each in an environment that nox makes: ``nox -f tests/noxfile.py``.

The package is built into a wheel and that wheel is tested, start-up files and all; pytest runs from this folder, so
that nothing is imported from the checkout. Two hosts are tested in full, because one wheel serves both; the examples
of README and docs are tests like any other. Pass
``-- -k name`` to hand options to pytest, ``-s alone`` to run one session, ``-r`` to keep environments.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import nox

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
HOSTS = ("0.3.0", "0.2.0.2")
# Between the hosts' and the newest, which `alone` has. Lowering for GPUs uses what JAX changes most often.
OTHER_JAX = ("0.10.2", "0.11.2")
# Both judge by rules that change from version to version.
RUFF, MYPY = "ruff==0.17.6", "mypy==2.4.1"

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "uv"
nox.options.envdir = ROOT / ".nox"
nox.options.sessions = ["lint", "types", "native", "alone", "gpu", "lowering", "host"]
nox.options.error_on_missing_interpreters = False


def pip_setting(variable: str, option: str) -> str | None:
    """What pip was told: uv reads none of pip's settings, and the machine's owner had reasons for them."""
    if variable in os.environ:
        return os.environ[variable]
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{option}"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None if asked.returncode == 0 else None


for variable, pip_variable, option in (
    ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "index-url"),
    ("UV_FIND_LINKS", "PIP_FIND_LINKS", "find-links"),
    ("SSL_CERT_FILE", "PIP_CERT", "cert"),
):
    setting = pip_setting(pip_variable, option)
    if setting:
        os.environ.setdefault(variable, setting)
os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")  # interpreters are the machine's own
os.environ.setdefault("UV_HTTP_TIMEOUT", "180")

# A folder of wheels beside the index holds the CPU build of torch, whose version with "+cpu" counts as newer than
# the index's, but only of this version and for this Python. Without it, torch is what the index has.
HAS_CPU_TORCH = bool(os.environ.get("UV_FIND_LINKS")) and sys.version_info[:2] == (3, 11)
TORCH = "torch==2.13.0" if HAS_CPU_TORCH else "torch"


def newest_python() -> str:
    """``3.13`` where the machine has it, else the one that runs nox."""
    on_path = shutil.which("python3.13")
    # What is on PATH may be pyenv's stand-in for a version that is not switched on.
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob("3.13*/bin/python3.13")
    for candidate in [*([on_path] if on_path else []), *map(str, sorted(of_pyenv))]:
        if subprocess.run([candidate, "-c", "import ssl"], capture_output=True, check=False).returncode == 0:
            return candidate
    return sys.executable


@functools.cache
def wheel() -> Path:
    """The wheel under test, built once in a run from the sources as they are, through the sdist."""
    folder = ROOT / ".nox" / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    beside = Path(sys.executable).with_name("uv")
    command = [str(beside) if beside.exists() else "uv", "build", "--quiet", "--out-dir", str(folder), str(ROOT)]
    # With a compiler here, a wheel without the native library is a defect and not a fallback.
    native = "require" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "auto"
    subprocess.run(command, check=True, env={"EASYDEL_RAGGED_NATIVE_BUILD": native, **os.environ})
    (built,) = folder.glob("*.whl")
    print(f"built {built.name}", flush=True)
    return built


def install(session: nox.Session, extras: str, *others: str) -> None:
    """Install the wheel with ``extras``, never a cached build of an earlier state of the sources."""
    session.install(
        "--compile-bytecode",
        "--reinstall-package=easydel-ragged-plugin",
        f"easydel-ragged-plugin[{extras}] @ {wheel().as_uri()}",
        *others,
    )


def pytest(session: nox.Session, *arguments: str, **variables: str) -> None:
    session.chdir(TESTS)
    # Processes share what they compile, and nothing that an earlier run or the machine's user has compiled. The host
    # sets a folder of its own, under the home folder, unless COMPILE_FUNC_DIR names one.
    compiled = Path(session.virtualenv.location, "compiled")
    shutil.rmtree(compiled, ignore_errors=True)
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": "",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "COMPILE_FUNC_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        **variables,
    }
    # Two workers: compiling is most of the time and takes one core. A class stays with one worker, for its programs.
    # conftest.py says what comes first: pytest-xdist would begin with what has most tests and end with what is longest.
    workers = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
    session.run("pytest", *workers, *arguments, *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install(RUFF)
    session.chdir(ROOT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types, with JAX's and without the host's, which has none."""
    install(session, "bench,test", MYPY)
    session.chdir(ROOT)
    session.run("mypy")


@nox.session(venv_backend="none")
def native(session: nox.Session) -> None:
    """The C++ alone, on random problems with metadata of every kind: under sanitizers, fuzzed, under valgrind.

    A tool that the machine does not have is named and passed over; wheels are tested without it.
    """
    builds = ROOT / ".nox" / "native"

    def build(name: str, compiler: str, *options: str, target: str = "ragged_harness") -> str | None:
        if shutil.which(compiler) is None or shutil.which("cmake") is None:
            session.warn(f"{name}: not run, because there is no {compiler} or no cmake here")
            return None
        flags = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", f"-DCMAKE_CXX_COMPILER={compiler}", *options)
        session.run("cmake", "-S", str(ROOT / "native"), "-B", str(builds / name), *flags, silent=True)
        session.run("cmake", "--build", str(builds / name), "--target", target, silent=True)
        return str(builds / name / target)

    tests = "-DRAGGED_TESTS=ON"
    # Every instruction set is built where its loads and stores are what is looked at; elsewhere one or two will do.
    one = "-DRAGGED_LEVELS=avx2"

    def addresses() -> None:
        harness = build("asan", "g++", tests, "-DRAGGED_SANITIZE=address,undefined")
        if harness:
            session.run(harness, "300", env={"UBSAN_OPTIONS": "halt_on_error=1"})

    def races() -> None:
        harness = build("tsan", "g++", tests, one, "-DRAGGED_SANITIZE=thread")
        if harness:
            session.run(harness, "100")

    def fuzzed() -> None:
        instrumented = ("-DRAGGED_FUZZ=ON", "-DRAGGED_SANITIZE=address,fuzzer-no-link", "-DRAGGED_LEVELS=avx2;amx_bf16")
        fuzzer = build("fuzz", "clang++", *instrumented, target="ragged_fuzz")
        if fuzzer:
            # What it finds, and what it finds slow, is kept beside the build and not in the sources.
            found = f"-artifact_prefix={builds / 'fuzz'}/"
            session.run(fuzzer, "-max_total_time=30", "-print_final_stats=1", "-seed=1", found)

    def uninitialized() -> None:
        plain = build("plain", "g++", tests, one)
        if plain and shutil.which("valgrind"):
            session.run("valgrind", "--quiet", "--error-exitcode=1", plain, "6", "0", "avx2", external=True)

    def aarch64() -> None:
        system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static")
        cross = build("aarch64", "aarch64-linux-gnu-g++", tests, *system)
        if cross and shutil.which("qemu-aarch64"):
            session.run("qemu-aarch64", cross, "30", external=True)

    # Two at a time, as two workers run the tests: one compiles while the other runs. The longest begin.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = [pool.submit(tool) for tool in (addresses, fuzzed, races, uninitialized, aarch64)]
        for each in started:
            each.result()


@nox.session(python=newest_python())
def alone(session: nox.Session) -> None:
    """With JAX alone, the newest there is: the functions and kernels need no host."""
    install(session, "test")
    pytest(session)


@nox.session
def gpu(session: nox.Session) -> None:
    """The GPU kernels through NVIDIA's compilers, for cards that are described: no GPU, no driver.

    They come in 200 MB of wheels; what jax[cuda12] brings beside them is for running.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        session.skip("NVIDIA's compilers come as wheels for Linux on x86-64")
    install(session, "test", "jax==0.9.2", "jax-cuda12-plugin==0.9.2", "nvidia-cuda-nvcc-cu12")
    # What the compilers print is read: each program has to be compiled.
    variables = {"EASYDEL_RAGGED_TEST_GPU_COMPILER": "require", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    pytest(session, "test_gpu_compile.py", **variables)


@nox.session(python=newest_python())
@nox.parametrize("version", OTHER_JAX, ids=OTHER_JAX)
def lowering(session: nox.Session, version: str) -> None:
    """What the GPU kernels are lowered to, with JAX versions that no other session has."""
    install(session, "test", f"jax=={version}")
    pytest(session, "test_gpu_lowering.py")


@nox.session
@nox.parametrize("version", HOSTS, ids=HOSTS)
def host(session: nox.Session, version: str) -> None:
    """Everything, on one version of EasyDeL."""
    install(session, "bench,demo,test", f"easydel=={version}", TORCH)
    # The GPU kernel's numbers in Pallas' interpreter take minutes, and no host takes part: `alone` has them, and all
    # that is marked `once`. Its lowering is tested with each host's JAX, and so are the operations that run it.
    pytest(session, "--ignore-glob=test_pallas_gpu*.py", "-m", "not once")
