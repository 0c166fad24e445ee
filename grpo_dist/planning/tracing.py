"""The size of a model, and the memory of its passes over a pack, without its weights.

The passes run on tensors that have shapes but no memory. They are the trainer's own code, so that the counts follow
every change of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.schema import Config, ReferenceConfig
from ..model import attention
from ..model.checks import bitsandbytes_config
from ..model.expert_adapters import adapted_weight
from ..model.files import kind_of
from ..model.fixed_row import most_positions
from ..model.load import blank_causal_lm, make_policy, trainable
from ..model.pack_kernels import traced_kernels
from ..model.packing import Pack, Piece, make_pack
from ..model.peft import LoraLayer
from ..model.policy import Policy, PolicyOptions
from ..model.quantization import quantize_blank
from ..model.quantized import quantized_layers
from ..rewards.reward_model import stored_config
from ..rollout.native.relaid import SMALLEST_GROUPED
from ..rollout.room import cache_width
from ..rollout.sampling import Rules, draw, sampling_of
from ..types import Batch, Prompt
from .live import LiveBytes
from .memory import FLOAT32, PERSISTENCE_THRESHOLD, ModelCounts, Passes

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

TRACED_LAYERS = (2, 4)
"""Depths at which a deeper model is traced. The memory of its passes grows by the same amount with each layer."""
TRACED_TOKENS = 1024
"""Tokens of the prefill that is traced."""
JOINED = ("q_proj", "k_proj", "v_proj")

Shape = tuple[tuple[int, tuple[int, ...]], ...]
"""The pieces of a pack: the length of each prompt, and of its completions, as far as the pack computes them."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of the weights."""

    policy: torch.dtype
    copy: torch.dtype
    casts_all: bool
    """All weights of the policy compute in its dtype, as with DeepSpeed. Otherwise trained weights stay in float32, and
    autocast computes with a smaller dtype."""


def build_policy(
    config: Config, model_config: PreTrainedConfig, implementation: str | None, precision: Precision,
    num_layers: int | None = None,
) -> Policy:  # fmt: skip
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
        policy = make_policy(base, config.model, config.lora, PolicyOptions.of(config))
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
        grouped=sum(p.numel() for p in adapted if p.numel() * FLOAT32 >= SMALLEST_GROUPED),
        joined=sum(
            p.numel()
            for name, p in policy.named_parameters()
            if name.removesuffix(".weight").removesuffix(".base_layer").endswith(JOINED)
        )
        + sum(size for name, size in sizes.items() if name.removesuffix(".base_layer").endswith(JOINED)),
        quantized=sum(sizes.values()),
        quantized_bytes=sum(layer.num_bytes for layer in quantized.values()),
        scale_bytes=sum(layer.stored().scales.nbytes for layer in quantized.values()),
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
        model_config = stored_config(reward.args["model"], **given)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                model_config, trust_remote_code=given.get("trust_remote_code", False)
            )
        dtype = getattr(torch, reward.args.get("dtype", "float32"))
        total += sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return total


def trace_passes(
    config: Config, model_config: PreTrainedConfig, implementation: str | None, precision: Precision,
    shape: Shape, of_reference: Shape | None, on_cpu: bool,
) -> Passes:  # fmt: skip
    """The memory, without weights, of the passes over a pack of that `shape`, and of the reference over `of_reference`,
    on a GPU or on a CPU with this project's kernels for it.

    None leaves out the reference, which is the policy's base in the dtype of the copy. Raises ValueError for models
    whose code or operations need the values of tensors.
    """
    text = model_config.get_text_config()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints errors as well
    num_prefilled = min(TRACED_TOKENS, most_positions(model_config))
    traced = _Traced(config, model_config, implementation, on_cpu)
    try:
        update = traced.update(precision, shape)
        reference = traced.frozen(precision.copy, of_reference) if of_reference else 0
        prefill = traced.frozen(precision.policy, ((num_prefilled - 1, (1,)),)) // num_prefilled
    except RuntimeError as error:
        raise ValueError(f"model.name: memory of the model type {model_config.model_type} cannot be predicted, since "
                         f"its passes do not run on tensors without values: {error}") from error  # fmt: skip
    return Passes(update, reference, prefill, _trace_sampling(config, text.vocab_size, precision.policy))


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


_peaks: dict[tuple[object, ...], int] = {}
"""Peaks by everything that a pass depends on. Each is traced once in a process: plans of one model differ little."""


class _Traced:
    """Peaks of a model's passes, in bytes and without its weights."""

    def __init__(
        self, config: Config, model_config: PreTrainedConfig, implementation: str | None, on_cpu: bool
    ) -> None:
        self.config, self.model_config, self.implementation, self.on_cpu = config, model_config, implementation, on_cpu

    def update(self, precision: Precision, shape: Shape) -> int:
        """The peak of a pass over a pack of the update, and back."""
        return self._by_depth(_trace_update, self.config, replace(precision, copy=precision.policy), shape)

    def frozen(self, dtype: torch.dtype, shape: Shape) -> int:
        """The peak of a pass of the base alone, in a dtype."""
        model = replace(self.config.model, gradient_checkpointing=False, quantization=None)
        plain = replace(self.config, lora=None, model=model, reference=ReferenceConfig())
        return self._by_depth(_trace_frozen, plain, Precision(dtype, dtype, casts_all=True), shape)

    def _by_depth(self, trace: Callable[..., int], config: Config, precision: Precision, shape: Shape) -> int:
        depth = self.model_config.get_text_config().num_hidden_layers
        if depth <= TRACED_LAYERS[-1]:
            return self._peak(trace, config, precision, shape, depth)
        low, high = (self._peak(trace, config, precision, shape, num_layers) for num_layers in TRACED_LAYERS)
        return low + (high - low) * (depth - TRACED_LAYERS[0]) // (TRACED_LAYERS[1] - TRACED_LAYERS[0])

    def _peak(self, trace: Callable[..., int], config: Config, precision: Precision, shape: Shape, depth: int) -> int:
        built = repr((config.model, config.lora, PolicyOptions.of(config), self.model_config))
        given = trace, built, self.implementation, precision, shape, depth, self.on_cpu
        if given not in _peaks:
            policy = build_policy(config, self.model_config, self.implementation, precision, depth)
            pack = example_pack(shape, self.implementation == attention.NAME)
            with traced_kernels() if self.on_cpu else nullcontext():
                _peaks[given] = trace(policy, pack, precision)
        return _peaks[given]


def _trace_update(policy: Policy, pack: Pack, precision: Precision) -> int:
    mixed = precision.policy != torch.float32 and not precision.casts_all
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(policy)
        for parameter in trainable(policy).values():  # as after the first pack of an update
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            with torch.autocast("cpu", precision.policy, enabled=mixed):
                answers = policy(pack)
            sum(answer.sum() for answer in answers if answer is not None and answer.requires_grad).backward()
    return live.peak


def _trace_frozen(policy: Policy, pack: Pack, precision: Precision) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(policy.requires_grad_(False).eval())
        with torch.no_grad(), LiveBytes() as live:
            policy(pack)
    return live.peak


def example_pack(shape: Shape, share_prompts: bool) -> Pack:
    """A pack of this shape."""
    lengths = 1 + torch.tensor([length for _, completions in shape for length in completions])  # see `packing`
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
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty_like(old, device="cpu")
                    trained = isinstance(old, nn.Parameter)
                    made[old] = nn.Parameter(new, requires_grad=old.requires_grad) if trained else new
                table[name] = made[old]
