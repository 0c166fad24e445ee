"""The JSON schema: it is the shipped one, and takes the configs that the parser takes and no others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_dist.cli.main import main
from grpo_dist.cli.schema import render
from grpo_dist.config.names import option_types
from grpo_dist.config.parse import parse_config

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA = json.loads(render())
KINDS: dict[str, Any] = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "null": type(None),
                         "array": list, "object": dict}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """What of a value a schema does not allow: the keywords of JSON schema that are used here, one by one."""
    if "anyOf" in schema:
        return [] if any(not faults(value, each, place) for each in schema["anyOf"]) else [place]
    if "enum" in schema:
        return [] if value in schema["enum"] else [place]
    if "type" not in schema:
        return []
    if schema["type"] == "number" and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text, editors as a number
        value = float(value)
    if not isinstance(value, KINDS[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [place]
    if schema["type"] == "object":
        known, others = schema.get("properties", {}), schema["additionalProperties"]
        missing = [f"{place}.{name}" for name in schema.get("required", []) if name not in value]
        unknown = [f"{place}.{name}" for name in value if name not in known and others is False]
        return missing + unknown + [fault for name, each in value.items() if name in known or others
                                    for fault in faults(each, known.get(name, others), f"{place}.{name}")]  # fmt: skip
    if schema["type"] == "array":
        kinds = schema["prefixItems"] if "prefixItems" in schema else [schema["items"]] * len(value)
        return [fault for each, kind in zip(value, kinds, strict=True) for fault in faults(each, kind, place)]
    return []


def test_the_verb_prints_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    """Else: python -m grpo_dist schema > configs/schema.json"""
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "schema.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_fits_and_names_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert faults(yaml.safe_load(text), SCHEMA) == []
    marker, _, place = text.partition("\n")[0].partition("$schema=")
    assert marker == "# yaml-language-server: " and (path.parent / place).resolve() == CONFIGS / "schema.json"


def test_the_defaults_fit_the_schema() -> None:
    config = json.loads(json.dumps(asdict(parse_config([]))))
    assert faults(config, SCHEMA) == []


@pytest.mark.parametrize(
    "mistake",
    [{"rollout": {"groupsize": 8}}, {"loss": {"objective": "grop"}}, {"train": {"batch_size": "many"}},
     {"rewards": [{"name": 3}]}, {"lora": 3}, {"optim": {"betas": [0.9, True]}}],
)  # fmt: skip
def test_mistakes_are_seen(mistake: dict[str, Any]) -> None:
    assert faults(mistake, SCHEMA)


def test_every_option_is_in_it_with_its_meaning() -> None:
    def described(schema: dict[str, Any], prefix: str = "") -> dict[str, str]:
        texts = {}
        for each in [schema, *schema.get("anyOf", [])]:
            for name, option in each.get("properties", {}).items():
                texts |= {f"{prefix}{name}": option.get("description", "")} | described(option, f"{prefix}{name}.")
        return texts

    meanings = described(SCHEMA)
    assert meanings.keys() == option_types().keys()
    assert [name for name, meaning in meanings.items() if not meaning] == []
