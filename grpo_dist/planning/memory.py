"""Memory of one rank, by part and phase. Pure arithmetic without a model.

The parts follow trainer/: weights and optimizer exist always, the cache and the logits of decoding during the rollout,
the activations of one pack during the update. Bytes are those of tensors. A process needs more: the interpreter,
libraries, and on a GPU the CUDA context and the fragments of the allocator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
"""DDP is also one process."""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
Phase = Literal["always", "rollout", "reference", "update", "optimizer"]
PHASES: tuple[Phase, ...] = ("rollout", "reference", "update", "optimizer")

FLOAT32 = 4

RESERVE = 0.1
"""Share of a GPU's memory for what is not a tensor: the CUDA context, libraries, fragments of the allocator."""

SHARDS_WEIGHTS = ("ZeRO-3", "FSDP2")
"""Strategies in which a rank has a part of the weights."""

PERSISTENCE_THRESHOLD = 100_000
"""ZeRO-3 does not shard parameters with fewer elements (stage3_param_persistence_threshold)."""
MOST_GATHERED = 1_000_000_000
"""Most elements that ZeRO-3 keeps gathered at once (stage3_max_live_parameters)."""
REDUCE_BUCKET = 500_000_000
"""Most elements of the buffer in which DeepSpeed reduces gradients (reduce_bucket_size)."""


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of a model, in elements; tied weights are counted once."""

    parameters: int
    """Of the base model, without adapters."""
    adapters: int
    """Of the adapters; 0 if all weights are trained."""
    adapted: int
    """Of the weights that have adapters on them."""
    grouped: int
    """Of those that are large enough for their order to count, merged in float32."""
    joined: int
    """Of the projections to queries, keys and values."""
    persistent: int
    """Of the base parameters below PERSISTENCE_THRESHOLD, which ZeRO-3 does not shard."""
    num_layers: int
    layer: int
    """Of the largest layer, with its adapters."""
    cache_width: int
    """Of the keys and values of one token in one layer."""
    query_heads: int
    vocabulary: int
    quantized: int = 0
    """Of the base parameters that are stored in 4 or 8 bits."""
    quantized_bytes: int = 0
    """Bytes of these, with their scales."""
    scale_bytes: int = 0
    """Bytes of their scales without double quantisation."""


@dataclass(frozen=True)
class Passes:
    """Peak bytes of the passes, without the weights."""

    update: int
    """In the forward and backward pass of one pack."""
    reference: int
    """In the reference's forward pass of one pack; 0 without a reference."""
    prefill_per_token: int
    """In a forward pass without gradients, for each token, without the logits."""
    sampling_per_logit: float
    """In sampling a token, for each logit, without the logits themselves."""


@dataclass(frozen=True)
class Flight:
    """The sequences that a rank decodes at once, at the peak."""

    prompts: int
    rows: int
    """Sequences."""
    prompt_length: int
    slots: int
    """Tokens for which the cache of a sequence has space when the sequence is longest."""
    shares: bool
    """The cache holds a prompt once for all its sequences; else once for each sequence."""
    scored: int
    """Most attention scores that a query keeps at once; 0 if the kernel keeps none."""
    is_captured: bool = False
    """Keys and values are a pool of pages, and steps are graphs, which keep the memory of a step to the end."""
    prefilled: int = 0
    """Where steps are graphs: the most prompt tokens that are computed in one row."""


@dataclass(frozen=True)
class MemoryInputs:
    """Everything that determines the memory of a rank."""

    counts: ModelCounts
    passes: Passes
    flight: Flight
    num_ranks: int
    strategy: Strategy
    policy_bytes: int
    """Bytes of one weight of the policy."""
    trained_bytes: int
    """Bytes of one trained weight, in the dtype of the policy's computation."""
    copy_bytes: int
    """Bytes of one weight of the frozen copy; 0 without a copy."""
    copy_decodes: bool
    """Rollouts use the copy if the policy is sharded: both have the same dtype."""
    moment_bytes: int = 2 * FLOAT32
    """Bytes that the optimizer keeps of one trained weight."""
    step_bytes: int = 0
    """Of weights that decoding stores a second time, in another form."""
    step_kept: int = 0
    """Most of these bytes that are kept from one rollout to the next."""
    reward_models: int = 0
    """Bytes of reward models on the rank's GPU."""
    decodes: bool = True
    """Whether the rank draws completions; False where servers do."""
    dequantizes: bool = True
    """Whether rollouts have a dense copy of a quantised base."""

    @property
    def shards_weights(self) -> bool:
        """Whether ranks have parts of the weights, which are gathered for each computation."""
        return self.strategy in SHARDS_WEIGHTS

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the strategy is DeepSpeed's."""
        return self.strategy.startswith("ZeRO")


