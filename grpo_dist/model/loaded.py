"""What is looked at in a model after transformers has loaded it: its weights, and whether its config describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .files import UnfitModel

COMPARED_AT_ONCE = 1 << 16
"""Numbers that stay in the processor's caches while they are compared."""


def require_stored(name: str, loaded: nn.Module, report: dict[str, Any]) -> None:
    """Raise UnfitModel where weights of the model `name` have other shapes than its config says, or would be random, or
    are left out of layers that would be computed without them.

    `report` is that of `from_pretrained`.
    """
    if mismatched := sorted(report["mismatched_keys"], key=str):
        weight, stored, expected = mismatched[0]
        raise UnfitModel(f"model.name: {name!r} has {len(mismatched)} weights of other shapes than its "
                         f"config.json says ({weight}: {tuple(stored)}, expected {tuple(expected)}): name a checkpoint "
                         "with its own config.json")  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UnfitModel(f"model.name: {name!r} lacks {len(missing)} weights of {type(loaded).__name__}, which "
                         f"would be random ({', '.join(missing[:3])} …): name a complete checkpoint")  # fmt: skip
    modules = dict(loaded.named_modules())
    if left_out := sorted(weight for weight in report["unexpected_keys"] if _is_of_a_layer(weight, modules)):
        raise UnfitModel(f"model.name: {name!r} has {len(left_out)} weights for which {type(loaded).__name__} has no "
                         f"place by its config.json, in layers that it computes ({', '.join(left_out[:3])} …): correct "
                         "model_type, or options such as attention_bias, there")  # fmt: skip


def _is_of_a_layer(weight: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a weight that a model has no place for is a bias of one of its `modules`, or a further part of one of its
    blocks. Buffers of old checkpoints are neither, nor are heads and towers beside the language model."""
    owner, _, kind = weight.rpartition(".")
    if kind == "bias":
        return owner in modules and hasattr(modules[owner], "weight")
    block = re.match(r".*?\.\d+(?=\.)", weight)
    return kind == "weight" and block is not None and block[0] in modules


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


def note_own_head(loaded: Any) -> None:
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
