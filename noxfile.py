"""Every check of this project, each in an environment of its own.

``nox`` runs the quick checks, ``nox -t all`` every check, ``nox -l`` lists them; ``-s kernels`` runs one session,
``-r`` keeps its environment, ``-- -k name`` hands options to pytest.

The package is built into a wheel and the wheel is tested, start-up files included; pytest runs in ``tests/``, so that
nothing is imported from the checkout. What is installed beside the wheel is in the dependency groups of pyproject.toml.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
TESTS = ROOT / "tests"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

# Two versions of EasyDeL are tested in full, because one wheel serves both. The newest comes first.
HOSTS = ("0.3.0", "0.2.0.2")
# Between the hosts' and the newest, which `kernels` has. Lowering for GPUs uses what JAX changes most often.
OTHER_JAX = ("0.10.2", "0.11.2")
# The TPU kernel is tested with the JAX of the newest EasyDeL, and in brief with that of the older one and the newest.
# jax[tpu] names the libtpu of its version. Pallas for TPUs of JAX 0.9.2 imports absl-py, and does not declare it.
TPU_JAX = ("jax[tpu]==0.9.2", "absl-py")
OTHER_TPU_JAX = {"0.8.3": "jax[tpu]==0.8.3", "newest": "jax[tpu]"}

# The GPU kernels are compiled with the JAX of the newest EasyDeL, and in brief with the newest.
GPU_JAX = {
    "0.9.2": (("jax==0.9.2", "jax-cuda12-plugin==0.9.2"), ("test_gpu_compile.py",)),
    "newest": (
        ("jax-cuda12-plugin",),
        ("test_gpu_compile.py::test_prompts_run_on_the_tensor_cores_of_the_generation",),
    ),
}

# What the quick sessions run. Where `alone` and `host` would run it again, with the same JAX and EasyDeL, they leave it
# out.
KERNELS = (
    "test_native.py",
    "test_pallas_gpu.py::TestPallasGPUInBrief",
    "test_turboquant.py::TestCpuNative",
    "test_turboquant.py::TestTurboQuantInBrief",
    "test_xla.py::TestXlaInBrief",
)
# What NVIDIA's compilers print is read: each program has to be compiled.
GPU_VARIABLES = {"EASYDEL_RAGGED_TEST_GPU_COMPILER": "require", "JAX_ENABLE_COMPILATION_CACHE": "false"}
# The interpreter of the Mosaic kernel needs more threads than a small machine has processors.
MOSAIC = (
    "test_pallas_mosaic_gpu.py::TestMosaicInBrief",
    "test_pallas_mosaic_gpu.py::test_layers_of_a_loop_share_what_is_prepared",
    "test_trials.py::test_an_interpreted_trial_from_end_to_end",
)
MOSAIC_VARIABLES = {"NPROC": "8", "EASYDEL_RAGGED_TEST_MOSAIC": "require"}
TPU_IN_BRIEF = ("test_pallas_tpu.py::TestPallasTPUInBrief",)
SERVED = ("test_contract.py::TestOursV2", "test_contract.py::TestOursV3", "test_demo.py")
# Compiling is most of the time. The quick sessions compile as users do. In `alone` and `host` tests with the fixture
# `as_users_compile` do; in the others LLVM optimizes little, after the same passes of XLA.
QUICK_TO_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

nox.needs_version = ">=2025.2.9"  # dependency groups
nox.options.default_venv_backend = "uv"
nox.options.envdir = ROOT / ".nox"
nox.options.error_on_missing_interpreters = False

QUICK = ["all"]
REST = ["all", "rest"]  # `.ci/run` runs the quick sessions, then those of tag `rest`


def pip_setting(variable: str, option: str) -> str | None:
    """A setting of pip, from its environment variable or its configuration: uv reads neither."""
    if variable in os.environ:
        return os.environ[variable]
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{option}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


for variable, pip_variable, option in (
    ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "index-url"),
    ("UV_FIND_LINKS", "PIP_FIND_LINKS", "find-links"),
    ("SSL_CERT_FILE", "PIP_CERT", "cert"),
):
    setting = pip_setting(pip_variable, option)
    if setting:
        os.environ.setdefault(variable, setting)
os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")  # the machine's interpreters are used, none is downloaded
os.environ.setdefault("UV_HTTP_TIMEOUT", "180")

# A folder of wheels beside the index holds the CPU build of torch, whose version with "+cpu" counts as newer than
# the index's, but only of this version and for this Python. Without it, torch is what the index has.
HAS_CPU_TORCH = bool(os.environ.get("UV_FIND_LINKS")) and sys.version_info[:2] == (3, 11)
TORCH = "torch==2.13.0" if HAS_CPU_TORCH else "torch"


def newest_python() -> str:
    """Path of a Python 3.13 where the machine has one, else of the Python that runs nox."""
    on_path = shutil.which("python3.13")
    # What is on PATH may be pyenv's stand-in for a version that is not switched on.
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob("3.13*/bin/python3.13")
    for candidate in [*([on_path] if on_path else []), *map(str, sorted(of_pyenv))]:
        if subprocess.run([candidate, "-c", "import ssl"], capture_output=True, check=False).returncode == 0:
            return candidate
    return sys.executable


def group(name: str) -> tuple[str, ...]:
    """The requirements of a dependency group of pyproject.toml."""
    return tuple(nox.project.dependency_groups(PYPROJECT, name))


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
    return built


def install(session: nox.Session, extras: str, *others: str) -> None:
    """Install the wheel with ``extras``, never a cached build of an earlier state of the sources, and ``others``."""
    session.log("Building the wheel and its C++, once in a run, and installing it: about 1 minute")
    session.install(
        "--compile-bytecode",
        "--reinstall-package=easydel-ragged-plugin",
        f"easydel-ragged-plugin{extras} @ {wheel().as_uri()}",
        *others,
    )


def environment(session: nox.Session) -> dict[str, str]:
    """Variables for the programs that test: the CPU, the installed package, and a folder for compiled programs."""
    # Processes share what they compile, and nothing that an earlier run or the machine's user has compiled. The host
    # sets a folder of its own, under the home folder, unless COMPILE_FUNC_DIR names one.
    compiled = Path(session.virtualenv.location, "compiled")
    shutil.rmtree(compiled, ignore_errors=True)
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": "",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "COMPILE_FUNC_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def compilers() -> list[str]:
    """Paths of the oldest and the newest GCC and clang that PATH has, ``g++`` and ``g++-11`` alike."""
    found: dict[str, dict[tuple[int, ...], str]] = {"g": {}, "clang": {}}
    for folder in os.environ["PATH"].split(os.pathsep):
        for path in sorted(Path(folder).glob("*++*")):
            named = re.fullmatch(r"(g|clang)\+\+(-\d+)?", path.name)
            if named is None:
                continue
            asked = subprocess.run(
                [path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False
            )
            version = re.match(r"\d+(\.\d+)*", asked.stdout)
            if version is not None:
                found[named[1]].setdefault(tuple(map(int, version[0].split("."))), str(path))
    return [of[version] for of in found.values() if of for version in sorted({min(of), max(of)})]


def pytest(session: nox.Session, *arguments: str, dist: str = "loadscope", **variables: str) -> None:
    """Run pytest in ``tests/`` with ``arguments`` and those of nox's command line.

    ``dist`` is pytest-xdist's: with ``worksteal`` the tests of one file, which share no program, run on both workers.
    """
    session.chdir(TESTS)
    # Two workers: compiling is most of the time and takes one core. A class stays with one worker, for its programs.
    # conftest.py says what comes first: pytest-xdist would begin with what has most tests and end with what is longest.
    workers = ("-n", "2", "--dist", dist, "--no-loadscope-reorder")
    session.run("pytest", *workers, *arguments, *session.posargs, env={**environment(session), **variables})


@contextlib.contextmanager
def measured(session: nox.Session) -> Iterator[dict[str, str]]:
    """Environment variables that have coverage of branches measured; below the floor of pyproject.toml it fails.

    Coverage starts with each Python process of the environment, so pytest-xdist's workers, the processes that tests
    start and the start-up line are measured without more ado.
    """
    folder = Path(session.virtualenv.location, "coverage")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    variables = {"COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"), "COVERAGE_FILE": str(folder / "measured")}
    yield variables
    session.chdir(ROOT)
    session.run("coverage", "combine", "--quiet", env={"COVERAGE_FILE": variables["COVERAGE_FILE"]})
    # A part of the tests has no floor.
    floor = ["--fail-under=0"] if session.posargs else []
    session.run("coverage", "report", *floor, env={"COVERAGE_FILE": variables["COVERAGE_FILE"]})


def without(tests: tuple[str, ...]) -> list[str]:
    """pytest's options that leave files or classes in ``tests/`` out."""
    # By prefix: the end of a class's name has to be in it.
    return [f"--deselect=tests/{each}::" for each in tests]


