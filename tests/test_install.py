"""What an install leaves in site-packages, for each form of install, and what an uninstall leaves."""

from __future__ import annotations

import os
import pkgutil
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunPython

from easydel_ragged_plugin import startup

START_UP_FILES = {"easydel_ragged_plugin.pth", "easydel_ragged_plugin.start"}

IS_ARMED = """
import sys
finders = [each for each in sys.meta_path if type(each).__module__ == "easydel_ragged_plugin.startup"]
print(len(finders), "jax" in sys.modules, "typing" in sys.modules, "importlib.metadata" in sys.modules)
"""
ARMED = "1 False False False"


def site_packages(python: Path, run: RunPython) -> Path:
    folder = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    assert folder.is_relative_to(python.parents[1])  # files in it are about to be broken
    return folder


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "easydel" in path.name)


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def install(request: pytest.FixtureRequest, repository: Path, distributions: Path) -> list[str | os.PathLike[str]]:
    """Arguments of an install, one for each form."""
    if request.param == "editable":
        return ["--editable", repository]
    pattern = "*.whl" if request.param == "wheel" else "*.tar.gz"
    (path,) = distributions.glob(pattern)
    return [path]


def test_install_and_uninstall(
    install: list[str | os.PathLike[str]], new_python: Callable[..., Path], uv: str, run: RunPython
) -> None:
    python = new_python(*install)
    folder = site_packages(python, run)
    assert set(left_behind(folder)) >= START_UP_FILES

    assert run(python, "-c", IS_ARMED).strip() == ARMED
    assert run(python, "-I", "-c", IS_ARMED).strip() == ARMED
    assert run(python, "-c", IS_ARMED, environment={"EASYDEL_RAGGED_PLUGIN": "0"}).split()[0] == "0"
    # Some Pythons run every .pth file twice; this does it on all of them.
    again = f"import site; site.addsitedir({str(folder)!r}, set())\n{IS_ARMED}"
    assert run(python, "-c", again).split()[0] == "1"

    groups = "from importlib.metadata import entry_points as of; print(*sorted(e.value for e in of(group={!r})))"
    assert run(python, "-c", groups.format("easydel.operations")).split() == [
        "easydel_ragged_plugin.operations:RaggedPageAttnV2",
        "easydel_ragged_plugin.operations:RaggedPageAttnV3",
    ]
    assert run(python, "-c", groups.format("console_scripts")).split() == ["easydel_ragged_plugin.cli:main"]
    assert python.with_name("easydel-ragged").exists()
    typed = "import importlib.resources as r; print(r.files('easydel_ragged_plugin').joinpath('py.typed').is_file())"
    assert run(python, "-c", typed).strip() == "True"

    run(uv, "pip", "uninstall", "--quiet", "--python", python, "easydel-ragged-plugin")
    assert left_behind(folder) == []
    assert not python.with_name("easydel-ragged").exists()
    assert run(python, "-c", IS_ARMED).split()[0] == "0"


def test_spawned_processes_are_armed(bare_python: Path, tmp_path: Path, run: RunPython) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def finders():\n"
        "    return [type(each).__module__ for each in sys.meta_path]\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print('easydel_ragged_plugin.startup' in pool.apply(finders))\n"
    )
    assert run(bare_python, script).strip() == "True"


@pytest.mark.parametrize("ruin", ["package removed", "startup.py removed", "startup.py does not compile"])
def test_interpreter_starts_without_the_package(
    ruin: str, distributions: Path, new_python: Callable[..., Path], run: RunPython
) -> None:
    (wheel,) = distributions.glob("*.whl")
    python = new_python(wheel)
    package = site_packages(python, run) / "easydel_ragged_plugin"
    if ruin == "package removed":
        shutil.rmtree(package)
    elif ruin == "startup.py removed":
        (package / "startup.py").unlink()
    else:
        (package / "startup.py").write_text("def arm(:\n")
    assert run(python, "-c", "print('started')") == "started\n"


def test_start_up_files_say_the_same() -> None:
    folder = Path(__file__).resolve().parents[1] / "entry_points"
    pth = [line for line in (folder / "easydel_ragged_plugin.pth").read_text().splitlines() if line[:1] != "#"]
    start = [line for line in (folder / "easydel_ragged_plugin.start").read_text().splitlines() if line[:1] != "#"]
    # Neither the module nor the function may ever change its name: an upgrade that is cut short, or an image that is
    # laid over another one, leaves an old line with a new package.
    assert start == ["easydel_ragged_plugin.startup:arm"]
    assert pkgutil.resolve_name(start[0]) is startup.arm  # as Python 3.15 does
    (line,) = pth
    assert line.startswith("import ")
    assert "from easydel_ragged_plugin import startup; startup.arm()" in line


def test_distributions_hold_what_they_need(distributions: Path, repository: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert in_wheel >= START_UP_FILES | {"easydel_ragged_plugin/py.typed", "easydel_ragged_plugin/demo/chat.html"}
    assert {name.partition("/")[0] for name in in_wheel} == {
        "easydel_ragged_plugin",
        *START_UP_FILES,
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    metadata = zipfile.ZipFile(wheel).read(f"{wheel.name.split('-py3')[0]}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    # The host decides about its own dependencies.
    for pinned in ("easydel", "ejkernel", "eformer", "flax", "jaxlib"):
        assert f"Requires-Dist: {pinned}==" not in metadata
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert in_sdist >= {"pyproject.toml", "README.md", "LICENSE", "entry_points/entry_points.toml", "tests/conftest.py"}
    python_files = {
        path.relative_to(repository).as_posix() for path in repository.glob("easydel_ragged_plugin/**/*.py")
    }
    assert python_files <= in_wheel
    assert python_files <= in_sdist


def test_the_contract_kits_say_what_they_need(bare_python: Path, run: RunPython) -> None:
    for name in ("KernelContract", "RaggedPageAttentionContract"):
        said = run(bare_python, "-c", f"from easydel_ragged_plugin.testing import {name}", status=1)
        assert f"easydel_ragged_plugin.testing.{name} is a pytest class with hypothesis' tests" in said
        assert "lacks pytest and hypothesis. Run: pip install pytest hypothesis (the extra 'testing' has both)" in said
    extras = (
        "from importlib.metadata import metadata; print(metadata('easydel-ragged-plugin').get_all('Provides-Extra'))"
    )
    assert "testing" in run(bare_python, "-c", extras)
