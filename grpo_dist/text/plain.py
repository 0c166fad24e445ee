"""Text that a model, a data set or a user wrote, made harmless for a terminal, a log or a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TextIO

MOST_LABEL_CHARACTERS = 60
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Characters that are invisible, control a terminal, or change the direction of text."""


def plain(text: str, most_characters: int) -> str:
    """Return a text on one line that cannot steer a terminal; a long one loses its middle.

    Control characters, ANSI sequences' escapes and characters that turn the direction of writing become U+FFFD. The
    result may still hold rich's markup: print it as a `rich.text.Text`.
    """
    half = most_characters // 2
    if len(text) > most_characters:  # first: the next line looks at every character, of which there may be a million
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain_lines(text: str, most_characters: int = 4000) -> str:
    """Return a message with each of its lines made harmless: a message may quote a model or its data."""
    return "\n".join(plain(line, most_characters) for line in text.split("\n"))


def visible(text: str) -> str:
    """Return a text with invisible characters replaced by names: `␛` for control characters, `⟨U+202E⟩` for others."""
    return UNSEEN.sub(lambda match: _named(match.group()), text)


def _named(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def write_lines(text: str, stream: TextIO) -> None:
    """Write a text and its end of line in one call: `print` makes two, and other ranks may write in between."""
    stream.write(f"{text}\n")
    stream.flush()


def write_stage(text: str) -> None:
    """Say on standard error what a command does next, so that nobody waits before an empty screen."""
    write_lines(f"{plain_lines(text)} …", sys.stderr)


def answer_of(text: str, read: Callable[[str], str | None] | None) -> str:
    """Return the answer of a completion on one line, or the start of its text where no answer can be read."""
    answer = read(text) if read is not None else None
    words = " ".join((text[: 4 * MOST_LABEL_CHARACTERS] if answer is None else answer).split())
    return words if len(words) <= MOST_LABEL_CHARACTERS else words[: MOST_LABEL_CHARACTERS - 1] + "…"


def exception_line(error: BaseException) -> str:
    """The kind of an exception and what it says; its class may be a user's, and fail to say it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:
        return f"{type(error).__name__}: <its text cannot be made: {type(another).__name__}>"
