"""Load the models of a run: the base, and the policy with its adapters."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from ..config.schema import LoraConfig, ModelConfig
from ..distributed.deepspeed import unsharded_loading
from . import attention
from .adapter_values import load_adapter
from .checks import CANNOT, adapter_targets, reads_text, require_decoder, stored_quantization
from .config_files import hub_options, load_model_config
from .dequantization import become_plain, dequantized_loading
from .dropout import drop_by_token
from .expert_adapters import compute_adapters_apart, expert_parameters, of_experts
from .files import UnfitModel, dequantized_form, layers_obstacle, model_path, require_weights
from .large_pages import lay_together
from .loaded import note_own_head, require_finite, require_stored
from .peft import LoraLayer, PeftLoraConfig, with_new_adapters
from .policy import PLAIN, Policy, PolicyOptions, recompute_layers
from .quantization import quantized_loading, use_own_layers

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


def packing_obstacle(model_config: PreTrainedConfig, longest: int, trust_remote_code: bool = False) -> str | None:
    """The reason why packs with shared prompts do not fit this architecture and `longest` tokens, or None."""
    text = model_config.get_text_config()
    if obstacle := layers_obstacle(lambda name: getattr(text, name, None), longest):
        return obstacle
    if not getattr(text, "num_attention_heads", None):
        return "no attention layers"
    try:  # some architectures have their own tables of attention functions
        with unsharded_loading(), torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(model_config), attn_implementation=attention.NAME,
                                             trust_remote_code=trust_remote_code)  # fmt: skip
    except (KeyError, ValueError, ImportError) as error:
        return f"its code does not take another attention ({type(error).__name__}: {error})"
    return None


def attention_for(model: ModelConfig, model_config: PreTrainedConfig, longest: int) -> tuple[str | None, str | None]:
    """The `attn_implementation` to load a model with, and the reason in its config why prompts cannot be shared, or
    None."""
    if model.attn_implementation != "auto":
        return model.attn_implementation, "as model.attn_implementation asks"
    obstacle = packing_obstacle(model_config, longest, model.trust_remote_code)
    return (attention.NAME, None) if obstacle is None else (None, obstacle)


def load_causal_lm(
    model: ModelConfig, dtype: torch.dtype, attn_implementation: str | None, device: torch.device | None = None
) -> nn.Module:
    """A causal language model from the hub or a local path, on `device` or the CPU. Raises UnfitModel.

    Weights move to a GPU one by one. Otherwise each rank of a node would fill its memory with a full model. A quantised
    base has the layers of `quantized.py`, which compute in `dtype`.
    """
    on_cpu = device is None or device.type == "cpu"
    placed = {} if on_cpu else {"device_map": {"": device}}
    config = load_model_config(model)
    form = dequantized_form(stored_quantization(config))
    placed |= quantized_loading(model, dtype, device) if form is None else dequantized_loading(form)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model_path(model), config=config, dtype=dtype, attn_implementation=attn_implementation,
            output_loading_info=True, ignore_mismatched_sizes=True, **placed, **hub_options(model),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (*CANNOT, OSError, ImportError, SafetensorError) as error:
        raise UnfitModel(f"model.name: {model.name!r} cannot be loaded ({type(error).__name__}: {error})") from error
    require_stored(model.name, loaded, report)
    note_own_head(loaded)
    if form is not None:
        become_plain(loaded, form, dtype, report["unexpected_keys"])
    elif getattr(loaded, "hf_quantizer", None) is not None:
        use_own_layers(loaded, dtype)
    require_finite(model.name, loaded)
    if on_cpu:
        lay_together(loaded, torch.bfloat16)  # of others, a rollout has its own
    return loaded


def try_blank(
    model: ModelConfig, lora: LoraConfig | None, model_config: PreTrainedConfig, attn_implementation: str | None
) -> str | None:
    """Build the policy without weights, to check it and its adapters. Returns which layers get no adapter and why.

    Raises ValueError, also if weight files are missing.
    """
    require_weights(model.name, Path(model_path(model)), stored_quantization(model_config))
    with unsharded_loading(), torch.device("meta"):
        try:
            base = blank_causal_lm(model, model_config, torch.float32, attn_implementation)
        except (*CANNOT, ImportError) as error:
            raise UnfitModel(f"model.name: {model.name!r} cannot be built from its config ({type(error).__name__}: "
                             f"{error})") from error  # fmt: skip
        require_decoder(base)
        left_out = None if lora is None else adapter_targets(base, lora.target_modules, lora.target_parameters)[1]
        make_policy(base, model, lora)
    return left_out


def blank_causal_lm(
    model: ModelConfig, model_config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> nn.Module:
    """The model on the meta device, without weights, with the ties of the loaded model."""
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config), dtype=dtype, attn_implementation=attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
        blank.tie_weights()  # transformers 5.0 does not do that here
    return blank


def load_policy(
    model: ModelConfig, lora: LoraConfig | None, dtype: torch.dtype, attn_implementation: str | None,
    options: PolicyOptions = PLAIN, *, seed: int = 0, device: torch.device | None = None,
) -> Policy:  # fmt: skip
    """The policy, with its base on `device` or the CPU: in `dtype` with adapters, else in float32.

    Adapters have the values of `lora.init_from` where there is one.
    """
    base = load_causal_lm(model, dtype if lora else torch.float32, attn_implementation, device)
    policy = make_policy(base, model, lora, options, seed)
    if lora is not None and lora.init_from is not None:
        load_adapter(policy.model, lora.init_from)
    return policy


def make_policy(
    base: nn.Module, model: ModelConfig, lora: LoraConfig | None, options: PolicyOptions = PLAIN,
    seed: int = 0,
) -> Policy:  # fmt: skip
    """The policy: adapters, drawn with `seed`, on a frozen base, or all weights trained if `lora` is None."""
    policy = _new_policy(base, model, lora, options, seed)
    if model.gradient_checkpointing:
        recompute_layers(policy.causal_lm)  # each with all that it has become
    return policy


def _new_policy(
    base: nn.Module, model: ModelConfig, lora: LoraConfig | None, options: PolicyOptions, seed: int
) -> Policy:
    if lora is None:
        for name, parameter in base.named_parameters():  # weights that text never uses get no gradient on any rank
            parameter.requires_grad_(reads_text(base, name))
        return Policy(base, options)
    if model.gradient_checkpointing:
        base.enable_input_require_grads()
    torch.manual_seed(seed)  # all ranks draw the same adapters
    base.requires_grad_(False)
    targets, _ = adapter_targets(base, lora.target_modules, lora.target_parameters)
    adapted = with_new_adapters(base, PeftLoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_rslora=lora.use_rslora, target_parameters=expert_parameters(base, lora.target_parameters) or None,
    ))  # fmt: skip
    token_keys = drop_by_token(adapted, lora.dropout) if lora.dropout else None
    compute_adapters_apart(adapted)
    return Policy(adapted, options, token_keys)


def plain_name(name: str) -> str:
    """The name in the plain model of a parameter of the adapted model."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name.removeprefix("base_model.model."))


def adapted_layers(policy: Policy) -> dict[str, LoraLayer]:
    """Layers with adapters by the name of the plain model's layer, or of the experts' tensor that they are for."""
    layers = {name: module for name, module in policy.model.named_modules()
              if isinstance(module, LoraLayer) and module.lora_A}  # fmt: skip
    return {plain_name(name) + of_experts(module): module for name, module in layers.items()}


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in a fixed order."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def base_identity(model: ModelConfig, model_config: PreTrainedConfig) -> str:
    """A text that identifies a base model: its name, revision and config, independent of its location."""
    config = {key: value for key, value in model_config.to_dict().items()
              if key not in ("_name_or_path", "transformers_version")}  # fmt: skip
    asked = {} if model.quantization is None else {"quantization": model.quantization}
    return json.dumps({"name": model.name, "revision": model.revision, "config": config} | asked, sort_keys=True,
                      default=str)  # fmt: skip
