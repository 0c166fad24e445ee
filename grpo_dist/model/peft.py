"""What this package uses of PEFT, imported and called so that bitsandbytes is loaded for quantised models alone.

PEFT imports bitsandbytes wherever that is installed, which imports torch's compiler: a third of the time of a start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .files import PACKAGE, UnfitModel


@contextmanager
def _unless_loaded() -> Iterator[None]:
    """A context in which PEFT takes bitsandbytes for not installed, unless something has imported it before.

    A process that has not imported bitsandbytes has no layers of it, and PEFT asks for nothing else.
    """
    if PACKAGE in sys.modules:
        yield
        return
    _forget_answers()
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # Python's way to say that a module cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(PACKAGE, None)
        _forget_answers()


def _forget_answers() -> None:
    """Let PEFT ask again whether bitsandbytes is installed: it keeps the answers."""
    if (module := sys.modules.get("peft.import_utils")) is not None:
        for question in (module.is_bnb_available, module.is_bnb_4bit_available):
            question.cache_clear()


with _unless_loaded():
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import load_peft_weights

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older releases of PEFT put adapters on exactly the named layers
        convert_peft_config_for_transformers = None

ADAPTER = "default"
"""PEFT's name for the adapter of a model that has one."""

__all__ = [
    "ADAPTER", "LoraLayer", "LoraLinear", "ParamWrapper", "PeftLoraConfig", "PeftModel",
    "convert_peft_config_for_transformers", "load_peft_weights", "lora_layers", "with_new_adapters",
    "with_saved_adapters", "without_adapters",
]  # fmt: skip


def with_new_adapters(base: Any, config: PeftLoraConfig) -> PeftModel:
    """The model with adapters of random values, as PEFT's config says."""
    with _unless_loaded():
        adapted: PeftModel = get_peft_model(base, config)
    return adapted


def with_saved_adapters(base: nn.Module, place: str) -> PeftModel:
    """The model with the adapters that a directory holds. Raises UnfitModel where they cannot be read."""
    try:
        with _unless_loaded():
            adapted: PeftModel = PeftModel.from_pretrained(base, place)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnfitModel(f"the adapter in {place} cannot be read ({error})") from error
    return adapted


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers with adapters."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def without_adapters(layers: list[Any]) -> Iterator[None]:
    """Inside, these layers compute without their adapters. PEFT's own way to say so also says which weights are
    trained."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
