"""The size of a model, and the memory of its passes over a pack, without its weights.

The passes run on tensors that have shapes but no memory. They are the trainer's own code, so that the counts follow
every change of it.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.schema import Config
from ..model import attention
from ..model.checks import bitsandbytes_config
from ..model.expert_adapters import adapted_weight
from ..model.files import kind_of
from ..model.load import blank_causal_lm, make_policy, trainable
from ..model.packing import Pack, Piece, make_pack
from ..model.peft import LoraLayer
from ..model.policy import Policy
from ..model.quantization import quantize_blank
from ..model.quantized import quantized_layers
from ..rollout.room import cache_width
from ..rollout.sampling import Rules, draw, sampling_of
from ..types import Batch, Prompt
from .live import LiveBytes
from .memory import PERSISTENCE_THRESHOLD, ModelCounts, Passes

TRACED_LAYERS = (2, 4)
"""Depths at which a deeper model is traced. The memory of its passes grows by the same amount with each layer."""
PREFILL_TOKENS = 1024
JOINED = ("q_proj", "k_proj", "v_proj")

Shape = tuple[tuple[int, tuple[int, ...]], ...]
"""The pieces of a pack: the length of each prompt, and of its completions."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of the weights."""

    policy: torch.dtype
    copy: torch.dtype
    casts_all: bool
    """All weights of the policy compute in its dtype, as with DeepSpeed. Otherwise trained weights stay in float32, and
    autocast computes with a smaller dtype."""


def build_policy(
    config: Config, model_config: Any, implementation: str | None, precision: Precision, num_layers: int | None = None
) -> Policy:
    """The policy on the meta device, with `num_layers` layers or all."""
    shape = copy.deepcopy(model_config)
    text = shape.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        if vars(text).get("layer_types"):
            text.layer_types = text.layer_types[:num_layers]
    base = blank_causal_lm(config.model, shape, precision.policy if config.lora else torch.float32, implementation)
    kind = kind_of(config.model, bitsandbytes_config(model_config))
    if kind is not None and config.lora is not None:
        quantize_blank(base, kind, model_config, precision.policy)
    with torch.device("meta"):
        policy = make_policy(base, config.model, config.lora, config.rollout.temperature, config.train.seed,
                             has_critic=config.advantage.baseline == "critic",
                             entropy_gradient=config.loss.entropy_coeff > 0)  # fmt: skip
    if precision.casts_all:
        policy.to(precision.policy)
    policy.fused_head = isinstance(policy.causal_lm.get_output_embeddings(), nn.Linear)
    return policy.train()


def count(policy: Policy) -> ModelCounts:
    """The counts of a policy on any device."""
    trained = {id(p) for p in trainable(policy).values()}
    base = [p for p in policy.parameters() if id(p) not in trained]
    adapted = [adapted_weight(module) for module in policy.modules()
               if isinstance(module, LoraLayer) and module.lora_A]  # fmt: skip
    quantized = quantized_layers(policy)
    sizes = {name: layer.in_features * layer.out_features for name, layer in quantized.items()}
    every = list(trainable(policy).values())
    text = policy.causal_lm.config.get_text_config()
    return ModelCounts(
        parameters=sum(p.numel() for p in base or every if p.is_floating_point()) + sum(sizes.values()),
        adapters=sum(p.numel() for p in every) if base else 0,
        adapted=sum(p.numel() for p in adapted),
        joined=sum(
            p.numel()
            for name, p in policy.named_parameters()
            if name.removesuffix(".weight").removesuffix(".base_layer").endswith(JOINED)
        )
        + sum(size for name, size in sizes.items() if name.removesuffix(".base_layer").endswith(JOINED)),
        quantized=sum(sizes.values()),
        quantized_bytes=sum(layer.num_bytes for layer in quantized.values()),
        persistent=sum(p.numel() for p in base if p.numel() < PERSISTENCE_THRESHOLD),
        num_layers=text.num_hidden_layers,
        layer=max(
            (
                sum(p.numel() for p in module.parameters())
                for module in policy.modules()
                if isinstance(module, GradientCheckpointingLayer)
            ),
            default=0,
        ),
        query_heads=getattr(text, "num_attention_heads", None) or 0,
        cache_width=cache_width(text),
        vocabulary=text.vocab_size,
    )


def reward_model_bytes(config: Config) -> int:
    """Bytes of the weights of a config's `reward_model` rewards, without the memory of their calls. Raises OSError if a
    model does not exist."""
    total = 0
    for reward in (reward for reward in config.rewards if reward.name == "reward_model"):
        given = {name: reward.args[name] for name in ("revision", "trust_remote_code") if name in reward.args}
        model_config = AutoConfig.from_pretrained(reward.args["model"], **given)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                model_config, trust_remote_code=given.get("trust_remote_code", False)
            )
        dtype = getattr(torch, reward.args.get("dtype", "float32"))
        total += sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return total


