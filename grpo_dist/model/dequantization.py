"""Bases whose checkpoint is quantised in a form that is not trained on: dequantised when they are loaded.

Then they are plain models, of the values that the checkpoint stands for. FP8 by blocks (DeepSeek, Qwen) has a scale for
each block of a weight; MXFP4 (gpt-oss) has 4 bits a weight and a power of two for 32 of them. transformers dequantises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, Mxfp4Config

from .files import UnfitModel
from .quantization import forget_quantizer, take_dtype

CONFIGS = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""What transformers calls the forms of `files.DEQUANTIZED`."""


def dequantized_loading(form: str) -> dict[str, Any]:
    """Options of `from_pretrained` that dequantise a checkpoint of this form, weight by weight."""
    return {"quantization_config": CONFIGS[form](dequantize=True)}


def become_plain(model: Any, form: str, dtype: torch.dtype, unexpected: Iterable[str]) -> None:
    """Make a model that was dequantised a plain one in `dtype`, which remembers its form.

    Raises UnfitModel where weights are still quantised, or scales were not used (`unexpected` are names of tensors that
    have no place in the model).
    """
    if scales := sorted(name for name in unexpected if "scale" in name):
        raise UnfitModel(
            f"model.name: transformers uses none of {len(scales)} scales of this checkpoint in {form} "
            f"({scales[0]} …), so that its weights would be wrong: name the checkpoint that it comes from"
        )
    left = [name for name, each in model.state_dict().items() if each.dtype.itemsize == 1 and each.dtype != torch.bool]
    if left:
        raise UnfitModel(
            f"model.name: transformers leaves {len(left)} weights of this checkpoint in {form} quantised "
            f"({left[0]} …): name the checkpoint that it comes from"
        )
    forget_quantizer(model)
    take_dtype(model, dtype)
    model.dequantized_form = form


def form_of(model: nn.Module) -> str | None:
    """The form of the checkpoint that the model was dequantised from; None for others."""
    return getattr(model, "dequantized_form", None)


def describe_dequantized(model: nn.Module, form: str) -> str:
    """A line about a model that was dequantised, and its memory."""
    plain = [each for name, each in model.named_parameters() if ".lora_" not in name]
    size = sum(each.numel() * each.element_size() for each in plain) / 2**20
    return (
        f"base: the checkpoint in {form} is dequantised when it is loaded, and takes {size:,.1f} MiB, as one that was "
        "never quantised"
    )
