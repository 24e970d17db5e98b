"""Runs the examples of the pages, in the root and in docs/: every ``python`` block, in order, a process for each page.

A page's blocks share their names. A comment in the line above a block says what to do with it, in one phrase, or in two
with a comma between them::

    <!-- example: needs EasyDeL -->               left out where no host is installed
    <!-- example: needs the native library -->    left out where it is not
    <!-- example: new process -->                 begins a further process, in the folder of those before it
    <!-- example: not run, REASON -->             shown only
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import RunPython

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
