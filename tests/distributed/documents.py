"""The commands and files of README.md and docs/*.md, as their readers see them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = ("python", "accelerate", "grpo-dist", "sbatch", "scancel", "pip", "launch/", "./launch/", ".venv/",
            "tensorboard", "vllm", "transformers", "hf", "git", "source", "cd", "export")  # fmt: skip
_FENCE = re.compile(r"^```(\w+)?(?: (\S+))?\n(.*?)^```", re.M | re.S)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    text: str
    """As it stands there, on one line."""
    words: tuple[str, ...]
    """Its words, without variables put before it and without the `…` of what is left to the reader."""


def commands(page: Path) -> list[Command]:
    """Every line of a fenced bash block, and the lines of indented blocks that start with a program."""
    text = page.read_text()
    found = [line for kind, _, body in _FENCE.findall(text) if kind in ("bash", "sh") for line in _lines(body)]
    plain = _FENCE.sub("", text)
    blocks = re.findall(r"(?<=\n\n)((?: {4}.*\n|\n)+)", plain)
    indented = [line for block in blocks for line in _lines(re.sub(r"^ {4}", "", block, flags=re.M))]
    found += [line for line in indented if _program(line).startswith(PROGRAMS)]
    return [Command(page.name, line, _words(line)) for line in found]


def files(page: Path) -> dict[str, str]:
    """Files that a page gives in fenced blocks which name them."""
    return {name: body for _, name, body in _FENCE.findall(page.read_text()) if name}


def _lines(block: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", block)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _words(line: str) -> tuple[str, ...]:
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    return tuple(words)


def _program(line: str) -> str:
    try:
        return next(iter(_words(line)), "")
    except ValueError:  # an apostrophe in a listing: no command of ours has an open quotation
        return ""