# The quick sessions.


@nox.session(tags=QUICK)
def lint(session: nox.Session) -> None:
    """Style, format and spelling; what `pre-commit run --all-files` runs."""
    session.install(*group("lint"))
    session.chdir(ROOT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("typos", ".")
    sources = (path for path in (ROOT / "native").rglob("*") if path.suffix in (".cc", ".h"))
    session.run("clang-format", "--dry-run", "--Werror", *map(str, sources))
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    if shutil.which("actionlint") is not None:  # its package fetches it from elsewhere, so it is no requirement
        session.run("actionlint", *workflows, external=True)


@nox.session(tags=QUICK)
def types(session: nox.Session) -> None:
    """Static types of the package, the tests, the benchmarks and the build, without EasyDeL, which is untyped."""
    session.install(*PYPROJECT["project"]["dependencies"], *group("types"))
    session.chdir(ROOT)
    session.run("mypy")


@nox.session(python=newest_python(), tags=QUICK)
def kernels(session: nox.Session) -> None:
    """All kernels on the newest JAX, the GPU kernel in an interpreter."""
    install(session, "", *group("test"), "absl-py")
    session.log("Kernels against the float64 oracle: about 4 minutes, the GPU kernel first")
    pytest(session, *KERNELS)
    if not session.posargs:  # which may select none of these
        pytest(session, *MOSAIC, **MOSAIC_VARIABLES)


@nox.session(tags=QUICK)
def easydel(session: nox.Session) -> None:
    """The newest EasyDeL: the contract of our operations, and a real model against transformers token for token."""
    install(session, "[demo]", *group("test"), f"easydel=={HOSTS[0]}", TORCH)
    session.log("A real model through EasyDeL's engine, and the contract of our operations: about 2 minutes")
    pytest(session, *SERVED)


# The rest.


@nox.session(venv_backend="none", default=False, tags=REST)
def native(session: nox.Session) -> None:
    """The C++ alone, on random problems with metadata of every kind: under sanitizers, fuzzed, under valgrind.

    So is what the oldest and the newest GCC and clang of the machine make of it.

    A tool that the machine does not have is named and passed over; wheels are tested without it.
    """
    builds = ROOT / ".nox" / "native"

    def build(name: str, compiler: str, *options: str, targets: tuple[str, ...] = ("ragged_harness",)) -> list[str]:
        """The programs ``targets``; none where the machine lacks the tools."""
        if shutil.which(compiler) is None or shutil.which("cmake") is None:
            session.warn(f"{name}: not run, because there is no {compiler} or no cmake here")
            return []
        flags = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DRAGGED_WERROR=ON", *options)
        folder = str(builds / name)
        session.run(
            "cmake", "-S", str(ROOT / "native"), "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler}", *flags, silent=True
        )
        session.run("cmake", "--build", folder, "--parallel", "2", "--target", *targets, silent=True)
        return [str(builds / name / target) for target in targets]

    tests = "-DRAGGED_TESTS=ON"
    both = ("ragged_unit", "ragged_harness")  # the first takes no arguments and ignores those of the second
    # Every instruction set is built where its loads and stores are what is looked at; elsewhere one or two will do.
    one = "-DRAGGED_LEVELS=avx2"

    def addresses() -> None:
        for program in build("asan", "g++", tests, "-DRAGGED_SANITIZE=address,undefined", targets=both):
            session.run(program, "300", env={"UBSAN_OPTIONS": "halt_on_error=1"})

    def races() -> None:
        for program in build("tsan", "g++", tests, one, "-DRAGGED_SANITIZE=thread", targets=both):
            session.run(program, "100")

    def fuzzed() -> None:
        instrumented = ("-DRAGGED_FUZZ=ON", "-DRAGGED_SANITIZE=address,fuzzer-no-link", "-DRAGGED_LEVELS=avx2;amx_bf16")
        # What it finds, and what it finds slow, is kept beside the build and not in the sources.
        found = f"-artifact_prefix={builds / 'fuzz'}/"
        for program in build("fuzz", "clang++", *instrumented, targets=("ragged_fuzz",)):
            session.run(program, "-max_total_time=30", "-print_final_stats=1", "-seed=1", found)

    def uninitialized() -> None:
        for program in build("plain", "g++", tests, one):
            if shutil.which("valgrind") is None:
                session.warn("plain: not run, because there is no valgrind here")
                continue
            session.run("valgrind", "--quiet", "--error-exitcode=1", program, "6", "0", "avx2", external=True)

    def aarch64() -> None:
        system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static")
        for program in build("aarch64", "aarch64-linux-gnu-g++", tests, *system, targets=both):
            if shutil.which("qemu-aarch64") is None:
                session.warn("aarch64: built and not run, because there is no qemu-aarch64 here")
                continue
            session.run("qemu-aarch64", program, "30", external=True)

    def tiles() -> None:
        # On machines with AVX-512 that multiplies bfloat16; elsewhere the harness leaves the instruction set out.
        emulated = ("-DRAGGED_EMULATE_AMX=ON", "-DRAGGED_LEVELS=avx2;amx_bf16", "-DCMAKE_CXX_FLAGS=-O2")
        for program in build("tiles", "g++", tests, *emulated):
            session.run(program, "500")

    def every_compiler() -> None:
        others = [each for each in compilers() if Path(each).resolve() != Path(shutil.which("g++") or "").resolve()]
        for compiler in others:  # g++ has built all that comes before
            name = Path(compiler).name
            session.log(f"{name}: every instruction set")
            for program in build(name, compiler, tests, "-DCMAKE_CXX_FLAGS=-O0", targets=both):
                session.run(program, "20")

    session.log("Sanitizers, fuzzer, valgrind, ARM and other compilers, two at a time: about 4 minutes")
    # Two at a time, as two workers run the tests: one compiles while the other runs. The longest begin.
    tools = (addresses, fuzzed, races, uninitialized, tiles, aarch64, every_compiler)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = [pool.submit(tool) for tool in tools]
        for each in started:
            each.result()


CHOICE = "from easydel_ragged_plugin.kernels import cpu_native as n; print(n.isa(), *n.isa_levels())"


@nox.session(default=False, tags=["all"])  # not for each change: zig makes a C++ library for each system first
def wheels(session: nox.Session) -> None:
    """What an index takes, into dist/: the sdist, and a wheel for each system of native/targets.toml, by zig's clang.

    Each is built twice, byte for byte the same, and looked at. What can run here is tested: the wheel for this machine,
    installed into an empty environment, and for Linux on ARM the C++ in an emulator. ``-- x86_64-macos.11.0`` builds
    for that system alone.
    """
    targets = nox.project.load_toml(ROOT / "native" / "targets.toml")
    unknown = [target for target in session.posargs if target not in targets]
    if unknown:
        session.error(f"got the systems {', '.join(unknown)}, wanted some of {', '.join(targets)}")
    session.install(*group("wheels"))
    session.log("Wheels for five systems: about 30 minutes, and less where zig's C++ libraries are there already")
    dist, folder = ROOT / "dist", ROOT / ".nox" / "wheels-made"
    for earlier in dist.glob("easydel_ragged_plugin-*"):
        earlier.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(ROOT / ".nox" / "zig")}

    def build(kind: str, source: Path, **variables: str) -> Path:
        """One distribution into dist/, built twice."""
        made = []
        for out in (folder / "first", folder / "second"):
            shutil.rmtree(out, ignore_errors=True)
            command = ("uv", "build", "--quiet", f"--{kind}", "--out-dir", str(out), str(source))
            session.run(*command, env={**zig, **variables})
            made += [path for path in out.iterdir() if path.suffix in (".whl", ".gz")]
        first, second = made
        if first.name != second.name or first.read_bytes() != second.read_bytes():
            session.error(f"{first} and {second}: got different bytes from the same sources, wanted the same")
        dist.mkdir(exist_ok=True)
        return Path(shutil.copy(first, dist / first.name))

    sdist = build("sdist", ROOT)
    for target in session.posargs or targets:
        system, processor, tag = (targets[target][key] for key in ("system", "processor", "tag"))
        session.log(f"{target}: the wheel {tag}")
        made = build("wheel", sdist, EASYDEL_RAGGED_NATIVE_TARGET=target)
        session.run("python", str(TESTS / "wheel_check.py"), str(made))
        older = re.sub(r"_\d+_\d+_", "_10_9_" if system == "Darwin" else "_2_5_", tag)
        if older != tag:  # the same wheel as if it were for an older system: the check has to refuse it
            renamed = shutil.copy(made, folder / made.name.replace(tag, older))
            check = ("python", str(TESTS / "wheel_check.py"), str(renamed))
            said = session.run(*check, silent=True, success_codes=[1])
            if f"that of {older}" not in str(said):
                session.error(f"wheel_check.py: got {said} for {older}, wanted the libraries of {tag} refused")
        if system == "Linux":
            said = session.run("auditwheel", "show", str(made), silent=True)
            if tag not in re.sub(r"\s+", " ", str(said)).partition("is consistent with")[2]:
                session.error(f"got from auditwheel, wanted {tag}:\n{said}")
        if (system, processor) == (platform.system(), platform.machine()):
            session.notify("tried", posargs=[])
        if system == "Linux":
            # On ARM the programs are linked with another C library, so that they are whole and run in an emulator.
            emulated = {"aarch64": "qemu-aarch64"} if processor != platform.machine() else {}
            programs = target.replace("gnu.2.17", "musl") if emulated else target
            run_native_programs(session, programs, system, processor, emulated.get(processor), zig)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.glob("easydel_ragged_plugin-*"))))


