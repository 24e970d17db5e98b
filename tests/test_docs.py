"""Runs the examples of the pages, in the root and in docs/: every ``python`` block, in order, a process for each page.

A page's blocks share their names. A comment in the line above a block says what to do with it::

    <!-- example: needs EasyDeL -->      left out where no host is installed
    <!-- example: not run, REASON -->    shown only
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import RunPython

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- example: (?P<mark>.+?) -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


def examples(page: Path, has_host: bool) -> str:
    """The page's examples as one program whose line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        mark = block["mark"] or ""
        assert mark in ("", "needs EasyDeL") or mark.startswith("not run, "), f"{page.name}: unknown mark {mark!r}"
        if mark.startswith("not run, ") or (mark and not has_host):
            continue
        first = text.count("\n", 0, block.start("code"))
        for offset, line in enumerate(block["code"].splitlines()):
            lines[first + offset] = line.removeprefix(block["indent"])
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page: Path, tmp_path: Path, run: RunPython) -> None:
    code = examples(page, has_host=importlib.util.find_spec("easydel") is not None)
    if not code.strip():
        pytest.skip("no example to run here")
    program = tmp_path / page.with_suffix(".py").name
    program.write_text(code, encoding="utf-8")
    run(sys.executable, program, cwd=tmp_path, environment={"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
