"""Checks of a model for what prevents its training, before any weights are read."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from ..distributed.sharding import full_shape
from .files import UnfitModel, is_bitsandbytes, require_causal, require_fit, require_fixed_positions, some_names
from .hub import adapter_config
from .names import no_causal_lm, no_layer, no_pattern, refused_layer
from .peft import PeftLoraConfig, convert_peft_config_for_transformers
from .quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

CANNOT = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
"""Errors of model code that does not support the request."""

IGNORE_IS_DECODER = ("gpt_neox", "gpt_neox_japanese")
"""Types that are decoders for any value of is_decoder in the config."""


def require_complete_model(name: str, path: str, revision: str | None) -> None:
    """Raise UnfitModel if the path has a PEFT adapter: transformers would load its base model instead."""
    if adapter_config("model.name", path, revision) is not None:
        raise UnfitModel(
            f"model.name: {name!r} is a PEFT adapter (it has adapter_config.json), expected a full model. Merge it "
            "into its base: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(NEW), "
            "and put the tokenizer beside it"
        )


def bitsandbytes_config(model_config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """The quantization_config of a checkpoint that bitsandbytes has quantised; None for others."""
    given = stored_quantization(model_config)
    return given if given and is_bitsandbytes(given) else None


def stored_quantization(model_config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """The quantization_config of a quantised checkpoint."""
    for each in (model_config, model_config.get_text_config(decoder=True)):
        given = getattr(each, "quantization_config", None) or getattr(each, "compression_config", None)
        if given:
            return given if isinstance(given, Mapping) else vars(given)
    return None


def require_trainable(model_config: PreTrainedConfig, longest: int) -> None:
    """Raise UnfitModel for configs of models that cannot be trained correctly on `longest` tokens."""
    kind = model_config.model_type
    try:
        model_config.get_text_config()
        text = model_config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnfitModel(f"model.name: the type {kind} has several language models, expected one") from error
    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    named = getattr(model_config, "architectures", None) or []
    require_fit(kind, text.model_type, named, stored_quantization(model_config),
                bool(getattr(model_config, "is_encoder_decoder", False)), own_code)  # fmt: skip
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise no_causal_lm(kind)
    is_bare = [name.endswith("Model") and not name.endswith("HeadModel") for name in named]
    if named and all(is_bare) and not getattr(text, "tie_word_embeddings", False):
        raise UnfitModel(f"model.name: a checkpoint of {named[0]} given (architectures in its config.json), expected a "
                         "causal language model: it has no head that predicts tokens")  # fmt: skip
    require_fixed_positions(lambda name: getattr(text, name, None), longest)
    require_causal(lambda name: getattr(text, name, None))


def require_decoder(model: nn.Module) -> None:
    """Raise UnfitModel if the config makes the model, with or without weights, an encoder."""
    kind = model.config.model_type
    if getattr(model.config, "is_decoder", True) or kind in IGNORE_IS_DECODER:
        return
    raise UnfitModel(f"model.name: a model of the type {kind} given that is an encoder, in which each token sees later "
                     "ones (is_decoder: false), expected a decoder: if it was trained as one, set `is_decoder: true` "
                     "in its config.json")  # fmt: skip


def adapter_targets(
    model: nn.Module, targets: str | Sequence[str], parameters: Sequence[str] = ()
) -> tuple[str | Sequence[str], str | None]:
    """Return the target modules for PEFT, and a note on layers that get no adapter and why, or None; `parameters` are
    names of experts' tensors that get some.

    Adapters go on plain linear layers of the language model with weights of their own. Raises UnfitModel if a name
    matches no such layer. The model may be on the meta device.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    own = {name for name, _ in model.named_parameters()}
    why_not = {name: reason for name, module in linear.items() if (reason := _obstacle(model, name, module, own))}
    leaves = {name.rpartition(".")[2] for name in linear}
    renamed = {leaf for leaf in leaves if _means_experts(model, {leaf})} if _means_experts(model, leaves) else set()
    for name in linear:
        if name not in why_not and name.rpartition(".")[2] in renamed:
            why_not[name] = "PEFT takes its name for the experts'"
    fit = [name for name in linear if name not in why_not]
    if not fit:
        raise UnfitModel(f"lora.target_modules: {targets!r} given, but {type(model).__name__} has no linear layers "
                         "that can have adapters: train it with `lora: null`")  # fmt: skip
    left_out = dict(why_not)
    if targets == "all-linear":
        head = _head_name(model)
        chosen = [name for name in fit if name != head]
        if not chosen and not parameters:
            obstacles = ", ".join(sorted(set(why_not.values())))
            raise UnfitModel("lora.target_modules: 'all-linear' given, which leaves out the head, and the other layers "
                             f"cannot have adapters ({obstacles}): name the head, [{head}], or train all weights with "
                             "`lora: null`")  # fmt: skip
        left_out.pop(head, None)
        owners = dict(model.named_modules())
        tensors = [name for name, p in model.named_parameters()
                   if len(full_shape(p)) == 3 and reads_text(model, name)
                   and not isinstance(owners[name.rpartition(".")[0]], nn.Conv1d)]  # fmt: skip
        fused = {name.rpartition(".")[2] for name in tensors
                 if not any(matches(name, each, False) for each in parameters)}  # fmt: skip
        left_out |= {name: "experts in one tensor" for name in sorted(fused)}
    else:
        given = [targets] if isinstance(targets, str) else list(targets)
        if not given:
            raise UnfitModel("lora.target_modules: [] given, but it names no layer. Expected `all-linear`, or names of "
                             "layers; `lora: null` trains all weights")  # fmt: skip
        matched = {each: [name for name in linear if matches(name, each, isinstance(targets, str))] for each in given}
        chosen = [name for name in fit if any(name in names for names in matched.values())]
        for each, names in matched.items():
            if not set(names) & set(fit):
                _refuse(model, targets, each, names, why_not, fit)
        left_out = {name: reason for names in matched.values() for name in names if (reason := why_not.get(name))}
    note = None
    if left_out:
        reasons = {reason: sorted({_kind(name) for name, why in left_out.items() if why == reason}) for reason in
                   dict.fromkeys(left_out.values())}  # fmt: skip
        note = "; ".join(f"{some_names(names)} ({reason})" for reason, names in reasons.items())
    is_pattern = isinstance(targets, str) and targets != "all-linear"  # it may match more
    # of a mixture of experts, PEFT's `all-linear` means its experts and routers too
    is_plain = note is None and not is_pattern and not parameters
    return (targets if is_plain else chosen), note