@nox.session(default=False)
def tried(session: nox.Session) -> None:
    """The wheel of dist/ for this machine, in an empty environment: its native library. `wheels` asks for it."""
    system, machine = platform.system(), platform.machine()
    targets = nox.project.load_toml(ROOT / "native" / "targets.toml").values()
    tags = [each["tag"] for each in targets if (each["system"], each["processor"]) == (system, machine)]
    found = [path for tag in tags for path in (ROOT / "dist").glob(f"easydel_ragged_plugin-*-{tag}.whl")]
    if len(found) != 1:
        session.error(f"got {len(found)} wheels for {system} on {machine} in dist/, wanted one. Run: nox -s wheels")
    session.install("--reinstall-package=easydel-ragged-plugin", str(found[0]), *group("test"))
    session.chdir(TESTS)
    variables = environment(session)
    of_found = session.run("python", "-c", CHOICE, silent=True, env=variables)
    if system == "Linux":  # the same instruction sets as with the compiler of this machine
        folder = Path(session.virtualenv.location, "local")
        with zipfile.ZipFile(wheel()) as archive:
            local = [name for name in archive.namelist() if name.startswith("easydel_ragged_plugin/lib/")]
            archive.extractall(folder, local)
        for library in local:
            loaded = {**variables, "EASYDEL_RAGGED_NATIVE_LIBRARY": str(folder / library)}
            of_local = session.run("python", "-c", CHOICE, silent=True, env=loaded)
            if of_found != of_local:
                session.error(f"got the instruction sets {of_found} in {found[0].name}, wanted those here: {of_local}")
    pytest(session, "test_native_library.py", "test_native.py", "-k", "not hostile and not every_instruction_set")


