"""Runs that go on from a PEFT adapter: its base model and its shape. `adapter_values.py` reads its values.

Imports nothing heavy, so that the answer to an adapter that cannot be trained on comes at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config.algorithm import has_reference
from ..config.places import model_place
from ..config.schema import Config, LoraConfig
from .files import UnfitModel, model_path, shapes_of, stored_file, weight_files
from .toy import MODELS

log = logging.getLogger(__name__)

SHAPE = {"r": "r", "lora_alpha": "alpha", "target_modules": "target_modules", "target_parameters": "target_parameters",
         "use_rslora": "use_rslora"}  # fmt: skip
"""Entries of adapter_config.json that are taken over, and the options of `lora` that they become."""
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Entries that do not change what an adapter adds to its base."""
DEFAULTS = {"bias": "none", "megatron_core": "megatron.core"}
"""Other entries with the value that changes nothing."""
MORE = {"alpha_pattern", "bias", "lora_bias", "modules_to_save", "rank_pattern", "use_dora"}
"""Entries by which an adapter is more than what is trained here. A newer PEFT may have further ones."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base's weights as they are."""


def with_adapter(config: Config, asks_hub: bool = True) -> Config:
    """The config of a run that goes on from an adapter, which model.name or lora.init_from names: model.name is its
    base, and `lora` has its shape. Other configs stay as they are.

    Where the hub is not to be asked, only its cache counts. Raises UnfitModel for an adapter that cannot be trained on,
    and where options of `lora` contradict it.
    """
    model, lora = config.model, config.lora
    own = None
    if model.name not in MODELS:
        own = _entries("model.name", model_place(model.name, "model.name"), model.revision, asks_hub)
    if own is None and (lora is None or lora.init_from is None):
        return config
    option, name = ("lora.init_from", lora.init_from) if own is None and lora else ("model.name", model.name)
    assert name is not None
    if lora is None:
        raise UnfitModel(f"lora: null given, expected adapters: model.name {name!r} is a PEFT adapter. To train all "
                         "weights, merge it into its base first (`merge_and_unload`)")  # fmt: skip
    if own is not None and lora.init_from is not None:
        raise UnfitModel(f"lora.init_from: {lora.init_from!r} given, expected null where model.name is an adapter")
    if own is not None and model.revision is not None:
        raise UnfitModel(f"model.revision: {model.revision!r} given, expected null for an adapter: download that "
                         "revision of it and name the directory")  # fmt: skip
    place = model_place(name, option)
    entries = own or _entries(option, place, None, asks_hub)
    if entries is None and not asks_hub and not Path(place).is_dir():
        return config
    if entries is None:
        raise UnfitModel(f"{option}: {name!r} given, expected a PEFT adapter, with adapter_config.json: a "
                         "full model is a model.name")  # fmt: skip
    _require_plain(option, name, entries)
    taken = {ours: entries[theirs] for theirs, ours in SHAPE.items() if entries.get(theirs) is not None}
    _require_agreement(lora, taken, name)
    lora = replace(lora, **taken, init_from=place)
    if own is not None:
        model = replace(
            model, name=_base(place, entries), revision=entries.get("revision"),
            tokenizer=place if model.tokenizer is None and _has_tokenizer(place) else model.tokenizer,
        )  # fmt: skip
    elif asks_hub and not _is_named_alike(
        named := str(entries.get("base_model_name_or_path") or ""), model_path(model)
    ):
        log.warning("%s: %s names %r as its base, and model.name is %r: expected the same model, perhaps at another "
                    "place. Shapes alone do not tell a base from its instructed form, on which the adapter would do "
                    "harm", option, name, named, model.name)  # fmt: skip
    log.info("adapters: %s (r %d, alpha %g) on the base %s", name, lora.r, lora.alpha, model.name)
    return replace(config, lora=lora, model=model)


def require_own_values(config: Config, shards_weights: bool) -> None:
    """Raise UnfitModel where the reference would need the adapter's first values in sharded weights."""
    shares = config.reference.placement == "shared" and config.reference.model == "adapter" and has_reference(config)
    if shards_weights and shares and config.lora is not None and config.lora.init_from is not None:
        raise UnfitModel("reference.placement: 'shared' given, expected `copy` under ZeRO-3 and FSDP2, where the "
                         "reference is the adapter that the run goes on from, or reference.model: base")  # fmt: skip


