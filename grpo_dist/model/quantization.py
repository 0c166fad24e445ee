"""Bases that bitsandbytes quantises, when they are loaded or before, in their checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..config.schema import Config, ModelConfig
from .checks import UnfitModel, bitsandbytes_config
from .quantized import EightBitLinear, FourBitLinear, QuantizedLinear, Scales, quantized_layers

PACKAGE = "bitsandbytes"
BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one, where bitsandbytes quantises in 4 bits."""


def kind_of(model: ModelConfig, model_config: Any) -> str | None:
    """How the linear layers of the base are stored: `nf4`, `fp4` or `int8`; None for plain weights."""
    given = bitsandbytes_config(model_config)
    if given is None:
        return model.quantization
    return "int8" if _is_eight_bit(given) else str(given.get("bnb_4bit_quant_type", "fp4"))


def _is_eight_bit(given: Mapping[str, Any]) -> bool:
    return bool(given.get("load_in_8bit") or given.get("_load_in_8bit"))


def require_quantizable(config: Config, model_config: Any) -> None:
    """Raise UnfitModel where the base is quantised and this run cannot train on it."""
    kind, asked = kind_of(config.model, model_config), config.model.quantization
    if kind is None:
        return
    what = f"a base in {kind} (model.quantization)" if asked else f"a checkpoint in {kind} (bitsandbytes)"
    if asked not in (None, kind):
        raise UnfitModel(f"model.quantization: {asked!r} given, expected null: the checkpoint of {config.model.name!r} "
                         f"is quantised already, in {kind}")  # fmt: skip
    if config.lora is None:
        raise UnfitModel(f"lora: null given with {what}, expected adapters: quantised weights cannot be trained")
    if config.rollout.engine == "vllm":
        raise UnfitModel(f"rollout.engine: 'vllm' given with {what}, expected `auto` or `native`: a server would "
                         "compute with other values of the weights")  # fmt: skip
    _require_package()


def _require_package() -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise UnfitModel(f"model.quantization: quantised weights need the package {PACKAGE}, which is not installed: "
                         "pip install 'grpo_dist[quantized]'")  # fmt: skip


def require_unsharded(is_quantized: bool, shards_weights: bool) -> None:
    """Raise UnfitModel where ZeRO-3 or FSDP2 would shard a quantised base."""
    if is_quantized and shards_weights:
        raise UnfitModel("model.quantization: a quantised base given with ZeRO-3 or FSDP2, which would shard it, "
                         "expected DDP, ZeRO-1 or ZeRO-2: start with accelerate_configs/zero2.yaml")  # fmt: skip


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
    _forget_quantizer(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():  # of a quantised checkpoint the others have the dtype of the file
        if parameter.is_floating_point() and not any(each in name for each in kept):
            parameter.data = parameter.data.to(dtype)


def describe(model: nn.Module, kind: str) -> str:
    """A line about a model's quantised layers and their memory."""
    layers = quantized_layers(model).values()
    stored = sum(layer.num_bytes for layer in layers)
    dense = sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in layers)
    return (f"base: {len(layers)} linear layers in {kind}, {stored / 2**20:,.1f} MiB in place of "
            f"{dense / 2**20:,.1f} MiB")  # fmt: skip


def _forget_quantizer(model: Any) -> None:
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer", "is_quantized"):
        vars(model).pop(name, None)
    for config in {id(each): each for each in (model.config, model.config.get_text_config(decoder=True))}.values():
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def _shape(layer: Any, dtype: torch.dtype) -> tuple[int, int, Tensor | None, torch.dtype, bool]:
    """The first arguments of a `QuantizedLinear`."""
    bias = None if layer.bias is None else layer.bias.data.to(dtype)
    is_transposed = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    return layer.in_features, layer.out_features, bias, dtype, is_transposed


def _four_bit(layer: Any, dtype: torch.dtype) -> FourBitLinear:
    state = layer.weight.quant_state
    codes = layer.weight.data.view(torch.uint8).flatten()
    codes = pad(codes, (0, len(state.absmax) * state.blocksize // 2 - len(codes)))
    if state.nested:
        inner = state.state2
        scales = Scales(state.absmax, values=inner.code, scales=inner.absmax, offset=state.offset,
                        block=inner.blocksize)  # fmt: skip
    else:
        scales = Scales(state.absmax)
    return FourBitLinear(*_shape(layer, dtype), codes=codes, values=state.code, scales=scales, block=state.blocksize)


def _eight_bit(layer: Any, dtype: torch.dtype) -> EightBitLinear:
    weight = layer.weight
    codes = weight.data if weight.CB is None else weight.CB
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return EightBitLinear(*_shape(layer, dtype), codes=codes, scales=scales.float() / 127)


def quantize_blank(model: Any, quantization: str, model_config: Any, dtype: torch.dtype) -> None:
    """Give a model on the meta device the quantised layers that the loaded one has. Raises UnfitModel."""
    _require_package()
    given = bitsandbytes_config(model_config)
    asked = _as_asked(quantization, dtype) if given is None else BitsAndBytesConfig.from_dict(dict(given))
    AutoHfQuantizer.from_config(asked, pre_quantized=given is not None).preprocess_model(model, device_map=None)
    with torch.device("meta"):
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "source_cls"):
                model.set_submodule(name, _blank(layer, dtype, asked))
    _forget_quantizer(model)


def _blank(layer: Any, dtype: torch.dtype, asked: BitsAndBytesConfig) -> QuantizedLinear:
    shape = _shape(layer, dtype)
    inputs, outputs, *_ = shape
    if asked.load_in_8bit:
        return EightBitLinear(*shape, codes=torch.empty(outputs, inputs, dtype=torch.int8), scales=torch.empty(outputs))
    blocks = -(-inputs * outputs // BLOCK)
    if asked.bnb_4bit_use_double_quant:
        scales = Scales(torch.empty(blocks, dtype=torch.uint8), values=torch.empty(256), offset=torch.empty(()),
                        scales=torch.empty(-(-blocks // SCALES_BLOCK)), block=SCALES_BLOCK)  # fmt: skip
    else:
        scales = Scales(torch.empty(blocks))
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8)
    return FourBitLinear(*shape, codes=codes, values=torch.empty(16), scales=scales, block=BLOCK)
