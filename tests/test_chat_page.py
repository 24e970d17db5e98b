"""The page of ``demo --serve``, without a browser; chat_in_browser.mjs has one."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "easydel_ragged_plugin" / "demo" / "chat.html"

LIMIT_S = 300.0
"""What nothing here takes, so that a fault ends a test, and not the run."""


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of the script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


PARTS_OF_PAGES_FROM_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\b|\bFunction\b|srcdoc"
)


def test_the_page_needs_nothing_but_its_server() -> None:
    text = PAGE.read_text(encoding="utf-8")
    links = [value for _, attributes in Elements(text).found for key, value in attributes.items() if key in LINKS]
    assert links == ["data:,"]  # its icon
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"^ *//.*|; // .*", "", text, flags=re.MULTILINE))
    addresses = re.findall(r"fetch\(\s*[\"'`]([^\"'`]*)", text)
    assert sorted(addresses) == ["/about", "/v1/chat/completions"]


LINKS = ("src", "href", "action", "formaction", "data", "poster", "srcset")


def test_texts_never_become_parts_of_the_page() -> None:
    script = Elements(PAGE.read_text(encoding="utf-8")).script
    assert "textContent" in script
    assert not PARTS_OF_PAGES_FROM_TEXT.findall(script)
    assert PARTS_OF_PAGES_FROM_TEXT.search("body.innerHTML += delta")


def test_the_page_can_be_used_by_everybody() -> None:
    elements = Elements(PAGE.read_text(encoding="utf-8")).found
    assert ("html", {"lang": "en"}) in elements
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [each for _, each in elements]
    labeled = [attributes["for"] for tag, attributes in elements if tag == "label"]
    assert [attributes["id"] for tag, attributes in elements if tag in ("input", "select", "textarea")] == labeled
    (log,) = (attributes for _, attributes in elements if attributes.get("role") == "log")
    assert log["aria-live"] == "polite"
    assert not [tag for tag, attributes in elements if any(key.startswith("on") for key in attributes)]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node, which runs the page's script without a browser")
def test_the_page_reads_a_stream_that_is_cut_anywhere() -> None:
    script = Elements(PAGE.read_text(encoding="utf-8")).script
    until_browser = script[: script.index("// Below is what needs a browser.")]
    stream = 'data: {"a": 1}\n\nevent: x\ndata: é<b>\r\n\ndata: [DONE]\n\n'
    check = (
        f"const stream = {json.dumps(stream)}, wrong = [];\n"
        "for (let first = 0; first <= stream.length; first++) for (let then = first; then <= stream.length; then++) {\n"
        "  const events = new Events(), cuts = [0, first, then, stream.length];\n"
        "  const parts = [0, 1, 2].map((part) => stream.slice(cuts[part], cuts[part + 1]));\n"
        "  const found = parts.flatMap((part) => [...events.feed(part)]);\n"
        "  if (JSON.stringify(found) !== JSON.stringify(['{\"a\": 1}', 'é<b>', '[DONE]'])) wrong.push(found);\n"
        "}\n"
        "console.log(JSON.stringify([wrong, complaint(503, {detail: 'busy'}), complaint(500, null),\n"
        "  complaint(400, {error: {message: 'no'}}), complaint(422, {detail: [{loc: 1}]})]));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "-"],
        input=until_browser + check,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert json.loads(done.stdout) == [
        [],
        "The server answered 503: busy",
        "The server answered 500.",
        "The server answered 400: no",
        'The server answered 422: [{"loc":1}]',
    ]
