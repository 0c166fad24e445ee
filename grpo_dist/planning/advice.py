"""Options to change if a run does not fit into memory. Each change is checked by a new prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..config.schema import Config
from .memory import SHARDS_WEIGHTS, Phase, Strategy, peaks
from .predict import Predictor, tokens_in_flight

Change = tuple[str, Config, Strategy]


def largest_peak(predictor: Predictor, num_ranks: int, strategy: Strategy) -> tuple[Phase, int]:
    """The phase with the largest peak, and its bytes."""
    by_phase = peaks(predictor.parts(num_ranks, strategy))
    phase = max(by_phase, key=by_phase.__getitem__)
    return phase, by_phase[phase]


def make_fit(predictor: Predictor, num_ranks: int, strategy: Strategy) -> tuple[list[str], int]:
    """The changes that bring a rank's memory below the predictor's `most_bytes`, and the bytes that it then needs.

    Changes that cost least time come first. A change that does not lower the largest peak is left out. If all changes
    are not enough, the returned bytes are above the limit.
    """
    most_bytes = predictor.most_bytes
    assert most_bytes is not None, "asked only where a limit is exceeded"
    phase, needed = largest_peak(predictor, num_ranks, strategy)
    changes: list[str] = []
    for _ in range(16):
        if needed <= most_bytes:
            break
        for change, config, changed_strategy in _candidates(predictor, phase, strategy, num_ranks):
            changed = Predictor(config, predictor.model_config, predictor.device, most_bytes)
            new_phase, new = largest_peak(changed, num_ranks, changed_strategy)
            if new < needed:
                changes = [each for each in changes if each.split()[0] != change.split()[0]] + [change]
                predictor, strategy, phase, needed = changed, changed_strategy, new_phase, new
                break
        else:
            break
    return changes, needed


def _candidates(predictor: Predictor, phase: Phase, strategy: Strategy, num_ranks: int) -> Iterator[Change]:
    """Changes that could lower the peak of a phase, the cheapest first."""
    config, is_quantized = predictor.config, predictor.quantization is not None
    longest = config.max_sequence_length
    rollout, train, reference = config.rollout, config.train, config.reference
    in_flight = tokens_in_flight(config, predictor.device)
    if phase == "rollout" and in_flight > longest:
        share = train.batch_size * (config.data.max_prompt_length + rollout.group_size * rollout.max_completion_length)
        tokens = max(longest, min(in_flight, share // num_ranks) // 2)
        changed = replace(config, rollout=replace(rollout, max_tokens_in_flight=tokens))
        yield f"--rollout.max_tokens_in_flight {tokens}", changed, strategy
    if phase == "rollout" and is_quantized and rollout.dequantize:
        yield "--rollout.dequantize false", replace(config, rollout=replace(rollout, dequantize=False)), strategy
    if phase in ("update", "reference") and train.max_tokens_per_pack > longest:
        tokens = max(longest, train.max_tokens_per_pack // 2)
        changed = replace(config, train=replace(train, max_tokens_per_pack=tokens))
        yield f"--train.max_tokens_per_pack {tokens}", changed, strategy
    if strategy in ("DDP", "ZeRO-1") and num_ranks > 1:
        yield "--config_file accelerate_configs/zero2.yaml", config, "ZeRO-2"
    if reference.dtype not in ("bfloat16", "float16"):
        yield "--reference.dtype bfloat16", replace(config, reference=replace(reference, dtype="bfloat16")), strategy
    if phase == "update" and not config.model.gradient_checkpointing:
        changed = replace(config, model=replace(config.model, gradient_checkpointing=True))
        yield "--model.gradient_checkpointing true", changed, strategy
    if strategy not in SHARDS_WEIGHTS and num_ranks > 1 and not is_quantized:
        yield "--config_file accelerate_configs/zero3.yaml", config, "ZeRO-3"
    if reference.placement == "copy" and config.lora is not None:
        yield (
            "--reference.placement shared",
            replace(config, reference=replace(reference, placement="shared")),
            strategy,
        )
