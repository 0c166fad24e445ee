"""Which options are tried where a run does not fit, in which order, and when no more are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from toy_config import config_of

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, ReferenceConfig, RolloutConfig, TrainConfig
from grpo_dist.planning import advice
from grpo_dist.planning.advice import make_fit
from grpo_dist.planning.memory import Part

# a sequence has 64 tokens; a group of 4 has 40 + 4 × 24 = 136, six of them 816
REFERENCE = ["--reference.dtype bfloat16"]
CHECKPOINTING = ["--model.gradient_checkpointing true"]
ZERO2, ZERO3 = (["--config_file accelerate_configs/zero2.yaml"], ["--config_file accelerate_configs/zero3.yaml"])
SHARED = ["--reference.placement shared"]


def candidates(
    config: Config, phase: Any, strategy: Any = "DDP", num_ranks: int = 1, quantization: str | None = None
) -> list[str]:
    """The changes that are tried; each changes its option and nothing else."""
    predictor: Any = SimpleNamespace(config=config, quantization=quantization, device="cpu")
    changes = []
    for change, changed, changed_strategy in advice._candidates(predictor, phase, strategy, num_ranks):
        name, value = change.removeprefix("--").split()
        if name == "config_file":
            assert changed is config and changed_strategy == {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}[value[-10:-5]]
        else:
            group, option = name.split(".")
            given = getattr(getattr(changed, group), option)
            assert str(given).lower() == value and changed_strategy == strategy
            assert changed == replace(config, **{group: replace(getattr(config, group), **{option: given})}) != config
        changes.append(change)
    return changes


def test_what_lowers_each_phase() -> None:
    config = config_of(reference=ReferenceConfig(dtype="float32"))
    smaller_packs = ["--train.max_tokens_per_pack 200"]
    assert candidates(config, "rollout") == ["--rollout.max_tokens_in_flight 408", *REFERENCE, *SHARED]
    assert candidates(config, "reference") == [*smaller_packs, *REFERENCE, *SHARED]
    assert candidates(config, "update") == [*smaller_packs, *REFERENCE, *CHECKPOINTING, *SHARED]
    assert candidates(config, "optimizer") == [*REFERENCE, *SHARED]
    assert candidates(config, "update", num_ranks=2) == [
        *smaller_packs, *ZERO2, *REFERENCE, *CHECKPOINTING, *ZERO3, *SHARED]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "quantization", "expected"),
    [
        ("DDP", 1, None, []), ("DDP", 2, None, [*ZERO2, *ZERO3]), ("ZeRO-1", 2, None, [*ZERO2, *ZERO3]),
        ("ZeRO-1", 1, None, []), ("ZeRO-2", 2, None, ZERO3), ("ZeRO-2", 1, None, []), ("ZeRO-3", 2, None, []),
        ("FSDP2", 2, None, []), ("DDP", 2, "nf4", ZERO2), ("ZeRO-2", 2, "nf4", []),
    ],
)  # fmt: skip
def test_strategies_that_divide_more(
    strategy: str, num_ranks: int, quantization: str | None, expected: list[str]
) -> None:
    config = config_of(reference=ReferenceConfig(dtype="float16", placement="shared"))
    assert candidates(config, "optimizer", strategy, num_ranks, quantization) == expected


def test_what_is_as_small_as_it_can_be_is_not_tried() -> None:
    few = config_of(rollout=RolloutConfig(group_size=4, max_completion_length=24, max_tokens_in_flight=64),
                    train=TrainConfig(batch_size=6, max_tokens_per_pack=64),
                    model=ModelConfig(gradient_checkpointing=True), lora=None,
                    reference=ReferenceConfig(dtype="float32"))  # fmt: skip
    assert candidates(few, "rollout") == candidates(few, "update") == REFERENCE
    assert candidates(replace(few, reference=ReferenceConfig(dtype="bfloat16")), "reference") == []
    a_little_more = replace(few, rollout=replace(few.rollout, max_tokens_in_flight=65),
                            train=replace(few.train, max_tokens_per_pack=65))  # fmt: skip
    assert candidates(a_little_more, "rollout") == ["--rollout.max_tokens_in_flight 64", *REFERENCE]
    assert candidates(a_little_more, "update") == ["--train.max_tokens_per_pack 64", *REFERENCE]


def test_half_of_what_is_decoded_at_once() -> None:
    """Of a rank's share of all sequences, or of the option, which may be less."""
    config = config_of(reference=ReferenceConfig(dtype="bfloat16"), lora=None)
    assert candidates(config, "rollout", "ZeRO-3", num_ranks=3) == ["--rollout.max_tokens_in_flight 136"]
    given = replace(config, rollout=replace(config.rollout, max_tokens_in_flight=300))
    assert candidates(given, "rollout") == ["--rollout.max_tokens_in_flight 150"]


@pytest.mark.parametrize(("dequantize", "quantization"), [(True, "nf4"), (True, None), (False, "nf4")])
def test_a_quantised_base_can_stay_so(dequantize: bool, quantization: str | None) -> None:
    config = config_of(rollout=RolloutConfig(group_size=4, max_completion_length=24, max_tokens_in_flight=64,
                                             dequantize=dequantize), reference=ReferenceConfig(dtype="bfloat16"),
                       lora=LoraConfig())  # fmt: skip
    stays = ["--rollout.dequantize false"] if dequantize and quantization else []
    assert candidates(config, "rollout", quantization=quantization) == [*stays, *SHARED]
    assert candidates(config, "reference", quantization=quantization)[1:] == SHARED


class Fake:
    """Predicts 10 bytes for each token of a pack and 2,000 for what is always there, of which a rank has a share."""

    def __init__(self, config: Config, model_config: Any, device: str, most_bytes: int) -> None:
        self.config, self.model_config, self.device, self.most_bytes = config, model_config, device, most_bytes
        self.quantization = None

    def parts(self, num_ranks: int, strategy: str) -> list[Part]:
        always = 2_000 // (num_ranks if strategy == "ZeRO-3" else 1)
        return [Part("weights", always, "always"), Part("pack", 10 * self.config.train.max_tokens_per_pack, "update")]


@pytest.mark.parametrize(
    ("most_bytes", "num_ranks", "expected", "needed"),
    [
        (6_000, 2, [], 6_000),  # it fits
        (5_999, 2, ["--train.max_tokens_per_pack 200"], 4_000),
        (3_000, 2, ["--train.max_tokens_per_pack 100"], 3_000),  # of two changes of one option the last is named
        (2_000, 2, ["--train.max_tokens_per_pack 64", *ZERO3], 1_640),
        (1_000, 1, ["--train.max_tokens_per_pack 64"], 2_640),  # nothing makes it fit
    ],
)
def test_changes_are_made_until_it_fits(
    most_bytes: int, num_ranks: int, expected: list[str], needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that lowers nothing is not named."""
    monkeypatch.setattr(advice, "Predictor", Fake)
    start: Any = Fake(config_of(), None, "cpu", most_bytes)
    assert make_fit(start, num_ranks, "ZeRO-2" if num_ranks > 1 else "DDP") == (expected, needed)
