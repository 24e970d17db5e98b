"""Build-time only: what the documentation site has beside the pages of this folder. `.mkdocs.yml` names this file.

The pages of the root (CONTRIBUTING.md and others) become pages of the site. Links lead to other places there, because
the site has no folders of the repository; a link to a source file leaves its text. Docstrings are for readers of the
sources: :class:`Docstrings` turns their marks into Markdown's.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "start.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the root, by their names in the site."""

NO_PAGES = ("docs/changes/", "docs/examples/")
"""Folders that `.mkdocs.yml` excludes."""

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?(?:[\w.]+\.)?([\w]+)`")
ENTRY = re.compile(r"^(?P<indent> +)(?P<names>[*\w]+(?:, [*\w]+)+): (?P<rest>.*)$")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site."""
    of_root = {site: path for path, site in PAGES.items()}
    here = of_root.get(page.file.src_uri, posixpath.join("docs", page.file.src_uri))

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if path in PAGES:
            uri = PAGES[path]
        elif path.startswith("docs/") and not path.startswith(NO_PAGES):
            uri = path.removeprefix("docs/")
        else:
            return text if text.startswith("`") else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(link, markdown)


class Docstrings(griffe.Extension):
    """Docstrings as mkdocstrings reads them: no roles of Sphinx, no ``::``, an entry for each name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = prepared(obj.docstring.value)


def prepared(text: str) -> str:
    """``text`` with a code span for each role and power, and an entry for each name of ``k_scale, v_scale: ...``."""
    text = re.sub(r"::$", ":", ROLE.sub(r"`\1`", text), flags=re.MULTILINE)
    text = re.sub(r"(?<![`\w])\d+\*\*-?\d+(?!`)", r"`\g<0>`", text)  # two of them would be bold text
    lines, result = text.splitlines(), []
    while lines:
        entry = ENTRY.match(lines[0])
        block = [lines.pop(0)]
        if entry is None:
            result += block
            continue
        while lines and lines[0].startswith(entry["indent"] + " "):
            block.append(lines.pop(0))
        for name in entry["names"].split(", "):
            result += [f"{entry['indent']}{name}: {entry['rest']}", *block[1:]]
    return "\n".join(result)
