"""What the pages say: their examples run, their links lead somewhere, and the API reference leaves nothing out.

The examples are those of the pages in the root and in docs/: every ``python`` block, in order, a process for each page.

A page's blocks share their names. A comment in the line above a block says what to do with it, in one phrase, or in two
with a comma between them::

    <!-- example: needs EasyDeL -->               left out where no host is installed
    <!-- example: needs the native library -->    left out where it is not
    <!-- example: new process -->                 begins a further process, in the folder of those before it
    <!-- example: not run, REASON -->             shown only
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import RunPython

import easydel_ragged_plugin
from easydel_ragged_plugin import testing, types
from easydel_ragged_plugin.kernels import cpu_native

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- example: (?P<mark>.+?) -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


HERE = {
    "needs EasyDeL": importlib.util.find_spec("easydel") is not None,
    "needs the native library": cpu_native.availability() is None,
}


def examples(page: Path) -> list[str]:
    """The page's examples as a program for each process, whose line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    programs = [[""] * (text.count("\n") + 1)]
    for block in BLOCK.finditer(text):
        mark = block["mark"] or ""
        if mark.startswith("not run, "):
            continue
        marks = set(mark.split(", ")) - {""}
        assert marks <= {*HERE, "new process"}, f"{page.name}: unknown mark {mark!r}"
        if not all(HERE.get(each, True) for each in marks):
            continue
        if "new process" in marks:
            programs.append([""] * len(programs[0]))
        first = text.count("\n", 0, block.start("code"))
        for offset, line in enumerate(block["code"].splitlines()):
            programs[-1][first + offset] = line.removeprefix(block["indent"])
    return ["\n".join(lines) for lines in programs if any(lines)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page: Path, tmp_path: Path, run: RunPython) -> None:
    codes = examples(page)
    if not codes:
        pytest.skip("no example to run here")
    program = tmp_path / page.with_suffix(".py").name
    for code in codes:
        program.write_text(code, encoding="utf-8")
        run(sys.executable, program, cwd=tmp_path, environment={"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


REFERENCE = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
"""What the pages of the API reference show, as ``module.name``. `nox -s docs` fails where one does not exist."""

OF_HOST = [name for name in REFERENCE if name.startswith("easydel_ragged_plugin.operations.")]
PUBLIC = {
    easydel_ragged_plugin: easydel_ragged_plugin.__all__,
    testing: testing.__all__,
    types: set(types.__all__) - {"Version"},  # two words, "v2" and "v3"
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    assert {name.rpartition(".")[2] for name in REFERENCE} >= set(PUBLIC[module])


def resolved(path: str) -> Any:
    """The object, or the module, that a page shows."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(path) if found is None else found


def undocumented(documented: Any) -> Iterable[str]:
    """Names of arguments or fields that the docstring has no entry for."""
    if inspect.isclass(documented):
        fields = dataclasses.fields(documented) if dataclasses.is_dataclass(documented) else ()
        names = {each.name for each in fields} | {*getattr(documented, "_fields", ())}
    else:
        names = {*inspect.signature(documented).parameters}
    entries = re.findall(r"^ +([*\w]+(?:, [*\w]+)*):", inspect.getdoc(documented) or "", re.MULTILINE)
    return names - {name.lstrip("*") for entry in entries for name in entry.split(", ")}


@pytest.mark.parametrize("path", [name for name in REFERENCE if name not in OF_HOST])
def test_every_argument_is_documented(path: str) -> None:
    documented = resolved(path)
    if not inspect.isclass(documented) and not inspect.isfunction(documented):
        pytest.skip("a module or a constant")
    assert not undocumented(documented)


def test_an_argument_without_an_entry_is_found() -> None:
    def function(first: int, second: int, third: int) -> None:
        """Does nothing.

        Args:
            first, third: numbers.
        """

    assert undocumented(function) == {"second"}