def run_native_programs(
    session: nox.Session, target: str, system: str, processor: str, emulator: str | None, zig: dict[str, str]
) -> None:
    """The C++ alone, compiled by zig for ``target``: its unit tests, and random problems against an oracle."""
    if emulator is not None and shutil.which(emulator) is None:
        session.warn(f"{target}: not run, because there is no {emulator} here")
        return
    build = ROOT / ".nox" / "native" / target
    configure = (
        f"-DCMAKE_SYSTEM_NAME={system}",
        f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        f"-DCMAKE_CXX_COMPILER={session.bin}/python-zig;c++;-target;{target}",
        "-DRAGGED_TESTS=ON",
    )
    command = ("cmake", "-S", str(ROOT / "native"), "-B", str(build), "-G", "Ninja", *configure)
    session.run(*command, silent=True, env=zig)
    session.run("cmake", "--build", str(build), silent=True, env=zig)
    first = () if emulator is None else (emulator,)
    session.run(*first, str(build / "ragged_unit"), external=True)
    session.run(*first, str(build / "ragged_harness"), "30", external=True)


@nox.session(default=False, tags=REST)
def docs(session: nox.Session) -> None:
    """The documentation site, in .nox/site: a link or anchor that leads nowhere fails. And the next release notes."""
    session.install(*group("docs"))
    session.chdir(ROOT)
    site = ROOT / ".nox" / "site"
    # Material announces the future of MkDocs at each start.
    variables = {"NO_MKDOCS_2_WARNING": "true"}
    session.run("mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml", "--site-dir", str(site), env=variables)
    session.run("towncrier", "build", "--draft", "--version", "next")


