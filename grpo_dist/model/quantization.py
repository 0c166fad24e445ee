"""Bases that bitsandbytes quantises, when they are loaded or before, in their checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..config.schema import ModelConfig
from .checks import bitsandbytes_config
from .files import require_package
from .quantized import EightBitLinear, FourBitLinear, LayerShape, QuantizedLinear, Scales, quantized_layers

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one, where bitsandbytes quantises in 4 bits."""


def quantized_loading(model: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise the base while it is loaded, weight by weight on its device."""
    if model.quantization is None:
        return {}
    return {"quantization_config": _as_asked(model.quantization, dtype),
            "device_map": {"": "cpu" if device is None else device}}  # fmt: skip


def _as_asked(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype)  # fmt: skip


def use_own_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace bitsandbytes' layers, and let nothing else take the model for one of bitsandbytes.

    bitsandbytes' layers do not compute the same everywhere: on a CPU with AVX512_BF16 a forward pass in evaluation
    mode packs the weights in another way, and a later gradient through the layer is lost.
    """
    import bitsandbytes as bnb

    own: QuantizedLinear
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            own = _four_bit(layer, dtype)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            own = _eight_bit(layer, dtype)
        else:
            continue
        model.set_submodule(name, own)
    forget_quantizer(model)
    take_dtype(model, dtype)


def describe(model: nn.Module, kind: str) -> str:
    """A line about a model's quantised layers and their memory."""
    layers = quantized_layers(model).values()
    stored = sum(layer.num_bytes for layer in layers)
    dense = sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in layers)
    return (f"base: {len(layers)} linear layers in {kind}, {stored / 2**20:,.1f} MiB in place of "
            f"{dense / 2**20:,.1f} MiB")  # fmt: skip


def take_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the model's parameters the dtype of a plain model; of a quantised checkpoint some have that of the file."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(each in name for each in kept):
            parameter.data = parameter.data.to(dtype)


def forget_quantizer(model: nn.Module) -> None:
    """Let nothing take the model for one that transformers has quantised."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer", "is_quantized"):
        vars(model).pop(name, None)
    for config in {id(each): each for each in (model.config, model.config.get_text_config(decoder=True))}.values():
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def _shape(layer: nn.Module, dtype: torch.dtype) -> LayerShape:
    bias = None if layer.bias is None else layer.bias.data.to(dtype)
    is_transposed = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    return LayerShape(layer.in_features, layer.out_features, bias, dtype, is_transposed)


def _four_bit(layer: nn.Module, dtype: torch.dtype) -> FourBitLinear:
    state = layer.weight.quant_state
    codes = layer.weight.data.view(torch.uint8).flatten()
    codes = pad(codes, (0, len(state.absmax) * state.blocksize // 2 - len(codes)))
    if state.nested:
        inner = state.state2
        scales = Scales(state.absmax, values=inner.code, scales=inner.absmax, offset=state.offset,
                        block=inner.blocksize)  # fmt: skip
    else:
        scales = Scales(state.absmax)
    return FourBitLinear(_shape(layer, dtype), codes=codes, values=state.code, scales=scales, block=state.blocksize)


def _eight_bit(layer: nn.Module, dtype: torch.dtype) -> EightBitLinear:
    weight = layer.weight
    codes = weight.data if weight.CB is None else weight.CB
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return EightBitLinear(_shape(layer, dtype), codes=codes, scales=scales.float() / 127)


def quantize_blank(model: nn.Module, quantization: str, model_config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Give a model on the meta device the quantised layers that the loaded one has. Raises UnfitModel."""
    require_package()
    given = bitsandbytes_config(model_config)
    asked = _as_asked(quantization, dtype) if given is None else BitsAndBytesConfig.from_dict(dict(given))
    AutoHfQuantizer.from_config(asked, pre_quantized=given is not None).preprocess_model(model, device_map=None)
    with torch.device("meta"):
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "source_cls"):
                model.set_submodule(name, _blank(layer, dtype, asked))
    forget_quantizer(model)


def _blank(layer: nn.Module, dtype: torch.dtype, asked: BitsAndBytesConfig) -> QuantizedLinear:
    shape = _shape(layer, dtype)
    inputs, outputs = shape.in_features, shape.out_features
    if asked.load_in_8bit:
        return EightBitLinear(shape, codes=torch.empty(outputs, inputs, dtype=torch.int8), scales=torch.empty(outputs))
    blocks = -(-inputs * outputs // BLOCK)
    if asked.bnb_4bit_use_double_quant:
        scales = Scales(torch.empty(blocks, dtype=torch.uint8), values=torch.empty(256), offset=torch.empty(()),
                        scales=torch.empty(-(-blocks // SCALES_BLOCK)), block=SCALES_BLOCK)  # fmt: skip
    else:
        scales = Scales(torch.empty(blocks))
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8)
    return FourBitLinear(shape, codes=codes, values=torch.empty(16), scales=scales, block=BLOCK)