def require_fitting(place: str, base: Path) -> None:
    """Raise UnfitModel where matrices of the adapter at `place` have no width of the layers in the weight files of its
    base, a directory of plain weights. `load_adapter` compares the rest."""
    stored = stored_file(place, "adapter_model.safetensors")
    if stored is None:
        return
    layers, of_adapter = shapes_of(weight_files(base)), shapes_of([stored])
    width = 0 if (_entries("lora.init_from", place, None, False) or {}).get("fan_in_fan_out") else 1
    for name, shape in of_adapter.items():
        layer, is_first, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        weight = layers.get(f"{layer}.weight", [])
        if is_first and len(weight) == 2:
            require_shape(place, name, shape, [shape[0], weight[width]])


def require_shape(place: str, name: str, given: Sequence[int], expected: Sequence[int]) -> None:
    """Raise UnfitModel where a matrix of the adapter at `place` has another shape than its layer needs."""
    if list(given) != list(expected):
        raise UnfitModel(f"lora.init_from: {place!r} has {name} of the shape {list(given)}, expected {list(expected)}: "
                         "it belongs to another base model, which model.name should be")  # fmt: skip


def to_evaluate(config: Config) -> Config:
    """The config of an evaluation, in which `lora` is the adapter's where model.name is one, and null elsewhere.

    What it says of new adapters is a training's. Raises UnfitModel.
    """
    config = with_adapter(replace(config, lora=LoraConfig()))
    return config if config.lora is not None and config.lora.init_from else replace(config, lora=None)


def _entries(option: str, place: str, revision: str | None, asks_hub: bool) -> dict[str, Any] | None:
    """The adapter_config.json of a directory or repository; None where there is none."""
    if asks_hub:
        from .hub import adapter_config  # takes a second, which an error in the options should not wait for

        file = adapter_config(option, place, revision)
    else:
        file = stored_file(place, "adapter_config.json", revision)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))


def _has_tokenizer(place: str) -> bool:
    return (Path(place) / "tokenizer_config.json").is_file()


def _base(place: str, entries: dict[str, Any]) -> str:
    """The base model that an adapter names; a relative path may also be one from where the adapter is."""
    name = entries.get("base_model_name_or_path")
    if not name:
        raise UnfitModel(f"model.name: {place!r} is a PEFT adapter that names no base model "
                         "(base_model_name_or_path in its adapter_config.json): name the base, and the adapter as "
                         "lora.init_from")  # fmt: skip
    beside = Path(place).parent / name
    return str(beside) if not Path(name).is_dir() and beside.is_dir() else name


def _is_named_alike(named: str, given: str) -> bool:
    """Whether ids or paths of models have the same last part, as those on the hub, in its cache and of a copy have;
    also where the first is empty, and says nothing."""
    names = set()
    for path in (Path(named or given), Path(given)):
        cached = (part.rpartition("--")[2] for part in path.parts if part.startswith("models--"))
        names.add(next(cached, path.name))
    return len(names) == 1


def _require_plain(option: str, name: str, entries: dict[str, Any]) -> None:
    """Raise UnfitModel for an adapter that is more than low-rank matrices on linear layers and experts."""
    if (kind := entries.get("peft_type")) != "LORA":
        raise UnfitModel(f"{option}: {name!r} is a PEFT adapter of the type {kind}, expected LORA: name its "
                         "base as model.name, and train new adapters on that")  # fmt: skip
    if (start := entries.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise UnfitModel(f"{option}: {name!r} has init_lora_weights {start!r}, which changes the weights of the base "
                         "too: merge it into its base (`merge_and_unload`), and train on that")  # fmt: skip
    known = {*SHAPE, *WITHOUT_EFFECT, "init_lora_weights"}
    others = {key: value for key, value in entries.items()
              if key not in known and value and value != DEFAULTS.get(key)}  # fmt: skip
    if not others.keys() <= MORE:
        from .peft import PeftLoraConfig

        defaults = {field.name: getattr(PeftLoraConfig(), field.name) for field in fields(PeftLoraConfig)}
        others = {key: value for key, value in others.items() if value != defaults.get(key)}
    if others:
        given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in others.items())
        raise UnfitModel(f"{option}: {name!r} is an adapter with {given}, which cannot be trained here, expected plain "
                         "LoRA or rsLoRA on linear layers and experts: merge it into its base "
                         "(`merge_and_unload`), and train new adapters on that")  # fmt: skip


def _require_agreement(lora: LoraConfig, taken: dict[str, Any], name: str) -> None:
    """Raise UnfitModel where an option of the shape is given and is not the adapter's."""
    for key, value in taken.items():
        given, default = getattr(lora, key), getattr(LoraConfig(), key)
        if given not in (default, value):
            raise UnfitModel(f"lora.{key}: {given!r} given, expected {value!r}, as the adapter {name!r} has; leave it "
                             "out to take over the adapter's")  # fmt: skip
