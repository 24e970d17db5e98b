"""Text for terminals and pipes of any encoding: what ASCII lacks is written with what it has."""

from __future__ import annotations

import codecs
import contextlib
import sys
import unicodedata

__all__ = ["PLAIN_ERRORS", "accept_any_text"]

_PLAIN = {"µ": "u", "✓": "ok", "\u00d7": "x", "—": "-", "“": '"', "”": '"', "\u2018": "'", "\u2019": "'"}
"""For terminals that lack them."""
PLAIN_ERRORS = "easydel_ragged_plugin.plain"
"""An error handler, for ``errors=`` of streams."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of encodings: similar characters of ASCII in place of those that can't be written."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = ""
    for character in error.object[error.start : error.end]:
        decomposed = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        text += _PLAIN.get(character) or decomposed or "?"
    return text, error.end


codecs.register_error(PLAIN_ERRORS, _plain)


def accept_any_text() -> None:
    """Let both output streams write any character, in a terminal or a pipe of any encoding."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something that is no text file, or None
            stream.reconfigure(errors=PLAIN_ERRORS)  # type: ignore[union-attr]
