"""What `plan` predicts: arithmetic against slow twins."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_model import COUNTS, INPUTS
from packed_models import write_mxfp4
from toy_config import config_of
from transformers import AutoModelForSequenceClassification, LlamaConfig, MistralConfig, Qwen2Config

from grpo_dist.config.algorithm import LossConfig
from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.rewards import RewardConfig
from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, ReferenceConfig, RolloutConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.distributed.device import DTYPES
from grpo_dist.model import attention
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.reference import doubt_of_copy, is_same_base, needs_copy
from grpo_dist.planning import tracing
from grpo_dist.planning.advice import largest_peak, make_fit
from grpo_dist.planning.memory import SHARDS_WEIGHTS, STRATEGIES, MemoryInputs, memory_per_rank, peaks, slots_held
from grpo_dist.planning.predict import Device, Predictor, batch_arithmetic, flight
from grpo_dist.planning.tracing import Precision, build_policy, count
from grpo_dist.rollout.native.cache import SLOT_CHUNK, DecodeState, PrefillLayout


def named(inputs: MemoryInputs) -> dict[str, int]:
    """Bytes by the parts' names."""
    return {part.name: part.num_bytes for part in memory_per_rank(inputs)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_of_all_ranks_add_up(strategy: Any) -> None:
    """Sharded parts add up over the ranks to all weights; every rank has the others."""
    parts = named(replace(INPUTS, strategy=strategy))
    total = COUNTS.parameters * 2
    rounding = 3 * 2
    if strategy in SHARDS_WEIGHTS:
        every_rank = COUNTS.persistent * 2 if strategy == "ZeRO-3" else 0
        assert abs(3 * (parts["frozen weights"] - every_rank) - (total - every_rank)) <= rounding
        # FSDP2 frees a layer of three before the last is there
        gathered = {"ZeRO-3": total - every_rank, "FSDP2": total + 2 * (COUNTS.adapters - COUNTS.layer)}
        assert parts["gathered weights"] == gathered[strategy]
    else:
        assert parts["frozen weights"] == total
    moments, master = 8, 4 if strategy.startswith("ZeRO") else 0
    states = parts["optimizer"] * (1 if strategy == "DDP" else 3)
    assert 0 <= states - COUNTS.adapters * (moments + master) <= 3 * 12
    if strategy == "FSDP2":
        assert 0 <= 3 * parts["adapters"] - 4 * COUNTS.adapters <= 3 * 4 and parts["gradients"] == parts["adapters"]
    assert parts["frozen copy"] == total and not {"rollout weights", "gathered policy"} & set(parts)


def test_peaks_are_sums_of_parts() -> None:
    parts = memory_per_rank(INPUTS)
    always = 0
    for part in parts:
        always += part.num_bytes if part.phase == "always" else 0
    for phase, peak in peaks(parts).items():
        mine = [part.num_bytes for part in parts if part.phase == phase]
        assert mine and peak == always + sum(mine)


def test_what_servers_hold_of_the_base_is_said(tmp_path: Path) -> None:
    servers = RolloutConfig(engine="vllm", vllm=VllmConfig(urls=["http://localhost:8000"]))

    def said(config: Config) -> str | None:
        return Predictor(config, load_model_config(config.model), "cpu").describe_servers()

    assert said(config_of()) is None
    of_plain = said(config_of(rollout=servers))
    assert of_plain is not None and "each holds the base, 1.9 MiB in float32, beside keys and values" in of_plain
    write_mxfp4(tmp_path)
    lora = LoraConfig(target_modules=["q_proj"])
    of_mxfp4 = said(config_of(rollout=servers, model=ModelConfig(name=str(tmp_path)), lora=lora))
    assert of_mxfp4 is not None and "(dequantised from mxfp4)" in of_mxfp4 and "its base dequantised too" in of_mxfp4
    pytest.importorskip("bitsandbytes")
    of_nf4 = said(config_of(rollout=servers, model=ModelConfig(quantization="nf4")))
    assert of_nf4 is not None and "1.9 MiB in float32 (dequantised from nf4)" in of_nf4
    assert "to checkpoints/served_base once. A rank holds its base in nf4, 0.4 MiB, and no copy" in of_nf4


def test_where_servers_draw_a_rank_has_no_cache() -> None:
    served = config_of(rollout=RolloutConfig(engine="vllm", vllm=VllmConfig(urls=["http://localhost:8000"])))
    own, others = (Predictor(config, load_model_config(config.model), "cpu").parts(1, "DDP")
                   for config in (config_of(), served))  # fmt: skip
    assert [part for part in own if part.phase == "rollout"]
    assert [part.name for part in others] == [part.name for part in own if part.phase != "rollout"]


def test_only_memory_of_large_merged_weights_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {part.name: part for part in memory_per_rank(replace(INPUTS, step_bytes=1_000, step_kept=600))}
    kept, rest = parts["memory kept for the weights of the step"], parts["weights of the step"]
    assert (kept.num_bytes, kept.phase, rest.num_bytes, rest.phase) == (600, "always", 400, "rollout")
    config = config_of()
    for smallest, has_any in ((tracing.SMALLEST_GROUPED, False), (1, True)):
        monkeypatch.setattr(tracing, "SMALLEST_GROUPED", smallest)
        own = {part.name: part.num_bytes for part in
               Predictor(config, load_model_config(config.model), "cpu").parts(1, "DDP")}  # fmt: skip
        assert ("memory kept for the weights of the step" in own) == has_any
        assert (own["weights of the step"] == 0) == has_any


def test_a_shared_reference_has_no_copy() -> None:
    for strategy, whole in (("ZeRO-3", COUNTS.persistent), ("FSDP2", 0)):
        parts = named(replace(INPUTS, copy_bytes=0, copy_decodes=False, strategy=strategy))
        assert not {"frozen copy", "rollout weights"} & set(parts)
        assert parts["gathered policy"] == (COUNTS.parameters - whole) * 2


@pytest.mark.parametrize(
    ("strategy", "trained_bytes", "expected"),
    [("DDP", 2, 0), ("ZeRO-2", 2, 0), ("DDP", 4, 2), ("ZeRO-2", 4, 2), ("ZeRO-3", 2, 2), ("FSDP2", 2, 2)],
)
def test_weights_that_are_all_trained_decode_where_they_can(strategy: Any, trained_bytes: int, expected: int) -> None:
    full = replace(COUNTS, adapters=0, adapted=0)
    parts = named(replace(INPUTS, counts=full, strategy=strategy, trained_bytes=trained_bytes))
    assert parts.get("rollout weights", 0) == expected * COUNTS.parameters and "gathered policy" not in parts


@pytest.mark.parametrize(
    ("lora", "options", "copies"),
    [(LoraConfig(), {}, (False, True)), (LoraConfig(), {"dtype": "float16"}, (True, True)),
     (LoraConfig(), {"placement": "shared"}, (False, False)), (None, {}, (True, True))],
    ids=["same", "other-dtype", "shared", "full"],
)  # fmt: skip
def test_a_copy_is_counted_where_a_run_has_one(
    lora: LoraConfig | None, options: dict[str, Any], copies: tuple[bool, ...]
) -> None:
    """Policy and copy in bfloat16 as on a GPU, whole and sharded; never where nothing needs a reference."""
    config = config_of(lora=lora, reference=ReferenceConfig(**options), loss=LossConfig(kl_coeff=0.04))
    is_same = is_same_base(torch.bfloat16, DTYPES[config.reference.dtype], fast_bfloat16=True, in_bfloat16=lambda: True)
    assert tuple(needs_copy(config, is_same and not shards) for shards in (False, True)) == copies
    assert not needs_copy(replace(config, loss=LossConfig(kl_coeff=0.0)), False)


@pytest.mark.parametrize(
    ("fast_bfloat16", "in_bfloat16", "copy_dtype", "expected"),
    [(False, True, torch.bfloat16, True), (False, False, torch.bfloat16, False), (True, True, torch.bfloat16, False),
     (False, True, torch.float16, False), (False, False, torch.float32, True)],
)  # fmt: skip
def test_a_float32_base_is_that_of_a_reference_which_holds_it_exactly(
    fast_bfloat16: bool, in_bfloat16: bool, copy_dtype: torch.dtype, expected: bool
) -> None:
    assert (
        is_same_base(torch.float32, copy_dtype, fast_bfloat16=fast_bfloat16, in_bfloat16=lambda: in_bfloat16)
        == expected
    )


def test_a_copy_of_fewer_bits_than_the_policy_is_doubted() -> None:
    said = doubt_of_copy(torch.float32, torch.bfloat16)
    assert said is not None and said.startswith("reference.dtype: bfloat16") and "reference.dtype float32" in said
    assert doubt_of_copy(torch.float32, torch.float32) is doubt_of_copy(torch.bfloat16, torch.bfloat16) is None


@pytest.mark.parametrize("published", ["bfloat16", "float32"])
def test_the_prediction_counts_no_copy_of_a_base_that_was_published_in_its_dtype(published: str) -> None:
    config = config_of(loss=LossConfig(kl_coeff=0.04))
    model_config = copy.deepcopy(load_model_config(config.model))
    model_config.dtype = getattr(torch, published)
    names = {part.name for part in Predictor(config, model_config, "cpu").parts(1, "DDP")}
    assert ("frozen copy" in names) == (published == "float32")


@pytest.mark.parametrize(("batch", "dtype"), [(4, "bfloat16"), (4, "float32"), (5, "bfloat16"), (5, "float32")])
def test_few_sequences_read_a_base_that_bfloat16_holds_from_it(batch: int, dtype: str) -> None:
    config = config_of(train=TrainConfig(batch_size=batch), rollout=RolloutConfig(group_size=4))
    model_config = copy.deepcopy(load_model_config(config.model))
    model_config.dtype = getattr(torch, dtype)
    few = (batch, dtype) == (4, "bfloat16")
    expected = 2 * COUNTS.parameters if few else 4 * COUNTS.adapted
    assert Predictor(config, model_config, "cpu")._step_bytes(COUNTS) == expected


def test_seven_billion_weights_lie_on_a_gpu_once() -> None:
    """LoRA in bfloat16 without a copy: 14.2 GiB of frozen weights; a copy and rollout weights made 40.5 of it."""
    model_config = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                               num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
    precision = Precision(torch.bfloat16, torch.bfloat16, False)
    counts = count(build_policy(config_of(lora=LoraConfig()), model_config, attention.NAME, precision))
    for strategy in ("DDP", "ZeRO-1", "ZeRO-2"):
        parts = memory_per_rank(replace(INPUTS, counts=counts, strategy=strategy, copy_bytes=0, copy_decodes=False))
        always = {part.name: part.num_bytes / 2**30 for part in parts if part.phase == "always"}
        assert always["frozen weights"] == pytest.approx(14.2, abs=0.05) and sum(always.values()) < 15.5


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("prompt", [1, 50])
@pytest.mark.parametrize("shares", [True, False])
def test_slots_grow_as_the_engine_lets_them(longest: int, prompt: int, shares: bool) -> None:
    device = torch.device("cpu")
    row, state = PrefillLayout([prompt], device), DecodeState(device, longest, shares=shares, whole_chunks=False)
    row.keys = row.values = {0: torch.zeros(1, prompt, 2)}
    state.admit(row, [3])
    for _ in range(longest):
        state.make_room()
        state.count_step()
    assert slots_held(0 if shares else prompt, longest, SLOT_CHUNK) == state.own_keys[0].shape[2]


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_the_arithmetic_of_a_step(num_ranks: int) -> None:
    config = config_of(train=TrainConfig(batch_size=6, max_tokens_per_pack=400, num_minibatches=2, updates_per_batch=3))
    counts = batch_arithmetic(config, num_ranks, share_prompts=True)
    assert counts.completions == 24 and counts.completions_per_rank == math.ceil(24 / num_ranks)
    assert counts.optimizer_steps == 6
    assert counts.largest_pack_tokens <= 400
    tokens = 3 * (40 + 4 * 23)  # without the last one of a completion
    assert counts.packs_per_rank * num_ranks * 400 >= 2 * tokens


def test_minibatches_of_different_sizes_are_counted_each() -> None:
    """Of five prompts three are in the first and two in the second; a pack has one prompt, or one sequence."""
    config = config_of(train=TrainConfig(batch_size=5, max_tokens_per_pack=40 + 4 * 23, num_minibatches=2))
    packs = [batch_arithmetic(config, num_ranks, share_prompts=True).packs_per_rank for num_ranks in (1, 2)]
    assert packs == [3 + 2, 2 + 1]
    assert batch_arithmetic(config, 1, share_prompts=False).packs_per_rank == 20


@pytest.mark.parametrize(
    ("device", "prompt", "in_flight", "rows", "prompts"),
    [("gpu", 40, 10**6, 24, 6), ("gpu", 40, 256, 4, 1), ("gpu", 40, 600, 8, 2), ("gpu", 40, 100, 1, 1),
     ("gpu", 100, 10**6, 24, 6), ("gpu", 100, 196, 4, 1), ("gpu", 100, 400, 8, 2), ("gpu", 100, 150, 2, 1),
     ("cpu", 40, 10**6, 24, 6), ("cpu", 40, 256, 4, 1), ("cpu", 40, 600, 16, 4), ("cpu", 40, 100, 2, 1),
     ("cpu", 100, 196, 4, 1)],
)  # fmt: skip
def test_what_is_decoded_at_once(device: Device, prompt: int, in_flight: int, rows: int, prompts: int) -> None:
    """A group of 4 takes 4 × (40 + 24) = 256 tokens with a copied prompt, and 40 + 4 × 24 = 136 or 100 + 4 × 24 = 196
    with a shared one; where that is too much, as many of it as have room."""
    config = config_of(rollout=RolloutConfig(group_size=4, max_completion_length=24, max_tokens_in_flight=in_flight))
    config = replace(config, data=replace(config.data, max_prompt_length=prompt))
    decoded = flight(config, 1, device=device)
    assert (decoded.rows, decoded.prompts, decoded.shares) == (rows, prompts, device == "cpu" or prompt == 100)
    assert decoded.scored == 0 if device == "cpu" else decoded.scored >= 24
    alone = flight(config, 1, share_prompts=False)
    assert (alone.rows, alone.prompts) == (4, 4)


def test_a_gpu_holds_pages_and_its_captured_steps() -> None:
    """Prompts of 40 tokens and completions of 24 have a page of 64 each; a graph's memory stays beside a prefill's."""
    decoded = flight(config_of(), 1, device="gpu", pages=True)
    assert (decoded.rows, decoded.prompts, decoded.prompt_length, decoded.slots) == (24, 6, 64, 64)
    assert decoded.shares and decoded.scored == 0 and decoded.is_captured
    several_turns = config_of(environment=EnvironmentConfig(tools=["own:tool"]))
    assert flight(several_turns, 1, device="gpu", pages=True).slots == 64 + 64 + 64, "a prompt of its own, and rounding"
    parts = named(replace(INPUTS, flight=decoded))
    assert parts["keys and values"] == (6 + 24) * 64 * COUNTS.num_layers * COUNTS.cache_width * 2
    assert parts["captured steps"] == 24 * COUNTS.vocabulary * (2 + 8) and parts["prefill"] == 6 * 64 * 1_000
    model_config = load_model_config(config_of().model)
    windows = MistralConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    for each in (model_config, windows):
        assert Predictor(config_of(), each, "gpu").pages and not Predictor(config_of(), each, "cpu").pages


def test_auto_takes_what_a_gpu_has_left() -> None:
    """All at once where memory is not known or large enough; else what fits, and at least one sequence."""
    config = config_of(rollout=RolloutConfig(group_size=4, max_completion_length=24))
    model_config = load_model_config(config.model)
    everything = Predictor(config, model_config, "gpu").inputs(1, "DDP")
    assert everything.flight.rows == 4 * config.train.batch_size
    always = sum(part.num_bytes for part in memory_per_rank(everything) if part.phase == "always")
    rows = {most: Predictor(config, model_config, "gpu", always + most).inputs(1, "DDP").flight.rows
            for most in (1 << 40, 1 << 20, 0)}  # fmt: skip
    assert rows[1 << 40] == everything.flight.rows > rows[1 << 20] > rows[0] == 1
    assert Predictor(config, model_config, "cpu", always).inputs(1, "DDP").flight.rows == everything.flight.rows


def test_a_reward_model_lies_on_the_gpu_too(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_labels=1).save_pretrained(tmp_path)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(LlamaConfig.from_pretrained(tmp_path))
    size = sum(parameter.numel() for parameter in model.parameters())
    for dtype, itemsize in ({}, 4), ({"dtype": "bfloat16"}, 2):
        config = config_of(rewards=[RewardConfig(name="reward_model", args={"model": str(tmp_path)} | dtype)])
        model_config = load_model_config(config.model)
        parts = named(Predictor(config, model_config, "gpu").inputs(1, "DDP"))
        assert parts["reward models"] == size * itemsize
    assert "reward models" not in named(Predictor(config, model_config, "cpu").inputs(1, "DDP"))


def test_advice_makes_it_fit_or_says_that_nothing_does() -> None:
    model_config = load_model_config(ModelConfig())
    config = config_of(train=TrainConfig(batch_size=12, max_tokens_per_pack=1000))
    _, needed = largest_peak(Predictor(config, model_config, "cpu"), 2, "ZeRO-2")
    changes, left = make_fit(Predictor(config, model_config, "cpu", needed // 2), 2, "ZeRO-2")
    assert left <= needed // 2 and changes == ["--train.max_tokens_per_pack 250"]
    least = config_of(train=TrainConfig(batch_size=2, max_tokens_per_pack=64))
    changes, left = make_fit(Predictor(least, model_config, "cpu", 1000), 2, "ZeRO-2")
    assert left > 1000 and "--model.gradient_checkpointing true" in changes
    assert len({change.split()[0] for change in changes}) == len(changes)