def trace_passes(
    config: Config, model_config: Any, implementation: str | None, precision: Precision,
    shape: Shape, of_reference: Shape | None,
) -> Passes:  # fmt: skip
    """The memory, without weights, of the passes over a pack of that `shape`, and of the reference over `of_reference`.

    None leaves out the reference, which is the policy's base in the dtype of the copy. Raises ValueError for models
    whose code or operations need the values of tensors.
    """
    depth = model_config.get_text_config().num_hidden_layers
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints errors as well
    depths = (depth,) if depth <= TRACED_LAYERS[-1] else TRACED_LAYERS
    try:
        rows = [_trace(config, model_config, implementation, precision, shape, of_reference, num_layers)
                for num_layers in depths]  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"model.name: memory of the model type {model_config.model_type} cannot be predicted, since "
                         f"its passes do not run on tensors without values: {error}") from error  # fmt: skip
    if len(rows) == 2:
        rows = [[low + (high - low) * (depth - depths[0]) // (depths[-1] - depths[0])
                 for low, high in zip(*rows, strict=True)]]  # fmt: skip
    update, reference, prefill = rows[0]
    sampling = _trace_sampling(config, model_config.get_text_config().vocab_size, precision.policy)
    return Passes(update, reference if of_reference else 0, prefill, sampling)


def _trace_sampling(config: Config, vocabulary: int, dtype: torch.dtype) -> float:
    """Bytes that sampling needs for each logit."""
    rollout, rows = config.rollout, 8
    sampling = replace(sampling_of(rollout), min_new_tokens=rollout.min_new_tokens,
                       banned=(0,) if rollout.banned_tokens else ())  # fmt: skip
    with FakeTensorMode():
        logits, counters = torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, dtype=torch.int64)
        rules = Rules(sampling, [0], logits.device)
        with LiveBytes() as live:
            draw(logits, counters, counters, sampling, rules)
    return live.peak / logits.numel()


def _trace(
    config: Config, model_config: Any, implementation: str | None, precision: Precision,
    shape: Shape, of_reference: Shape | None, num_layers: int,
) -> list[int]:  # fmt: skip
    policy = build_policy(config, model_config, implementation, precision, num_layers)
    plain = replace(config, lora=None, model=replace(config.model, gradient_checkpointing=False, quantization=None),
                    reference=replace(config.reference, placement="copy"))  # fmt: skip
    frozen, decoding = (
        build_policy(plain, model_config, implementation, Precision(dtype, dtype, casts_all=True), num_layers)
        .requires_grad_(False).eval() for dtype in (precision.copy, precision.policy)
    )  # fmt: skip
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    share_prompts = implementation == attention.NAME
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or PREFILL_TOKENS
    num_prefilled = min(PREFILL_TOKENS, positions)
    one = ((num_prefilled - 1, (1,)),)
    pack, larger, prompt = (example_pack(each, share_prompts) for each in (shape, of_reference or one, one))
    mixed = precision.policy != torch.float32 and not precision.casts_all
    with fake:
        for each in (policy, frozen, decoding):
            _materialise(each)
        for parameter in trainable(policy).values():  # as after the first pack of an update
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as update:
            with torch.autocast("cpu", precision.policy, enabled=mixed):
                answers = policy(pack)
            sum(answer.sum() for answer in answers if answer is not None and answer.requires_grad).backward()
        with torch.no_grad(), LiveBytes() as reference:
            frozen(larger)
        with torch.no_grad(), LiveBytes() as prefill:
            decoding(prompt)
    return [update.peak, reference.peak, prefill.peak // num_prefilled]


def example_pack(shape: Shape, share_prompts: bool) -> Pack:
    """A pack of this shape."""
    lengths = torch.tensor([length for _, completions in shape for length in completions])
    group = torch.tensor([g for g, (_, completions) in enumerate(shape) for _ in completions])
    zeros = torch.zeros(len(lengths))
    tokens = torch.zeros(int(lengths.sum()), dtype=torch.int64)
    prompts = [Prompt(g, [0] * length, "") for g, (length, _) in enumerate(shape)]
    batch = Batch(prompts, group, lengths, zeros > 0, tokens, tokens == 0, tokens.float(), zeros[:, None], zeros)
    pieces = [Piece(g, torch.nonzero(group == g)[:, 0].tolist()) for g in range(len(shape))]
    return make_pack(batch, pieces, share_prompts=share_prompts)


def _materialise(module: nn.Module) -> None:
    """Move tensors from the meta device to the CPU inside a FakeTensorMode: they have shapes but no memory."""
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for each in module.modules():
        tables: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
        for table in tables:
            for name, old in table.items():
                if old is not None and old not in made:
                    new = torch.empty_like(old, device="cpu")
                    trained = isinstance(old, nn.Parameter)
                    made[old] = nn.Parameter(new, requires_grad=old.requires_grad) if trained else new
                if old is not None:
                    table[name] = made[old]
