"""Predict the counts of a step and the memory of a rank from a config. Of a model, only its config is loaded."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..config.algorithm import reference_in_loss
from ..config.model import Dtype
from ..config.schema import Config
from ..distributed.device import DTYPES, computes_on_gpu, dtype_name, gpu_multiplies_bfloat16
from ..model.checks import bitsandbytes_config, stored_quantization
from ..model.files import kind_of, stored_kind
from ..model.load import attention_for, trainable
from ..model.packing import plan
from ..model.reference import REFERENCE_PACK, is_same_base, needs_copy
from ..model.routing import has_experts
from ..rollout.native.cache import SLOT_CHUNK
from ..rollout.native.engine import COPIED_PROMPT
from ..rollout.native.kernel import MERGED, has_few_sequences, most_compact_bytes
from ..rollout.native.relaid import MOST_SPARE_BYTES
from ..rollout.room import LOGIT_BYTES, ON_CPU, PAGE, PREFILL_TOKENS, fitting, pages_of
from ..rollout.vllm.base import DIRECTORY
from .memory import (
    FLOAT32,
    SHARDS_WEIGHTS,
    Flight,
    MemoryInputs,
    ModelCounts,
    Part,
    Passes,
    Strategy,
    memory_per_rank,
    slots_held,
)
from .tables import readable
from .tracing import Precision, Shape, build_policy, count, reward_model_bytes, trace_passes

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

Device = Literal["gpu", "cpu"]


MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "muon": 4}
"""Bytes that an optimizer keeps of one weight; with `muon`, of one in a matrix."""


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step on a number of ranks, if every prompt and completion has full length."""

    completions: int
    completions_per_rank: int
    """On the rank with the most."""
    packs_per_rank: int
    """For one pass over the batch; the same on every rank."""
    largest_pack_tokens: int
    optimizer_steps: int


