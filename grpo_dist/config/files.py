"""What is wrong with a config file before its options are read, by its text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml


def mistake_of_file(path: str) -> str | None:
    """What to correct in a YAML file: bytes that are no UTF-8, and keys that are given twice, of which YAML would take
    the last alone. None where there is nothing, and for what the parser says better."""
    if not Path(path).is_file():
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"--config: {path} is no UTF-8 text ({error.reason} in byte {error.start}); save it as UTF-8"
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    twice = [f"{key} is given in lines {first} and {second} of {path}, expected once: the second would replace all of "
             "the first" for key, first, second in _repeated(root, "")]  # fmt: skip
    return "; ".join(twice) or None


def _repeated(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Each key that a mapping has twice, with the lines of both."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value, prefix)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                yield name, lines[name], line
            lines[name] = line
            yield from _repeated(value, f"{name}.")
