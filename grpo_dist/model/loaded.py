"""What is looked at in a model after transformers has loaded it: its weights, and whether its config describes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .files import UnfitModel, some_names

COMPARED_AT_ONCE = 1 << 16
"""Numbers that stay in the processor's caches while they are compared."""
_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""The name of a list of layers, a number in it, and a name inside that layer."""


def require_stored(name: str, loaded: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise UnfitModel where weights of the model `name` have other shapes than its config says, or would be random, or
    are left out: those of whole layers, or of layers that would be computed without them.

    `report` is that of `from_pretrained`. The model may be on the meta device.
    """
    owner = type(loaded).__name__
    if mismatched := sorted(report["mismatched_keys"], key=str):
        weight, stored, expected = mismatched[0]
        raise UnfitModel(f"model.name: {name!r} has {len(mismatched)} weights of other shapes than its "
                         f"config.json says ({weight}: {tuple(stored)}, expected {tuple(expected)}): name a checkpoint "
                         "with its own config.json")  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UnfitModel(lacks_weights(name, missing, owner))
    modules = dict(loaded.named_modules())
    unexpected = {weight: _place(weight, loaded, modules) for weight in unexpected_weights(loaded, report)}
    if further := _further_layers(unexpected.values(), loaded.state_dict(), modules):
        text = loaded.config.get_text_config(decoder=True)
        number = (getattr(text, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
        raise UnfitModel(f"model.name: {name!r} has {len(further)} layers more than {owner} by its config.json "
                         f"({some_names(further)}), which would be left out: correct {number} there, or name a "
                         "checkpoint with its own config.json")  # fmt: skip
    if left_out := [weight for weight, place in unexpected.items() if _is_of_a_layer(place, modules)]:
        raise UnfitModel(f"model.name: {name!r} has {len(left_out)} weights for which {owner} has no "
                         f"place by its config.json, in layers that it computes ({', '.join(left_out[:3])} …): correct "
                         "model_type, or options such as attention_bias, there")  # fmt: skip


def unexpected_weights(loaded: nn.Module, report: Mapping[str, Any]) -> list[str]:
    """The names for which the model has no place, without those that transformers ignores for its type.

    The first releases of transformers 5 do not apply the lists of a model's parts.
    """
    ignored = {pattern for part in loaded.modules()
               for pattern in getattr(part, "_keys_to_ignore_on_load_unexpected", None) or ()}  # fmt: skip
    return sorted(name for name in report["unexpected_keys"] if not any(re.search(each, name) for each in ignored))


def lacks_weights(name: str, missing: Sequence[str], owner: str) -> str:
    """The message about weights of `owner` that no file of the model `name` has."""
    return (f"model.name: {name!r} lacks {len(missing)} weights of {owner}, which would be random "
            f"({', '.join(missing[:3])} …): name a complete checkpoint")  # fmt: skip


def _place(weight: str, loaded: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The name in the model of a weight, which a checkpoint of the model without its head has without a prefix."""
    return weight if weight.partition(".")[0] in modules else f"{loaded.base_model_prefix}.{weight}"


def _further_layers(unexpected: Iterable[str], own: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Layers beyond the last one of a list of `modules`, of whose weights the model, with the names `own`, has no other
    kind in that list. A layer that predicts further tokens, which some checkpoints keep there, has such weights."""
    further: dict[tuple[str, int], set[str]] = {}
    for layers, number, part in (match.groups() for match in map(_BLOCK.fullmatch, unexpected) if match):
        is_beyond = isinstance(modules.get(layers), nn.ModuleList) and f"{layers}.{number}" not in modules
        if is_beyond and part.endswith("weight"):
            further.setdefault((layers, int(number)), set()).add(part)
    parts = {(match[1], match[3]) for match in map(_BLOCK.fullmatch, own) if match}
    return [f"{layers}.{number}" for (layers, number), names in sorted(further.items())
            if all((layers, name) in parts for name in names)]  # fmt: skip


def _is_of_a_layer(weight: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a weight that a model has no place for is a bias of one of its `modules`, or a further part of one of its
    blocks. Buffers of old checkpoints are neither, nor are heads and towers beside the language model."""
    owner, _, kind = weight.rpartition(".")
    if kind == "bias":
        return owner in modules and hasattr(modules[owner], "weight")
    block = _BLOCK.fullmatch(weight)
    return kind == "weight" and block is not None and f"{block[1]}.{block[2]}" in modules


def require_finite(name: str, loaded: nn.Module) -> None:
    """Raise UnfitModel for weights of the model `name` that are no finite numbers; codes of quantised weights are not
    looked at."""
    for weight, value in loaded.named_parameters():
        if value.is_floating_point() and value.numel() and not all(each.isfinite() for each in value.aminmax()):
            raise UnfitModel(f"model.name: {name!r} has values that are not finite in its weight {weight}, expected "
                             "numbers: name a sound checkpoint")  # fmt: skip


def fits_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 holds each number of a float32 tensor, as of models that were published in it."""
    if weight.dtype != torch.float32:
        return False
    return not any((bits & 0xFFFF).any() for bits in weight.reshape(-1).view(torch.int32).split(COMPARED_AT_ONCE))


def base_fits_bfloat16(model: nn.Module) -> bool:
    """Whether bfloat16 holds each number of the weights that are not trained, all in float32."""
    return all(fits_bfloat16(each) for each in model.parameters() if not each.requires_grad)


def note_own_head(loaded: nn.Module) -> None:
    """Let the config of a loaded model say that its head has weights of its own, where it says the opposite.

    transformers ties no head whose weights in the checkpoint differ from those of the embeddings. What is built by the
    config later, for rollouts and for the files of the trained model, would be tied.
    """
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is embeddings.weight:
        return
    for part in (loaded.config, loaded.config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