def packs_of_ranks(
    config: Config, num_ranks: int, share_prompts: bool, larger: int = 1, minibatch: int = 0
) -> list[list[Shape]]:
    """Each rank's packs of a minibatch, of which the first is a largest one, of full-length sequences; `larger` times
    as large as those of the update."""
    prompt, completion = config.data.max_prompt_length, config.rollout.max_completion_length - 1  # see `packing`
    size, number = config.train.batch_size, config.train.num_minibatches
    num_prompts = sum(place * number // size == minibatch for place in range(size))  # as `minibatch_of` has them
    group = [n // config.rollout.group_size for n in range(num_prompts * config.rollout.group_size)]
    ranks = plan([prompt] * num_prompts, group, [completion] * len(group), [True] * len(group),
                 num_ranks=max(1, num_ranks // config.train.sequence_parallel_size), share_prompts=share_prompts,
                 max_tokens=larger * config.train.max_tokens_per_pack)  # fmt: skip
    return [[tuple((prompt, (completion,) * len(piece.completions)) for piece in pack) for pack in packs]
            for packs in ranks]  # fmt: skip


def batch_arithmetic(config: Config, num_ranks: int, share_prompts: bool) -> StepCounts:
    """The counts of a step on `num_ranks`."""
    minibatches = [packs_of_ranks(config, num_ranks, share_prompts, minibatch=m)
                   for m in range(config.train.num_minibatches)]  # fmt: skip
    total = config.train.batch_size * config.rollout.group_size
    return StepCounts(
        completions=total,
        completions_per_rank=math.ceil(total / num_ranks),
        packs_per_rank=sum(len(ranks[0]) for ranks in minibatches),
        largest_pack_tokens=max(_num_tokens(pack) for packs in minibatches[0] for pack in packs),
        optimizer_steps=config.train.updates_per_batch * config.train.num_minibatches,
    )


def _num_tokens(pack: Shape) -> int:
    return sum(prompt + sum(completions) for prompt, completions in pack)


def flight(
    config: Config, num_ranks: int, share_prompts: bool = True, device: Device = "cpu", most: int | None = None,
    pages: bool = False,
) -> Flight:  # fmt: skip
    """The sequences that a rank decodes at once (see rollout/): the groups that max_tokens_in_flight or `most` allows.

    Without shared prompts this is one group, and each of its sequences stores the prompt. With `pages`, as on a GPU,
    prompts and sequences have whole pages.
    """
    rollout, prompt = config.rollout, config.data.max_prompt_length
    share = math.ceil(config.train.batch_size * rollout.group_size / num_ranks)
    longest = rollout.max_completion_length
    if not share_prompts:
        rows = min(share, rollout.group_size)
        return Flight(rows, rows, prompt, prompt + longest, shares=False, scored=prompt + longest)
    if pages:
        prompt, longest = pages_of(prompt) * PAGE, pages_of(longest) * PAGE
    shares = pages or device == "cpu" or prompt > COPIED_PROMPT  # on a CPU as in compiled decoding
    once, each = (prompt, longest) if shares else (0, prompt + longest)
    most = tokens_in_flight(config, device) if most is None else most
    of_a_group = min(rollout.group_size, max(1, (most - once) // each))
    groups = max(1, most // (once + of_a_group * each))
    rows = min(share, groups * of_a_group)
    plays = config.environment is not None and config.environment.max_turns > 1
    again = prompt + PAGE if pages and plays else 0  # a row that is computed again shares its prompt with nobody
    slots = longest + again if pages else slots_held(0 if shares else prompt, longest, SLOT_CHUNK)
    scored = 0 if pages or device == "cpu" else max(once, slots)  # there attention is one kernel
    prompts = math.ceil(rows / of_a_group)
    prefilled = min(prompts * prompt, max(prompt, PREFILL_TOKENS)) if pages else 0
    return Flight(prompts, rows, prompt, slots, shares, scored, pages, prefilled)


def tokens_in_flight(config: Config, device: Device) -> int:
    """The option. `auto` is ON_CPU on a CPU, and unlimited on a GPU of unknown memory."""
    given = config.rollout.max_tokens_in_flight
    return given if given != "auto" else ON_CPU if device == "cpu" else sys.maxsize


def dtype_on(device: Device, name: Dtype) -> torch.dtype:
    """The torch dtype of an option on a device, which need not be the device of this machine."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def has_fast_bfloat16(device: Device) -> bool:
    """Whether a device has products of bfloat16 much faster than those of float32: a GPU, unless that of this machine
    is too old."""
    return device == "gpu" and (gpu_multiplies_bfloat16() or not computes_on_gpu())


class Predictor:
    """Predicts the memory of a config's ranks. It traces a model once for each shape of pack, which takes seconds."""

    def __init__(
        self, config: Config, model_config: PreTrainedConfig, device: Device, most_bytes: int | None = None
    ) -> None:
        """`most_bytes` is the memory of a rank for tensors, if known."""
        self.config, self.model_config, self.device, self.most_bytes = config, model_config, device, most_bytes
        self.implementation, obstacle = attention_for(config.model, model_config, config.max_sequence_length)
        self.share_prompts = obstacle is None
        self.pages = device == "gpu" and self.share_prompts
        self.policy_dtype = dtype_on(device, config.model.dtype)
        self.copy_dtype = dtype_on(device, config.reference.dtype)
        self.quantization = kind_of(config.model, bitsandbytes_config(model_config))
        self._in_bfloat16 = model_config.get_text_config().dtype == torch.bfloat16
        holds = self.policy_dtype == torch.bfloat16 or (self.policy_dtype in MERGED and self._in_bfloat16)
        self._is_compact = holds and has_few_sequences(config)
        self._reward_models = reward_model_bytes(config) if device == "gpu" else 0
        self._counts: dict[Precision, tuple[ModelCounts, int]] = {}
        self._passes: dict[tuple[Precision, Shape, Shape | None], Passes] = {}

    def parts(self, num_ranks: int, strategy: Strategy) -> list[Part]:
        """The parts of a rank's memory."""
        return memory_per_rank(self.inputs(num_ranks, strategy))

    def describe_servers(self) -> str | None:
        """What vLLM servers and ranks have of the base; None where no server draws."""
        if self.config.rollout.engine != "vllm":
            return None
        counts, _ = self._count(Precision(self.policy_dtype, self.policy_dtype, False))
        width = self.policy_dtype.itemsize
        stored = stored_kind(self.config.model, stored_quantization(self.model_config))
        origin = "" if stored is None else f" (dequantised from {stored})"
        line = (
            f"completions are drawn by vLLM servers: each holds the base, {readable(counts.parameters * width)} in "
            f"{dtype_name(self.policy_dtype)}{origin}, beside keys and values, which are not counted here"
        )
        if stored is None:
            return line
        held = readable((counts.parameters - counts.quantized) * width + counts.quantized_bytes)
        return (f"{line}. The run writes that base to {Path(self.config.train.output_dir) / DIRECTORY} once. A rank "
                f"holds its base {f'in {self.quantization}' if self.quantization else 'dequantised too'}, {held}, and "
                "no copy for rollouts")  # fmt: skip

    def inputs(self, num_ranks: int, strategy: Strategy) -> MemoryInputs:
        """Everything that determines the memory of a rank."""
        # adapters stay in float32 but for DeepSpeed, which like FSDP2 casts weights that are all trained
        stays = strategy == "DDP" or (strategy == "FSDP2" and self.config.lora is not None)
        casts = not stays and self.policy_dtype != torch.float32
        is_same = self.quantization is not None or is_same_base(
            self.policy_dtype, self.copy_dtype, fast_bfloat16=has_fast_bfloat16(self.device),
            in_bfloat16=lambda: self._in_bfloat16)  # fmt: skip
        has_copy = needs_copy(self.config, is_same and strategy not in SHARDS_WEIGHTS)
        precision = Precision(self.policy_dtype, self.copy_dtype if has_copy else self.policy_dtype, casts)
        counts, trained_bytes = self._count(precision)
        inputs = MemoryInputs(
            counts=counts, passes=self._trace(precision, num_ranks), num_ranks=num_ranks,
            flight=self._flight(num_ranks), strategy=strategy,
            policy_bytes=self.policy_dtype.itemsize, trained_bytes=trained_bytes,
            copy_bytes=self.copy_dtype.itemsize if has_copy else 0,
            copy_decodes=has_copy and self.copy_dtype == self.policy_dtype, step_bytes=self._step_bytes(counts),
            step_kept=self._step_kept(counts),
            moment_bytes=MOMENT_BYTES[self.config.optim.optimizer],
            reward_models=self._reward_models, decodes=self.config.rollout.engine != "vllm",
            dequantizes=self.config.rollout.dequantize and not self._decodes_codes(counts),
        )  # fmt: skip
        if self.most_bytes is None or tokens_in_flight(self.config, self.device) != sys.maxsize:
            return inputs
        return replace(inputs, flight=self._flight(num_ranks, self._fitting(inputs, self.most_bytes)))

    def _flight(self, num_ranks: int, most: int | None = None) -> Flight:
        return flight(self.config, num_ranks, self.share_prompts, self.device, most, self.pages)

    def _decodes_codes(self, counts: ModelCounts) -> bool:
        """Whether rollouts compute with the codes of a quantised base: in C++, which does not compute experts."""
        return (
            counts.quantized > 0 and self.device == "cpu" and self.share_prompts and not has_experts(self.model_config)
        )

    def _step_bytes(self, counts: ModelCounts) -> int:
        """Bytes of weights that decoding stores again: merged with adapters on a CPU or compact, or the scales of
        codes; on a GPU concatenated, and the adapters in the policy's dtype."""
        if self._decodes_codes(counts):
            return counts.scale_bytes
        if not self.share_prompts or (counts.quantized and not self.config.rollout.dequantize):
            return 0
        if self.device == "gpu":
            return (counts.joined + counts.adapters) * self.policy_dtype.itemsize
        if self._is_compact:
            return most_compact_bytes(counts.parameters, self.policy_dtype)
        return counts.adapted * self.policy_dtype.itemsize if self.policy_dtype in MERGED else 0

    def _step_kept(self, counts: ModelCounts) -> int:
        """Most of these bytes whose memory is kept from one rollout to the next."""
        if self.device == "gpu" or self._decodes_codes(counts):
            return 0
        if self._is_compact:  # weights that are not trained are kept as they are, and beside them memory for others
            return 2 * MOST_SPARE_BYTES
        return min(MOST_SPARE_BYTES, counts.grouped * FLOAT32)

    def _fitting(self, inputs: MemoryInputs, most_bytes: int) -> int:
        """Tokens in flight that `auto` fits beside the memory that is always used; at least those of one sequence."""
        counts, longest = inputs.counts, self.config.rollout.max_completion_length
        always = sum(part.num_bytes for part in memory_per_rank(inputs) if part.phase == "always")
        per_token = counts.num_layers * counts.cache_width * inputs.policy_bytes
        tokens = fitting(most_bytes - always, per_token, counts.vocabulary * LOGIT_BYTES, longest)
        return max(tokens, self.config.data.max_prompt_length + longest)

    def _count(self, precision: Precision) -> tuple[ModelCounts, int]:
        if precision not in self._counts:
            policy = build_policy(self.config, self.model_config, self.implementation, precision)
            trained = next(iter(trainable(policy).values()))
            self._counts[precision] = count(policy), trained.dtype.itemsize
        return self._counts[precision]

    def _trace(self, precision: Precision, num_ranks: int) -> Passes:
        shape = self._largest_pack(num_ranks, 1)
        of_reference = self._largest_pack(num_ranks, REFERENCE_PACK) if reference_in_loss(self.config) else None
        if (precision, shape, of_reference) not in self._passes:
            self._passes[precision, shape, of_reference] = trace_passes(
                self.config,
                self.model_config,
                self.implementation,
                precision,
                shape,
                of_reference,
                self.device == "cpu",
            )
        passes, size = self._passes[precision, shape, of_reference], self.config.train.sequence_parallel_size
        # each rank of a group has a share of the tokens, and of the heads in attention
        return replace(passes, update=passes.update // size, reference=passes.reference // size)

    def _largest_pack(self, num_ranks: int, larger: int) -> Shape:
        ranks = packs_of_ranks(self.config, num_ranks, self.share_prompts, larger)
        return max((pack for packs in ranks for pack in packs), key=_num_tokens)
