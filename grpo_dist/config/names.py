"""The options of a run by name: their types, presets, and what to do in place of a name that does not exist."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from .schema import Config
from .shipped import shipped

PRESETS = shipped("configs") / "algorithms"
DRY_RUN = "--dry_run"
"""Checks a run in place of the run. It is not an option of a run, and not in a config file."""
PRINT_CONFIG = "--print_config"
"""Prints the options of a run in place of the run, likewise."""
LEFT_OUT = {
    "lora.use_dora": "DoRA is not supported, because a step of decoding would normalise all weights again; expected "
    "LoRA, or rsLoRA with lora.use_rslora",
    "lora.modules_to_save": "no layer is trained beside adapters; name linear layers in lora.target_modules (the head "
    "may be one), or train all weights with `lora: null`",
    "lora.bias": "biases stay as they are in the base; `lora: null` trains them with all weights",
    "rollout.logit_bias": "a bias would draw from another policy than the one that is trained; rollout.banned_tokens "
    "names tokens that are never drawn",
    "local_rank": "the launcher `deepspeed` adds it; expected accelerate launch --config_file accelerate_configs/"
    "zero2.yaml, or --no_local_rank after `deepspeed`, with which the run is DDP (docs/distributed.md)",
}  # fmt: skip
"""Options that people look for, with what to do in their place."""
_ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", re.MULTILINE)


@functools.cache
def option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every option's dotted name, groups included, with its type."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        types[f"{prefix}{name}"] = hint
        if (group := group_type(hint)) is not None:
            types |= option_types(group, f"{prefix}{name}.")
    return types


def group_type(hint: Any) -> type | None:
    """The dataclass of a type that is a group of options, or null; None for other types."""
    kinds = [] if get_origin(hint) is list else [hint, *get_args(hint)]
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def command_line_options() -> list[str]:
    """Names of everything that the command line of a run takes, without their dashes."""
    return [*option_types(), "config", "preset", *(flag.removeprefix("--") for flag in (DRY_RUN, PRINT_CONFIG))]


def nearest_option(word: str, is_option: bool) -> str | None:
    """The option nearest to an unknown one; None where nothing is near.

    A word that `is_option`, by its dashes or its group, may also be the beginning of an option.
    """
    known = command_line_options()
    # of several, the shortest: model.dtype and optim.learning_rate, not those of the reference and the critic
    leaves = {key.rpartition(".")[2]: key for key in sorted(known, key=len, reverse=True)}
    leaf = word.rpartition(".")[2]
    if leaf in leaves:
        return leaves[leaf]
    begun = [key for key in known if (is_option or "." in word) and key.startswith(word)]
    near = [min(begun, key=len)] if begun else difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    near = near or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return near[0] if near else None


def advice(word: str, is_option: bool = False) -> str | None:
    """What to do in place of an unknown option; None where nothing is near."""
    answer = next((f"{key} is no option: {reason}" for key, reason in LEFT_OUT.items()
                   if f"{word}.".startswith((f"{key}.", f"{key.rpartition('.')[2]}."))), None)  # fmt: skip
    near, leaf = nearest_option(word, is_option), word.rpartition(".")[2]
    if answer is None and (near or "").rpartition(".")[2] != leaf and (here := other_names().get(leaf)):
        answer = f"a name of another library; here: {here} (docs/from_trl.md)"
    return answer or (f"did you mean {near!r}?" if near else None)


@functools.cache
def other_names() -> dict[str, str]:
    """What stands here for TRL's fields and for other libraries' names, from the tables of docs/from_trl.md."""
    page = shipped("docs") / "from_trl.md"
    rows = _ROW.findall(page.read_text(encoding="utf-8")) if page.is_file() else []
    plain = [(names, re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", here)) for names, here in rows]
    return {name: here for names, here in plain for name in re.findall(r"\w+", names)}


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
