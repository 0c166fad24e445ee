"""Memory of one rank, by part and phase. Pure arithmetic without a model.

The parts follow trainer/: weights and optimizer exist always, the cache and the logits of decoding during the rollout,
the activations of one pack during the update. Bytes are those of tensors. A process needs more: the interpreter,
libraries, and on a GPU the CUDA context and the fragments of the allocator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ZeroStage = Literal[0, 1, 2, 3]
Phase = Literal["always", "rollout", "reference", "update", "optimizer"]
PHASES: tuple[Phase, ...] = ("rollout", "reference", "update", "optimizer")

FLOAT32 = 4

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
    joined: int
    """Of the projections to queries, keys and values."""
    persistent: int
    """Of the base parameters below PERSISTENCE_THRESHOLD, which ZeRO-3 does not shard."""
    num_layers: int
    cache_width: int
    """Of the keys and values of one token in one layer."""
    query_heads: int
    vocabulary: int
    quantized: int = 0
    """Of the base parameters that are stored in 4 or 8 bits."""
    quantized_bytes: int = 0
    """Bytes of these, with their scales."""


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


@dataclass(frozen=True)
class MemoryInputs:
    """Everything that determines the memory of a rank."""

    counts: ModelCounts
    passes: Passes
    flight: Flight
    num_ranks: int
    zero_stage: ZeroStage
    """0: DDP, or one process without DeepSpeed."""
    policy_bytes: int
    """Bytes of one weight of the policy."""
    trained_bytes: int
    """Bytes of one trained weight, in the dtype of the policy's computation."""
    copy_bytes: int
    """Bytes of one weight of the frozen copy; 0 without a copy."""
    copy_decodes: bool
    """Rollouts use the copy if ZeRO-3 has sharded the policy: both have the same dtype."""
    step_bytes: int = 0
    """Of weights that decoding stores a second time, in another form."""
    reward_models: int = 0
    """Bytes of reward models on the rank's GPU."""
    decodes: bool = True
    """Whether the rank draws completions; False where servers do."""


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
    counts, ranks, stage = inputs.counts, inputs.num_ranks, inputs.zero_stage
    frozen = counts.parameters if counts.adapters else 0
    stored = shard(frozen - counts.persistent, ranks, stage == 3) + counts.persistent if frozen else 0
    trained = _trained(inputs)
    dense = (stored - counts.quantized) * inputs.policy_bytes
    parts = [Part("frozen weights", dense + counts.quantized_bytes, "always")] if frozen else []
    name = "adapters" if frozen else "policy weights"
    parts.append(Part(name, shard(trained, ranks, stage == 3) * inputs.trained_bytes, "always"))
    # DeepSpeed computes with one set of the trained weights and updates another set, in float32
    per_element = 2 * FLOAT32 + (FLOAT32 if stage else 0)
    parts.append(Part("optimizer", shard(trained, ranks, stage > 0) * per_element, "always"))
    if inputs.copy_bytes:
        parts.append(Part("frozen copy", counts.parameters * inputs.copy_bytes, "always"))
    if not frozen and (stage == 3 or inputs.trained_bytes != inputs.policy_bytes):
        parts.append(Part("rollout weights", trained * inputs.policy_bytes, "always"))
    if inputs.reward_models:
        parts.append(Part("reward models", inputs.reward_models, "always"))
    if stage == 0 and ranks > 1:
        parts.append(Part("DDP gradient buckets", trained * inputs.trained_bytes, "always"))
    if stage == 3:
        bucket = min(REDUCE_BUCKET, trained)
        parts.append(Part("gradient bucket, shard", (bucket + math.ceil(trained / ranks)) * inputs.trained_bytes,
                          "always"))  # fmt: skip
    return parts


def _gathered(inputs: MemoryInputs, most: int) -> int:
    """Bytes of frozen weights that ZeRO-3 gathers for a forward pass, besides the rank's shard."""
    counts = inputs.counts
    if inputs.zero_stage != 3:
        return 0
    weights = counts.parameters if counts.adapters else 0
    return min(weights - counts.persistent, most) * inputs.policy_bytes


def _rollout(inputs: MemoryInputs) -> list[Part]:
    counts, flight = inputs.counts, inputs.flight
    width = inputs.policy_bytes
    per_token = counts.num_layers * counts.cache_width * width
    prompt_tokens = flight.prompts * flight.prompt_length
    own = flight.rows * flight.slots * per_token
    drawing = int(flight.rows * counts.vocabulary * (width + inputs.passes.sampling_per_logit))
    of_a_step = max(drawing, flight.rows * counts.query_heads * flight.scored * 2 * (width + FLOAT32))
    prefill = prompt_tokens * inputs.passes.prefill_per_token - own  # during prefill the sequences have no cache yet
    parts = [
        Part("keys and values", flight.shares * prompt_tokens * per_token + own, "rollout"),
        Part("decoding or prefill", max(of_a_step, prefill), "rollout"),
    ]
    if counts.quantized:
        parts.append(Part("dequantised base", counts.quantized * width, "rollout"))
    if inputs.step_bytes:
        parts.append(Part("weights of the step", inputs.step_bytes, "rollout"))
    if inputs.zero_stage == 3 and counts.adapters and not inputs.copy_decodes:
        parts.append(Part("gathered policy", _gathered(inputs, counts.parameters), "rollout"))
    return parts


def _update(inputs: MemoryInputs) -> list[Part]:
    trained, ranks, stage = _trained(inputs), inputs.num_ranks, inputs.zero_stage
    gathered = Part("gathered weights", _gathered(inputs, MOST_GATHERED), "update")
    parts = [Part("activations of a pack", inputs.passes.update, "update"),
             Part("reference pass", inputs.passes.reference, "reference")]  # fmt: skip
    if stage < 3:
        parts.append(Part("gradients", trained * inputs.trained_bytes, "update"))
    if stage in (1, 2):
        parts.append(Part("gradient bucket", min(REDUCE_BUCKET, trained) * inputs.trained_bytes, "update"))
    own = math.ceil(trained / ranks) if stage else trained
    # gradients of the optimizer step: DeepSpeed's shard and its float32 copy, or all gradients
    stored = own * (inputs.trained_bytes + FLOAT32) if stage else trained * inputs.trained_bytes
    parts.append(Part("stepped gradients", stored, "optimizer"))
    if stage == 3:
        parts.append(gathered)
        if not inputs.copy_bytes and inputs.passes.reference:
            parts.append(Part(gathered.name, gathered.num_bytes, "reference"))
    return parts