def _obstacle(model: nn.Module, name: str, module: nn.Module, own: Container[str]) -> str | None:
    """The reason why a linear layer cannot have an adapter, or None; `own` names the model's parameters, each once."""
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward, QuantizedLinear.forward):
        return "a layer with code of its own"
    if not reads_text(model, name):
        return "outside the language model"
    mixer, _, own_name = name.rpartition(".")
    if own_name != "in_proj" and all(hasattr(model.get_submodule(mixer), part) for part in ("A_log", "D", "conv1d")):
        return "Mamba's kernels take its weights without calling it"
    if not isinstance(module, QuantizedLinear) and f"{name}.weight" not in own:
        return "its weights are tied to another layer's"
    return None


def _means_experts(model: nn.Module, names: set[str]) -> bool:
    """Whether PEFT maps one of the names to experts, which had layers of that name in older releases."""
    if convert_peft_config_for_transformers is None:
        return False
    probe = PeftLoraConfig(target_modules=sorted(names))
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # the mapping needs other names of experts
        return True
    return not names <= set(probe.target_modules or ())


def reads_text(model: nn.Module, name: str) -> bool:
    """Whether a layer or parameter is part of the language model, and not of a vision or audio tower."""
    if model.config.get_text_config(decoder=True) is model.config:
        return True
    decoder, head = model.get_decoder(), _head_name(model)
    part = next((part for part, module in model.named_modules() if part and module is decoder), "")
    return not part or f"{name}.".startswith((f"{part}.", f"{head}."))


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def matches(name: str, target: str, is_pattern: bool) -> bool:
    """Match as PEFT does: a pattern matches full names, a name of a list also the end of a name."""
    return bool(re.fullmatch(target, name)) if is_pattern else name == target or name.endswith(f".{target}")


def _kind(name: str) -> str:
    """The name of a layer without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _refuse(
    model: nn.Module, targets: Any, target: str, names: Sequence[str], why_not: dict[str, str], fit: Sequence[str]
) -> None:
    short = {name.rpartition(".")[2] for name in fit}
    if names:
        raise refused_layer(targets, f"{target!r} cannot have adapters: {why_not[names[0]]}.", short)
    if isinstance(targets, str) and any(matches(name, target, False) for name in fit):
        raise no_pattern(target, short)
    if any(matches(name, target, False) for name, _ in model.named_modules()):
        raise refused_layer(targets, f"{target!r} is not a linear layer.", short)
    if any(len(full_shape(p)) == 3 and target.split("_")[0] in name for name, p in model.named_parameters()):
        raise refused_layer(targets, f"{target!r} is part of experts in one tensor (lora.target_parameters is for "
                            "these).", short)  # fmt: skip
    raise no_layer(targets, target, type(model).__name__, short)
