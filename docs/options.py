"""Write docs/options.md from the dataclasses of the config; a test compares.

    python docs/options.py
"""  # fmt: skip

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from grpo_dist.config.names import group_type
from grpo_dist.config.schema import Config
from grpo_dist.config.values import default_of, descriptions

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

This page lists every option of a run. Set options in a YAML file (`--config FILE`; several files are applied in
order), or on the command line by dotted names (`--rollout.temperature 0.7`), which override files. `--preset NAME`
applies the options of a published algorithm before all others ([algorithms.md](algorithms.md)). `--print_config`
prints the resulting config, and `--dry_run` checks it. All counts are over all ranks. `python docs/options.py` makes
this page.

Editors with the YAML language server complete and check a config whose first line names a schema: `#
yaml-language-server: $schema=FILE`. Shipped configs have that line; `python -m grpo_dist schema` prints the schema.
"""


def render() -> str:
    """The page."""
    sections = [HEAD]
    for name, kind in _groups(Config):
        title = "`rewards`: a list, each with" if name == "rewards" else f"`{name}`"
        sections.append(f"## {title}\n\n{parse_from_object(kind).short_description}\n\n{_table(kind)}")
    return "\n".join(sections)


def _groups(kind: type, prefix: str = "") -> list[tuple[str, type]]:
    """Dotted names and classes of the groups of options in a class, those within them too."""
    groups = []
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        inner: Any = group_type(hint) or next(filter(is_dataclass, get_args(hint)), None)
        if inner is not None:
            name = f"{prefix}{field.name}"
            groups += [(name, inner), *_groups(inner, f"{name}.")]
    return groups


def _table(kind: type) -> str:
    described = descriptions(kind)
    hints = get_type_hints(kind)
    lines = ["| option | default | type | meaning |", "|---|---|---|---|"]
    for field in fields(kind):
        cells = [f"`{field.name}`", f"`{_default(field)}`", _type(hints[field.name]), described[field.name]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _default(field: Field[Any]) -> str:
    value = default_of(field)
    shown = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(shown, default_flow_style=True).removesuffix("...\n").strip()


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(kind) for kind in get_args(hint))
    if hint is type(None):
        return "`null`"
    return f"`{str(hint) if get_args(hint) else hint.__name__}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
