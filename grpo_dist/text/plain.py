"""Text for a terminal: what a model or a data set wrote is made harmless, and other ranks write beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

MOST_LABEL_CHARACTERS = 60


def plain(text: str, most_characters: int) -> str:
    """Return a text on one line, its middle left out where it is too long, without anything that steers a terminal.

    Control characters, ANSI sequences' escapes and characters that turn the direction of writing become U+FFFD. The
    result may still hold rich's markup: print it as a `rich.text.Text`.
    """
    half = most_characters // 2
    if len(text) > most_characters:  # before anything looks at every character: a text may have a million of them
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain_lines(text: str, most_characters: int = 4000) -> str:
    """Return a message with each of its lines made harmless, for messages that may quote a model or its data."""
    return "\n".join(plain(line, most_characters) for line in text.split("\n"))


def write_lines(text: str, stream: TextIO) -> None:
    """Write a text and its end of line in one call: `print` makes two, and other ranks may write between them."""
    stream.write(f"{text}\n")
    stream.flush()


def answer_of(text: str, read: Callable[[str], str | None] | None) -> str:
    """Return the answer that a completion gives, or where none can be read the start of its text, on one line."""
    answer = read(text) if read is not None else None
    words = " ".join((text[: 4 * MOST_LABEL_CHARACTERS] if answer is None else answer).split())
    return words if len(words) <= MOST_LABEL_CHARACTERS else words[: MOST_LABEL_CHARACTERS - 1] + "…"
