"""The models of a training: policy, reference, rollout weights, and the engine that decodes with these."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import store as checkpoint
from ..config.algorithm import has_reference
from ..config.rollout import RolloutConfig
from ..config.schema import Config
from ..distributed.deepspeed import unsharded_loading
from ..distributed.device import gpu_multiplies_bfloat16, resolve_dtype
from ..distributed.optimizer_state import OptimizerState, WholeOptimizerState
from ..distributed.ranks import Ranks
from ..model.adapter import require_own_values
from ..model.checks import bitsandbytes_config
from ..model.config_files import short_window
from ..model.dequantization import describe_dequantized, form_of
from ..model.files import UnfitModel, kind_of, require_unsharded
from ..model.load import attention_for, load_causal_lm, load_policy, trainable
from ..model.loaded import base_fits_bfloat16
from ..model.optimizer import make_optimizer
from ..model.policy import Policy, PolicyOptions
from ..model.quantization import describe
from ..model.reference import (
    AdaptersAtStart,
    AdaptersOff,
    FrozenCopy,
    Reference,
    doubt_of_copy,
    is_same_base,
    needs_copy,
)
from ..model.rollout_weights import RolloutModel
from ..model.routing import Routers
from ..model.split_rows import require_whole_groups
from ..rollout import Engine
from ..rollout.choose import make_engine
from ..rollout.native.kernel import has_few_sequences
from ..rollout.own_attention import require_no_noise, settle_attention
from ..rollout.probe import head_is_plain
from ..rollout.replay import settle_replay
from ..rollout.vllm.policy import ServedRun
from ..rollout.vllm.start import make_vllm_engine

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What is trained, what it is compared with, and what draws completions."""

    policy: Policy
    wrapped: torch.nn.Module
    """The policy as the strategy wraps it: the one to call."""
    optimizer: Any
    optimizer_state: OptimizerState | WholeOptimizerState
    reference: Reference | None
    """None where nothing depends on it."""
    rollout_model: RolloutModel
    engine: Engine
    share_prompts: bool
    """Whether a pack computes a prompt once for several completions."""
    routers: Routers | None
    """The policy's, where reference and update take the experts of the rollout."""


def load_models(
    config: Config, model_config: PreTrainedConfig, end_ids: list[int], ranks: Ranks, resume_from: Path | None
) -> Models:
    """Load and try them; a collective. Raises UnfitModel and UnfitEngine where they cannot be trained or decode."""
    dtype = resolve_dtype(config.model.dtype)
    kind = kind_of(config.model, bitsandbytes_config(model_config))
    require_unsharded(kind is not None, ranks.strategy.shards_weights)
    require_own_values(config, ranks.strategy.shards_weights)
    implementation, obstacle = attention_for(config.model, model_config, config.max_sequence_length)
    window = short_window(model_config, config.max_sequence_length)
    policy = load_policy(config.model, config.lora, dtype, implementation, PolicyOptions.of(config),
                         seed=config.train.seed,
                         device=None if ranks.strategy.shards_weights else ranks.device)  # fmt: skip
    if kind is not None:
        log.info("%s", describe(policy, kind))
    if (form := form_of(policy.causal_lm)) is not None:
        log.info("%s", describe_dequantized(policy.causal_lm, form))
    optimizer = make_optimizer(policy, config)
    ranks.wait_at("loaded the model")  # a download may take longer than a collective of the start waits
    wrapped, prepared = ranks.prepare(policy, optimizer)
    wrapped.train()
    state_of = OptimizerState if config.optim.optimizer == "adamw" else WholeOptimizerState
    optimizer_state = state_of(ranks, prepared, trainable(policy))
    reference = _load_reference(config, ranks, wrapped, policy, dtype, implementation, kind is not None)
    ranks.wait_at("loaded the reference")
    base = reference.policy.causal_lm if isinstance(reference, FrozenCopy) else None
    rollout_model = RolloutModel(policy, dtype, implementation, base)
    policies = [policy, *([reference.policy] if reference else [])]  # may be one
    with rollout_model.open() as model:
        models = [*(each.causal_lm for each in policies), model]
        obstacle = settle_attention(models, implementation, obstacle, config.model.attn_implementation != "auto",
                                    ranks.gather_objects, window)  # fmt: skip
    try:
        require_whole_groups(config, model_config, ranks.num_ranks, obstacle)
    except ValueError as error:
        raise UnfitModel(str(error)) from error
    share_prompts = obstacle is None
    require_no_noise(wrapped, policy, share_prompts, ranks.gather_objects)
    saved = {} if resume_from is None else checkpoint.load_meta(resume_from)
    rollout = engine_to_keep(config.rollout, saved)
    with rollout_model.open() as model:
        plain = head_is_plain(model, share_prompts)
        routers = settle_replay(models, rollout, share_prompts, ranks.gather_objects)
    engine: Engine
    if config.rollout.engine == "vllm":
        served = ServedRun(config, ranks, rollout_model, policy, end_ids, routers)
        engine = make_vllm_engine(served, saved.get("step", 0))
    else:
        engine = make_engine(rollout_model, obstacle, end_ids, rollout, ranks.gather_objects, saved.get("decoding"),
                             compact=has_few_sequences(config))  # fmt: skip
    for each in policies:
        each.fused_head = plain and isinstance(each.causal_lm.get_output_embeddings(), torch.nn.Linear)
    return Models(policy, wrapped, prepared, optimizer_state, reference, rollout_model, engine, share_prompts,
                  routers)  # fmt: skip


def engine_to_keep(rollout: RolloutConfig, saved: dict[str, Any]) -> RolloutConfig:
    """The options with the engine that a checkpoint's metadata (`saved`) names, where the config leaves it open.

    Another engine would round differently.
    """
    return rollout if rollout.engine != "auto" else replace(rollout, engine=saved.get("engine", "auto"))


def _load_reference(
    config: Config, ranks: Ranks, wrapped: torch.nn.Module, policy: Policy, dtype: torch.dtype,
    implementation: str | None, is_quantized: bool,
) -> Reference | None:  # fmt: skip
    """The policy itself, with its adapters off or as they were at the start, or a copy; None where nothing depends on
    it. `dtype` is the policy's."""
    copy_dtype = resolve_dtype(config.reference.dtype)
    if not has_reference(config):
        return None
    lora = config.lora
    has_adapter = lora is not None and lora.init_from is not None and config.reference.model == "adapter"
    has_base = not ranks.strategy.shards_weights and (is_quantized or is_same_base(
        dtype, copy_dtype, fast_bfloat16=gpu_multiplies_bfloat16(),
        in_bfloat16=lambda: base_fits_bfloat16(policy.model)))  # fmt: skip
    if not needs_copy(config, has_base):
        return (AdaptersAtStart if has_adapter else AdaptersOff)(wrapped, policy)
    if rounded := doubt_of_copy(dtype, copy_dtype):
        log.warning("%s", rounded)
    with unsharded_loading():
        if has_adapter and lora is not None:
            copy = load_policy(config.model, replace(lora, dropout=0.0), copy_dtype, implementation,
                               seed=config.train.seed, device=ranks.device).model  # fmt: skip
        else:
            copy = load_causal_lm(config.model, copy_dtype, implementation, ranks.device)
    return FrozenCopy(copy, config.rollout.temperature, fuses_layers=policy.options.fuses_layers)
