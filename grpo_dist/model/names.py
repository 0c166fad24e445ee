"""Names in a run's options that the files of its model do not know: its type, layers, tensors of experts, tokens.

Imports neither torch nor transformers, so that the answer comes at once: it reads the names of the weights, the
tokenizer's file, and transformers' code of the model as text. What is refused here would be refused with the loaded
model too, by the same words. The reverse does not hold: a name that occurs anywhere in that code is left to
`checks.py`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.checks import did_you_mean
from ..config.schema import LoraConfig, ModelConfig, RolloutConfig
from .files import EXPERTS, UnfitModel, require_replay, shapes_of, some_names, weight_files
from .token_names import require_known_tokens

_LINEAR = re.compile(r"self\.(\w+)\s*=\s*(?:nn\.Linear|Conv1D)\(")
_EXPERTS = re.compile(r"self\.(\w+)\s*=\s*nn\.Parameter\(\s*torch\.\w+\(\s*self\.num_experts,")


def require_known_names(
    model: ModelConfig, lora: LoraConfig | None, rollout: RolloutConfig, path: Path, entries: Mapping[str, Any]
) -> None:
    """Raise ValueError for a name that nothing in the model's directory or in transformers can mean; `entries` are its
    config.json."""
    if not entries.get("auto_map"):
        require_known_type(entries.get("model_type"))
        code = _code(entries)
        if lora is not None and code and (weights := [*shapes_of(weight_files(path))]):
            owner = (entries.get("architectures") or ["the model"])[0]
            _require_layers(lora, owner, code, weights)
        if code and not any(re.search(rf"\b{name}\b", code) for name in EXPERTS):
            require_replay(rollout, False, str(entries.get("model_type")))
    require_known_tokens(rollout, Path(model.tokenizer or path), path)


def require_loaded_in_parts(entries: Mapping[str, Any]) -> None:
    """Raise UnfitModel for a mixture of experts that transformers loads incompletely under ZeRO-3.

    Releases from 5.0 on join the experts' weights while they load. The first ones drop all other weights then.
    """
    kind = str(entries.get("model_type"))
    drops = "setdefault(renamed_key, WeightRenaming(" in _source("integrations/deepspeed.py")
    if drops and f'"{kind}"' in _source("conversion_mapping.py") and _EXPERTS.search(_code(entries)):
        version = importlib.metadata.version("transformers")
        raise UnfitModel(f"model.name: a mixture of experts of the type {kind} given with ZeRO-3, under which "
                         f"transformers {version} loads nothing but its experts: install a newer release of "
                         "transformers, or start with accelerate_configs/zero2.yaml")  # fmt: skip


def require_known_type(kind: str | None) -> None:
    """Raise UnfitModel for a model type that transformers does not know, or that is no causal language model."""
    texts = _auto("auto_mappings"), _auto("configuration_auto")
    classes = {name: each for text in texts for name, each in re.findall(r'"([\w.-]+)"[,:]\s*"(\w+Config)"', text)}
    causal = _auto("modeling_auto").partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")[2].partition("\n)\n")[0]
    loaded = sys.modules.get("transformers.models.auto.configuration_auto")
    is_registered = loaded is not None and kind not in classes and kind in loaded.CONFIG_MAPPING
    if not kind or not classes or not causal or is_registered:
        return
    if kind not in classes:
        version = importlib.metadata.version("transformers")
        raise UnfitModel(f"model.name: a model of the type {kind} given (model_type in its config.json), which "
                         f"transformers {version} does not know: name another model, or install a release of "
                         f"transformers that has it{did_you_mean(kind, classes)}")  # fmt: skip
    if classes[kind] not in {classes.get(name) for name in re.findall(r'\("([\w.-]+)",', causal)}:
        raise no_causal_lm(kind)


def no_causal_lm(kind: str) -> UnfitModel:
    """The error for a type without a class that predicts tokens."""
    return UnfitModel(f"model.name: a model of the type {kind} given, expected a causal language model, one that "
                      "transformers' AutoModelForCausalLM loads")  # fmt: skip


def no_layer(targets: str | Sequence[str], target: str, owner: str, short: Collection[str]) -> UnfitModel:
    """The error for a name in lora.target_modules that no layer of the model `owner` has; `short` are names to take."""
    near = difflib.get_close_matches(target, short, 1, 0.5)
    return refused_layer(targets, f"{target!r} is not a layer of {owner}"
                         + (f"; did you mean {near[0]!r}?" if near else "."), short)  # fmt: skip


def no_pattern(target: str, short: Collection[str]) -> UnfitModel:
    """The error for the end of a name where a pattern of full names is meant."""
    return refused_layer(target, f"a string is a pattern for full names, and matches none; write [{target}].", short)


def refused_layer(targets: str | Sequence[str], reason: str, short: Collection[str]) -> UnfitModel:
    """The error for lora.target_modules, with the reason as a sentence."""
    return UnfitModel(f"lora.target_modules: {targets!r} given, but {reason} Expected `all-linear`, or names among "
                      f"{some_names(sorted(short))}")  # fmt: skip


def no_experts(name: str, reason: str, owner: str, expected: Collection[str]) -> UnfitModel:
    """The error for a name in lora.target_parameters that means no tensor of several experts."""
    return UnfitModel(f"lora.target_parameters: {name!r} given, which {reason} ({owner}), "
                      f"expected {', '.join(sorted(expected)) or 'none for this model'}")  # fmt: skip


def _require_layers(lora: LoraConfig, owner: str, code: str, weights: Sequence[str]) -> None:
    parts = {part for name in weights for part in name.split(".")}
    words = parts | set(re.findall(r"\w+", code))
    short = {leaf for leaf in _LINEAR.findall(code) if leaf in parts}
    targets = lora.target_modules
    if isinstance(targets, str):
        is_leaf = targets in short and not any(name.startswith(f"{targets}.") for name in weights)
        if is_leaf and targets != "lm_head":
            raise no_pattern(targets, short)
    else:
        for each in targets:
            if not set(each.split(".")) <= words:
                raise no_layer(targets, each, owner, short)
    for each in lora.target_parameters:
        if not set(each.split(".")) <= words:
            raise no_experts(each, "is no parameter of it", owner, _EXPERTS.findall(code))


def _code(entries: Mapping[str, Any]) -> str:
    """Transformers' code of a model and its parts; empty where some of it is not found."""
    text = ""
    main = str(entries.get("model_type")).replace("-", "_")
    for kind in (main, *(part["model_type"].replace("-", "_") for part in entries.values()
                         if isinstance(part, dict) and isinstance(part.get("model_type"), str))):  # fmt: skip
        files = sorted((_package() / "models" / kind).glob("modeling_*.py"))
        if not files and not (kind != main and kind.startswith(main)):  # such as gemma3_text, in the folder gemma3
            return ""
        text += "".join(file.read_text(encoding="utf-8") for file in files)
    return text


def _auto(name: str) -> str:
    return _source(f"models/auto/{name}.py")


def _source(name: str) -> str:
    """A file of transformers; empty where it has none of this name."""
    file = _package() / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _package() -> Path:
    """Transformers' folder, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "a requirement of this package"
    return Path(spec.origin).parent