@nox.session(python=newest_python(), default=False, tags=REST)
def alone(session: nox.Session) -> None:
    """All that needs no EasyDeL, on the newest JAX; of the kernels what `kernels` leaves out."""
    install(session, "", *group("test"))
    session.log("The functions, selection, sharding, start-up, commands, examples of the docs: about 12 minutes")
    pytest(session, "--ignore=test_pallas_tpu.py", *without(KERNELS), **QUICK_TO_COMPILE)  # `tpu` has it


@nox.session(python=newest_python(), default=False, tags=REST)
@nox.parametrize("version", tuple(GPU_JAX), ids=tuple(GPU_JAX))
def gpu(session: nox.Session, version: str) -> None:
    """The GPU kernels through NVIDIA's compilers, for cards that are described: no GPU, no driver.

    They come in 200 MB of wheels; what jax[cuda12] brings beside them is for running. With the newest JAX the Mosaic
    kernel, and Triton's on a card of each generation.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        session.skip("NVIDIA's compilers come as wheels for Linux on x86-64")
    packages, tests = GPU_JAX[version]
    # Pallas' Mosaic GPU backend of JAX 0.9.2 imports absl-py, and does not declare it.
    install(session, "", *group("test"), *packages, "nvidia-cuda-nvcc-cu12", "absl-py")
    session.log("Compiling the GPU kernels for H100, A100, B200 and L4: about 2 minutes, and 1 with the newest JAX")
    pytest(session, *tests, "test_mosaic_compile.py", dist="worksteal", **GPU_VARIABLES)


def test_for_tpu(session: nox.Session, packages: tuple[str, ...], *arguments: str) -> None:
    """Run tests in an environment with libtpu, which compiles for TPUs that are described."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        session.skip("libtpu comes as a wheel for Linux on x86-64")
    install(session, "", *group("test"), *packages)
    variables = {"EASYDEL_RAGGED_TEST_TPU_COMPILER": "require", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    pytest(session, *arguments, **variables)


@nox.session(default=False, tags=REST)
def tpu(session: nox.Session) -> None:
    """Programs for TPUs through libtpu, and the TPU kernel's contract in an interpreter: no TPU, no driver."""
    session.log("The TPU kernel, compiled and interpreted: about 5 minutes")
    files = ("test_tpu_compile.py", "test_pallas_tpu.py", "test_tpu_tools.py")
    test_for_tpu(session, TPU_JAX, "-m", "not long", *files, *without(TPU_IN_BRIEF))


@nox.session(python=newest_python(), default=False, tags=REST)
@nox.parametrize("version", tuple(OTHER_TPU_JAX), ids=tuple(OTHER_TPU_JAX))
def tpu_in_brief(session: nox.Session, version: str) -> None:
    """The TPU kernel with other versions of JAX: it compiles, and a few of its numbers."""
    session.log("The TPU kernel, compiled and interpreted: about 1 minute")
    test_for_tpu(session, (OTHER_TPU_JAX[version],), "test_tpu_compile.py::test_own_kernel_compiles", *TPU_IN_BRIEF)


@nox.session(default=False, tags=["all"])  # not for each change: it takes about 40 minutes
def tpu_in_every_case(session: nox.Session) -> None:
    """What `tpu` leaves out: the TPU kernel on all cases of the contract, and programs for every pair of properties."""
    session.log("The TPU kernel, compiled and interpreted in every case: about 40 minutes")
    test_for_tpu(session, TPU_JAX, "-m", "long", "test_tpu_compile.py", "test_pallas_tpu.py")


@nox.session(python=newest_python(), default=False, tags=["all"])  # not for each change: its interpreter is slow
def mosaic_in_every_case(session: nox.Session) -> None:
    """What `kernels` leaves out of the Mosaic kernel: its contract and its trial in every case, its benchmark."""
    install(session, "", *group("test"), "absl-py")
    session.log("The Mosaic kernel, interpreted in every case: less than an hour")
    pytest(session, "-m", "long", "test_pallas_mosaic_gpu.py", "test_trials.py", **MOSAIC_VARIABLES, **QUICK_TO_COMPILE)
    if not session.posargs:
        pytest(session, "test_gpu_tools.py::test_dry_run_of_the_mosaic_benchmark", **MOSAIC_VARIABLES)


@nox.session(python=newest_python(), default=False, tags=REST)
@nox.parametrize("version", OTHER_JAX, ids=OTHER_JAX)
def lowering(session: nox.Session, version: str) -> None:
    """What the GPU kernels are lowered to, with versions of JAX that no other session has; `alone` has every pair."""
    install(session, "", *group("test"), f"jax=={version}")
    session.log("Lowering the GPU kernels for CUDA and ROCm: about half a minute")
    pytest(session, "-m", "not once", "test_gpu_lowering.py", dist="worksteal")


@nox.session(default=False, tags=["all"])  # not for each change: it serves about 80 engines
def zoo(session: nox.Session) -> None:
    """Tiny models of all families that the newest EasyDeL serves, against transformers token for token.

    ``-- --write`` measures EasyDeL's own operations, too, and writes docs/models.md; ``-- --help`` lists the options.
    """
    install(session, "[demo]", f"easydel=={HOSTS[0]}", TORCH)
    session.log("Our operations in every family, then second turns, late requests and too few pages: about 10 minutes")
    session.chdir(TESTS)
    # Many small programs, the same ones for most families.
    variables = {**environment(session), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    session.run("python", "-m", "zoo.matrix", "--jobs", "2", *session.posargs, env=variables)


@nox.session(default=False, tags=REST)
@nox.parametrize("version", HOSTS, ids=HOSTS)
def host(session: nox.Session, version: str) -> None:
    """All that one version of EasyDeL takes part in, and a part of the rest; for the newest what `easydel` lacks."""
    serving = group("serving") if version == HOSTS[0] else ()  # the server of the other one is refused
    install(session, "[bench,demo]", *group("test"), *serving, f"easydel=={version}", TORCH)
    session.log("The tests on EasyDeL, and with its JAX a part of those that need no EasyDeL: about 10 minutes")
    # `kernels` and `alone` have what is marked `once`, and so the numbers of kernels in every case and of the GPU
    # kernel, which Pallas interprets for minutes. Its lowering is tested with each host's JAX, and so are the
    # operations that run it. `host_in_every_case` has what is marked `long`.
    arguments = ("--ignore-glob=test_pallas_*.py", "-m", "not once and not long")
    if version != HOSTS[0]:
        pytest(session, *arguments, **QUICK_TO_COMPILE)
        return
    with measured(session) as variables:
        pytest(session, *arguments, *without(SERVED), **QUICK_TO_COMPILE, **variables)
    if not session.posargs:
        as_another_author(session)


def as_another_author(session: nox.Session) -> None:
    """The package of docs/examples, installed and tested as its author would."""
    example = ROOT / "docs" / "examples" / "dense-attention"
    session.install("--reinstall-package=dense-attention", f"dense-attention[test,easydel] @ {example.as_uri()}")
    session.chdir(example)
    try:
        session.run("pytest", "-n", "2", "tests", env={**environment(session), **QUICK_TO_COMPILE})
    finally:  # its kernel comes before all others
        session.run("uv", "pip", "uninstall", "--quiet", "dense-attention")


@nox.session(default=False, tags=["all"])  # not for each change: it is about EasyDeL's classes, which do not change
@nox.parametrize("version", HOSTS, ids=HOSTS)
def host_in_every_case(session: nox.Session, version: str) -> None:
    """What `host` leaves out: EasyDeL's own operations on the cases in which they are right."""
    install(session, "[demo]", *group("test"), f"easydel=={version}", TORCH)
    session.log("The contract of EasyDeL's own operations: about 2 minutes")
    pytest(session, "-m", "long", "test_contract.py", **QUICK_TO_COMPILE)
