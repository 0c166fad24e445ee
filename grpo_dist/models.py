"""The models of a run: the policy with its adapters, the frozen copy, how one follows the other, and the export.

The frozen copy is a plain model without adapters. It holds the base weights, which make it the reference; for rollouts
the weights that training changes are exchanged for a second set, which `sync` refills from the policy after each step:
with LoRA the merged linear layers, else all of them.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from . import attention
from .adapters import fuse_adapters
from .checks import require
from .config import LoraConfig, ModelConfig
from .critic import HEAD
from .distributed import is_sharded, unsharded_loading, whole
from .packing import Pack
from .policy import Policy
from .toy import MODELS, toy_path

log = logging.getLogger(__name__)


def model_path(model: ModelConfig) -> str:
    """What `from_pretrained` is given."""
    return str(toy_path(model.name)) if model.name in MODELS else model.name


def _hub_options(model: ModelConfig) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer, with a padding token (the first end-of-sequence token where it has none)."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(model), **_hub_options(model))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.name: the tokenizer of {model.name!r} has no end-of-sequence token; completions could "
                         "only end by their length. Set `eos_token` in its tokenizer_config.json")  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(model: ModelConfig, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config, sorted."""
    ends = {tokenizer.eos_token_id}
    for source in (GenerationConfig, AutoConfig):
        try:
            options = _hub_options(model) if source is AutoConfig else {"revision": model.revision}
            given = source.from_pretrained(model_path(model), **options).eos_token_id
        except OSError:  # many repositories have no generation_config.json
            continue
        ends |= set(given if isinstance(given, list) else [given]) - {None}
    return sorted(ends)


def load_model_config(model: ModelConfig) -> Any:
    """The model's transformers config."""
    return AutoConfig.from_pretrained(model_path(model), **_hub_options(model))


def check_model_config(model_config: Any, tokenizer: Any, longest: int) -> None:
    """Raise ValueError where the model cannot hold sequences of `longest` tokens, or its tokenizer's vocabulary."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(f"data.max_prompt_length + rollout.max_completion_length: {longest} tokens given, the model "
                         f"has {positions} positions (max_position_embeddings)")  # fmt: skip
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"model.name: the tokenizer has {len(tokenizer)} tokens, the model only {text.vocab_size}")


def packing_obstacle(model_config: Any, longest: int, trust_remote_code: bool = False) -> str | None:
    """Why packs with shared prompts cannot express this architecture for sequences of `longest` tokens, or None."""
    text = model_config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_window", None)
    kinds = set(getattr(text, "layer_types", None) or [])
    slides = bool(window) and (not kinds or "sliding_attention" in kinds)
    if slides and window < longest:
        return f"attention in a sliding window of {window} tokens, shorter than the longest sequence of {longest}"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"layers of the kinds {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
    for option in ("attn_logit_softcapping", "attention_chunk_size", "use_mrope"):
        if getattr(text, option, None):
            return f"its option {option}"
    if not getattr(text, "num_attention_heads", None):
        return "no attention layers"
    try:  # some architectures look the attention up in tables of their own
        with unsharded_loading(), torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(model_config), attn_implementation=attention.NAME,
                                             trust_remote_code=trust_remote_code)  # fmt: skip
    except (KeyError, ValueError, ImportError) as error:
        return f"its code does not take another attention ({type(error).__name__}: {error})"
    return None


def attention_for(model: ModelConfig, model_config: Any, longest: int) -> tuple[str | None, str | None]:
    """The `attn_implementation` to load a model with, and why its prompts cannot be shared, or None as far as its
    config tells."""
    if model.attn_implementation != "auto":
        return model.attn_implementation, "as model.attn_implementation asks"
    obstacle = packing_obstacle(model_config, longest, model.trust_remote_code)
    return (attention.NAME, None) if obstacle is None else (None, obstacle)


def load_causal_lm(model: ModelConfig, dtype: torch.dtype, attn_implementation: str | None) -> nn.Module:
    """A causal language model from the hub or a local path, without dropout."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model_path(model), dtype=dtype, attn_implementation=attn_implementation, **_hub_options(model)
    )
    for module in loaded.modules():
        if isinstance(module, nn.Dropout):  # a rollout and its update must see the same model
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return loaded


def load_policy(
    model: ModelConfig, lora: LoraConfig | None, dtype: torch.dtype, attn_implementation: str | None,
    temperature: float, seed: int, *, has_critic: bool = False, entropy_gradient: bool = False,
) -> Policy:  # fmt: skip
    """The policy, with its base loaded: in `dtype` under adapters, in float32 where all of it is trained."""
    base = load_causal_lm(model, dtype if lora else torch.float32, attn_implementation)
    return make_policy(base, model, lora, temperature, seed, has_critic=has_critic, entropy_gradient=entropy_gradient)


def make_policy(
    base: nn.Module, model: ModelConfig, lora: LoraConfig | None, temperature: float, seed: int, *,
    has_critic: bool = False, entropy_gradient: bool = False,
) -> Policy:  # fmt: skip
    """The policy: adapters on a frozen base, or the whole of it to train (`lora` None)."""
    extras = {"has_critic": has_critic, "entropy_gradient": entropy_gradient}
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            base.enable_input_require_grads()
    if lora is None:
        return Policy(base, temperature, **extras)
    torch.manual_seed(seed)  # every rank draws the same adapters
    base.requires_grad_(False)
    adapted = get_peft_model(base, PeftLoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    ))  # fmt: skip
    fuse_adapters(adapted, is_sharded)
    policy = Policy(adapted, temperature, **extras)
    _check_adapters(policy, lora)
    return policy