@dataclass(frozen=True)
class Part:
    """One use of memory."""

    name: str
    num_bytes: int
    phase: Phase
    """The phase in which it exists."""


def slots_held(copied: int, max_new_tokens: int, chunk: int) -> int:
    """Slots in the cache of a sequence with `copied` prompt tokens and `max_new_tokens` new ones (see
    rollout/native/cache.py)."""
    slots, most = copied, copied + max_new_tokens
    while slots < most:
        slots = min(max(slots + chunk, slots * 3 // 2), most + 1)
    return slots


def memory_per_rank(inputs: MemoryInputs) -> list[Part]:
    """All parts of a rank's memory. The peak of a phase is the sum of its parts and of those that exist always."""
    return [*_weights(inputs), *(_rollout(inputs) if inputs.decodes else []), *_update(inputs)]


def peaks(parts: list[Part]) -> dict[Phase, int]:
    """Peak bytes of each phase."""
    always = sum(part.num_bytes for part in parts if part.phase == "always")
    return {phase: always + sum(part.num_bytes for part in parts if part.phase == phase) for phase in PHASES}


def shard(elements: int, num_ranks: int, sharded: bool) -> int:
    """Elements of `elements` on one rank."""
    return math.ceil(elements / num_ranks) if sharded else elements


def _trained(inputs: MemoryInputs) -> int:
    return inputs.counts.adapters or inputs.counts.parameters


def _weights(inputs: MemoryInputs) -> list[Part]:
    counts, ranks, strategy = inputs.counts, inputs.num_ranks, inputs.strategy
    frozen = counts.parameters if counts.adapters else 0
    whole = counts.persistent if frozen and strategy == "ZeRO-3" else 0
    stored = shard(frozen - whole, ranks, inputs.shards_weights) + whole
    trained = _trained(inputs)
    dense = (stored - counts.quantized) * inputs.policy_bytes
    parts = [Part("frozen weights", dense + counts.quantized_bytes, "always")] if frozen else []
    name = "adapters" if frozen else "policy weights"
    # FSDP2 stores float32 and casts what it gathers
    width = FLOAT32 if strategy == "FSDP2" else inputs.trained_bytes
    parts.append(Part(name, shard(trained, ranks, inputs.shards_weights) * width, "always"))
    # DeepSpeed computes with one set of the trained weights and updates another set, in float32
    per_element = inputs.moment_bytes + (FLOAT32 if inputs.uses_deepspeed else 0)
    parts.append(Part("optimizer", shard(trained, ranks, strategy != "DDP") * per_element, "always"))
    if inputs.copy_bytes:
        parts.append(Part("frozen copy", counts.parameters * inputs.copy_bytes, "always"))
    if not frozen and (inputs.shards_weights or inputs.trained_bytes != inputs.policy_bytes):
        parts.append(Part("rollout weights", trained * inputs.policy_bytes, "always"))
    if inputs.reward_models:
        parts.append(Part("reward models", inputs.reward_models, "always"))
    if strategy == "DDP" and ranks > 1:
        parts.append(Part("DDP gradient buckets", trained * inputs.trained_bytes, "always"))
    if strategy == "ZeRO-3":
        bucket = min(REDUCE_BUCKET, trained)
        parts.append(Part("gradient bucket, shard", (bucket + math.ceil(trained / ranks)) * inputs.trained_bytes,
                          "always"))  # fmt: skip
    return parts


def _gathered(inputs: MemoryInputs) -> int:
    """Bytes of weights that are gathered for a forward pass, besides the rank's shard; of trained ones only by FSDP2,
    which gathers a layer before it has freed the one before."""
    counts = inputs.counts
    if inputs.strategy == "FSDP2":
        freed = max(counts.num_layers - 2, 0) * counts.layer
        return (counts.parameters + counts.adapters - freed) * inputs.policy_bytes
    weights = counts.parameters - counts.persistent if counts.adapters else 0
    return min(weights, MOST_GATHERED) * inputs.policy_bytes


def _rollout(inputs: MemoryInputs) -> list[Part]:
    counts, flight = inputs.counts, inputs.flight
    width = inputs.policy_bytes
    per_token = counts.num_layers * counts.cache_width * width
    prompt_tokens = flight.prompts * flight.prompt_length
    own = flight.rows * flight.slots * per_token
    drawing = int(flight.rows * counts.vocabulary * (width + inputs.passes.sampling_per_logit))
    of_a_step = max(drawing, flight.rows * counts.query_heads * flight.scored * 2 * (width + FLOAT32))
    prefill = prompt_tokens * inputs.passes.prefill_per_token - own  # during prefill the sequences have no cache yet
    parts = [Part("keys and values", flight.shares * prompt_tokens * per_token + own, "rollout")]
    if flight.is_captured:
        parts += [Part("captured steps", of_a_step, "rollout"),
                  Part("prefill", flight.prefilled * inputs.passes.prefill_per_token, "rollout")]  # fmt: skip
    else:
        parts.append(Part("decoding or prefill", max(of_a_step, prefill), "rollout"))
    if counts.quantized and inputs.dequantizes:
        parts.append(Part("dequantised base", counts.quantized * width, "rollout"))
    if inputs.step_bytes:
        kept = min(inputs.step_bytes, inputs.step_kept)
        parts += [Part("memory kept for the weights of the step", kept, "always")] if kept else []
        parts.append(Part("weights of the step", inputs.step_bytes - kept, "rollout"))
    if inputs.shards_weights and counts.adapters and not inputs.copy_decodes:
        whole = counts.persistent if inputs.strategy == "ZeRO-3" else 0
        parts.append(Part("gathered policy", (counts.parameters - whole) * inputs.policy_bytes, "rollout"))
    return parts


def _largest_unit(counts: ModelCounts) -> int:
    """Trained elements of the largest unit of FSDP2: a layer, or embeddings and head."""
    if counts.adapters:
        return math.ceil(counts.adapters / max(counts.num_layers, 1))
    return max(counts.layer, counts.parameters - counts.num_layers * counts.layer)


def _update(inputs: MemoryInputs) -> list[Part]:
    trained, ranks, strategy = _trained(inputs), inputs.num_ranks, inputs.strategy
    own = math.ceil(trained / ranks) if strategy != "DDP" else trained
    parts = [Part("activations of a pack", inputs.passes.update, "update"),
             Part("reference pass", inputs.passes.reference, "reference")]  # fmt: skip
    if strategy == "FSDP2":
        parts += [Part("gradients", own * FLOAT32, "update"),
                  Part("gradients of a unit", _largest_unit(inputs.counts) * (inputs.trained_bytes + FLOAT32),
                       "update")]  # fmt: skip
    elif strategy != "ZeRO-3":
        parts.append(Part("gradients", trained * inputs.trained_bytes, "update"))
    if strategy in ("ZeRO-1", "ZeRO-2"):
        parts.append(Part("gradient bucket", min(REDUCE_BUCKET, trained) * inputs.trained_bytes, "update"))
    # gradients of the optimizer step: DeepSpeed's shard and its float32 copy, FSDP2's shard, or all gradients
    width = {"DDP": inputs.trained_bytes, "FSDP2": FLOAT32}.get(strategy, inputs.trained_bytes + FLOAT32)
    parts.append(Part("stepped gradients", own * width, "optimizer"))
    if inputs.shards_weights:
        num_bytes = _gathered(inputs)
        parts.append(Part("gathered weights", num_bytes, "update"))
        if not inputs.copy_bytes and inputs.passes.reference:
            parts.append(Part("gathered weights", num_bytes, "reference"))
    return parts
