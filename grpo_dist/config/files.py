"""Config files: what is wrong with one before its options are read, by its text alone; and the one that a run wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..text.files import near_paths

MOST_VALUES = 100_000
"""Most values of a config file with its aliases written out: what reads it would copy each of them."""
_EXPONENT = re.compile(r"[-+]?[0-9_.]+[eE][-+]?[0-9]+$")


class _Writer(yaml.SafeDumper):
    """Puts texts such as 1e5 in quotes as well: they are numbers in a config file, and not in YAML 1.1."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, [*"-+.0123456789"])


def mistakes_of_file(path: str) -> list[str]:
    """What to correct in a YAML file: a path that is none, bytes that are no UTF-8, keys that are given twice, of
    which YAML would take the last alone, and times and numbers with a zero before them, which YAML reads as others.
    Empty where there is nothing, and for what a loader says better."""
    if not Path(path).exists():
        return [f"--config: no file {path!r} in {Path.cwd()}{near_paths(path)}"]
    if not Path(path).is_file():
        return [f"--config: {path} given, expected a YAML file"]
    try:
        nodes, size = _nodes(yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.SafeLoader))
    except UnicodeDecodeError as error:
        return [f"--config: {path} is no UTF-8 text ({error.reason} in byte {error.start}); save it as UTF-8"]
    except yaml.YAMLError:
        return []
    except RecursionError:
        return [f"--config: {path} is nested too deeply, or has an anchor (&name) whose own value refers to it (*name)"]
    if size > MOST_VALUES:
        return [f"--config: {path} has more than {MOST_VALUES:,} values when each alias (*name) is replaced by what it "
                "refers to: write out what is meant"]  # fmt: skip
    repeated = [f"{key} is given in lines {first} and {second} of {path}, expected once: the second would replace all "
                "of the first" for node, prefix in nodes for key, first, second in _repeated(node, prefix)]  # fmt: skip
    return repeated + [f"{node.value} in line {node.start_mark.line + 1} of {path} is a number to base {base} for "
                       f"YAML: put it in quotes, '{node.value}'" + ", or leave out the zero before it" * (base == 8)
                       for node, _ in nodes if (base := _other_base(node))]  # fmt: skip


def _nodes(root: yaml.Node | None) -> tuple[list[tuple[yaml.Node, str]], int]:
    """A document's nodes, each once however often it is referred to, with the names above it; and their number if each
    counts as often as it is referred to. Raises RecursionError where a node is part of itself."""
    found: dict[int, tuple[yaml.Node, str]] = {}
    sizes: dict[int, int] = {}

    def enter(node: yaml.Node, prefix: str, above: frozenset[int]) -> int:
        if id(node) in above:
            raise RecursionError
        if id(node) in found:
            return sizes[id(node)]
        found[id(node)], above, size = (node, prefix), above | {id(node)}, 1
        if isinstance(node, yaml.SequenceNode):
            for value in node.value:
                size += enter(value, prefix, above)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                size += enter(key, prefix, above) + enter(value, f"{prefix}{key.value}.", above)
        sizes[id(node)] = size
        return size

    size = 0 if root is None else enter(root, "", frozenset())
    return list(found.values()), size


def _repeated(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Each key that a mapping has twice, with the lines of both."""
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            yield name, lines[name], line
        lines[name] = line


def _other_base(node: yaml.Node) -> int | None:
    """The base of a number such as 1:30:00 or 010, which YAML reads as 5400 and 8; None for other nodes."""
    if not (isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))):
        return None
    return 60 if ":" in node.value else 8 if re.fullmatch(r"[-+]?0[0-7_]+", node.value) else None


def as_yaml(values: Any, **layout: Any) -> str:
    """The text of a config file with these values; `layout` is as for `yaml.dump`."""
    text: str = yaml.dump(values, Dumper=_Writer, sort_keys=False, **layout)
    return text


def written_config(path: Path, *needed: str) -> dict[str, Any]:
    """The options in the config.yaml that a run wrote. Raises ValueError where it lacks the `needed` groups or has no
    options, OSError where it is missing."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or not {*needed} <= {*config}:
        raise ValueError(f"{path} lacks options, expected what the run wrote there: its newest checkpoint has them too "
                         "(`config` in state.json)")  # fmt: skip
    return config