def _check_adapters(policy: Policy, lora: LoraConfig) -> None:
    """Raise ValueError where an adapter sits on weights that cannot be merged: an embedding, or a head tied to one."""
    plain = {plain_name(name) for name, _ in policy.causal_lm.named_parameters()}  # tied weights under one name
    adapters = {plain_name(name): layer for name, layer in policy.model.named_modules() if isinstance(layer, LoraLayer)}
    refused = [name for name, layer in adapters.items() if not layer.lora_A or f"{name}.weight" not in plain]
    require(not refused, "lora.target_modules", lora.target_modules, f"linear layers with weights of their own, which "
            f"{', '.join(refused)} is not: train it with `lora: null`, or leave it out")  # fmt: skip


def plain_name(name: str) -> str:
    """The name a parameter of an adapted model has in the plain model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def adapted_layers(policy: Policy) -> dict[str, LoraLayer]:
    """Layers with adapters by the name of the plain model's layer."""
    return {plain_name(name): module for name, module in policy.model.named_modules()
            if isinstance(module, LoraLayer) and module.lora_A}  # fmt: skip


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    """What training changes, by name, in a fixed order."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


class FrozenCopy:
    """The base model frozen, as the reference and, with the policy's weights exchanged in, as the rollout model."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self.policy = Policy(model.eval().requires_grad_(False), temperature)
        self.model = model
        self._own = dict(model.named_parameters())
        self._trained: dict[str, Tensor] = {}

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        """Refill the rollout weights from the policy; a collective under ZeRO-3."""
        own, parameters = self._own, trainable(policy)
        with whole(list(parameters.values())):
            if isinstance(policy.model, PeftModel):
                for name, layer in adapted_layers(policy).items():
                    key = f"{name}.weight"
                    delta = layer.get_delta_weight("default").to(own[key].device, torch.float32)
                    self._put(key, own[key], own[key].float() + delta)
            else:
                for name, value in parameters.items():
                    if name.startswith(HEAD):
                        continue
                    key = name.removeprefix("model.")
                    self._put(key, own[key], value)

    def _put(self, key: str, own: Tensor, value: Tensor) -> None:
        if key not in self._trained:
            self._trained[key] = torch.empty_like(own)
        self._trained[key].copy_(value)

    @contextmanager
    def trained(self) -> Iterator[nn.Module]:
        """Inside, the copy computes as the policy did at the last `sync`."""
        own = self._own
        base = {key: own[key].data for key in self._trained}
        try:
            for key, value in self._trained.items():
                own[key].data = value
            yield self.model
        finally:
            for key, value in base.items():
                own[key].data = value

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """Log-probabilities (M,) under the base model."""
        return self.policy(pack)[0]


class SharedReference:
    """The policy as its own reference, adapters off, and as the rollout model: where no copy fits beside it.

    For a rollout the policy's weights are made whole once and lent to a second tree of modules, which ZeRO-3's hooks do
    not know and therefore do not partition again between two tokens.
    """

    def __init__(self, wrapped: Any, policy: Policy, lora: LoraConfig, attn_implementation: str | None) -> None:
        self.wrapped, self.policy = wrapped, policy
        with unsharded_loading(), torch.device("meta"):
            tree = type(policy.causal_lm)._from_config(
                policy.causal_lm.config, attn_implementation=attn_implementation, dtype=policy.causal_lm.dtype
            )
            tree = get_peft_model(tree, policy.model.peft_config["default"])
        self.tree = tree.eval().requires_grad_(False)
        for name, buffer in policy.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.tree.get_submodule(owner)._buffers[leaf] = buffer

    def sync(self, policy: Policy) -> None:
        """Nothing to do: the weights are the policy's own."""

    @contextmanager
    def trained(self) -> Iterator[nn.Module]:
        """Inside, the second tree holds the policy's whole weights."""
        # tied weights have two names; both trees list them under both
        theirs = dict(self.policy.model.named_parameters(remove_duplicate=False))
        with torch.no_grad(), whole(list(self.policy.model.parameters())):
            mine = dict(self.tree.named_parameters(remove_duplicate=False))
            for name in mine:
                owner, _, leaf = name.rpartition(".")
                self.tree.get_submodule(owner)._parameters[leaf] = nn.Parameter(theirs[name].data, requires_grad=False)
            try:
                yield self.tree.get_base_model()
            finally:
                for name in mine:
                    owner, _, leaf = name.rpartition(".")
                    self.tree.get_submodule(owner)._parameters[leaf] = mine[name]

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """Log-probabilities (M,) under the policy without its adapters; a collective under ZeRO-3."""
        with self.policy.model.disable_adapter():
            return self.wrapped(pack)[0]


def base_identity(model: ModelConfig, model_config: Any) -> str:
    """What tells one base model from another: its name, revision and configuration, wherever it lies."""
    config = {key: value for key, value in model_config.to_dict().items()
              if key not in ("_name_or_path", "transformers_version")}  # fmt: skip
    return json.dumps({"name": model.name, "revision": model.revision, "config": config}, sort_keys=True, default=str)
