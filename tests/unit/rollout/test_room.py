"""How much is decoded at once: what fits, half of it where that was too much, and the same draws in any case."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, Qwen3Config

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.model import attention
from grpo_dist.rollout import NativeDecoder, Request, Sampling, decode_all, room
from grpo_dist.rollout.native import engine as native
from grpo_dist.rollout.native.steps import prefill
from grpo_dist.rollout.room import ON_CPU, PAGE, RESERVE, WithinMemory, bytes_of, cache_width, fitting, pages_of
from grpo_dist.types import Trajectory

NEW_TOKENS, GIB = 8, 2**30
TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
REQUESTS = [Request(group, sample, [4 + group, 9, 11], stream_key(3, "train/0", group, sample))
            for group in range(4) for sample in range(3)]  # fmt: skip
NEEDED = 4 * 3 + 12 * NEW_TOKENS
"""Tokens of all requests at full length."""


def test_tokens_have_whole_pages() -> None:
    assert [pages_of(tokens) for tokens in (0, 1, PAGE, PAGE + 1, 3 * PAGE)] == [0, 1, 1, 2, 3]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation=attention.NAME).eval()


def assert_equal(got: list[Trajectory], expected: list[Trajectory]) -> None:
    """The same draws, and log-probabilities that differ by rounding alone: other rows are computed beside them."""
    assert [(c.group, c.sample, c.ids, c.finished) for c in got] == [
        (c.group, c.sample, c.ids, c.finished) for c in expected]  # fmt: skip
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def run_out(monkeypatch: pytest.MonkeyPatch, above: int) -> list[int]:
    """Memory runs out in a decoding step while rows could come to more than `above` tokens; the rows of each step."""
    rows: list[int] = []
    plain = native.Decoding._step

    def step(decoding: Any) -> None:
        rows.append(decoding.state.num_rows)
        if rows[-1] * NEW_TOKENS > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        plain(decoding)

    monkeypatch.setattr(native.Decoding, "_step", step)
    return rows


def test_half_as_much_is_decoded_where_memory_runs_out(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The draws, their order and what is handed out stay as they are; later rollouts do not try it again."""
    expected = decode_all(NativeDecoder([2], NEW_TOKENS, ON_CPU), model, REQUESTS)
    rows = run_out(monkeypatch, 6 * NEW_TOKENS)
    engine = WithinMemory(NativeDecoder([2], NEW_TOKENS, ON_CPU), "auto")
    handed_out = [each for ended in engine.decode(model, deque(REQUESTS), Sampling()) for each in ended]
    assert_equal(sorted(handed_out, key=lambda each: (each.group, each.sample)), expected)
    assert f"rollout.max_tokens_in_flight: {NEEDED // 2}" in caplog.text
    assert "Tried to allocate 2.00 GiB): the 12 completions" in caplog.text
    caplog.clear()
    rows.clear()
    assert_equal(decode_all(engine, model, REQUESTS), expected)
    assert not caplog.records and max(rows) <= 6


def test_what_had_ended_is_not_drawn_again(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scored completion is neither lost nor handed out twice."""
    exact = [replace(r, max_new_tokens=1 + r.group, ignore_end=True) for r in REQUESTS]
    expected = decode_all(NativeDecoder([2], NEW_TOKENS, ON_CPU), model, exact)
    steps, plain = [0], native.Decoding._step

    def step(decoding: Any) -> None:
        steps[0] += 1
        if steps[0] == 3:
            raise torch.OutOfMemoryError
        plain(decoding)

    monkeypatch.setattr(native.Decoding, "_step", step)
    engine = WithinMemory(NativeDecoder([2], NEW_TOKENS, ON_CPU), ON_CPU)
    handed_out = [each for ended in engine.decode(model, deque(exact), Sampling()) for each in ended]
    assert_equal(sorted(handed_out, key=lambda each: (each.group, each.sample)), expected)


@pytest.mark.parametrize(("above", "tokens"), [(1, "auto"), (0, "auto"), (0, 3 + NEW_TOKENS)])
def test_memory_that_is_too_small_for_half_as_much_ends_the_rollout(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, above: int, tokens: Any
) -> None:
    attempts = []
    monkeypatch.setattr(room.gc, "collect", lambda: attempts.append(1))
    run_out(monkeypatch, above)
    with pytest.raises(torch.OutOfMemoryError):
        decode_all(WithinMemory(NativeDecoder([2], NEW_TOKENS, ON_CPU), tokens), model, REQUESTS)
    assert len(attempts) == (tokens == "auto")  # a single sequence cannot be halved


class Recording:
    """A decoder that notes how much it may keep, on a model that says it is on a GPU."""

    max_new_tokens = 1024

    def __init__(self) -> None:
        self.max_tokens_in_flight = 0

    def decode(self, model: Any, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """Nothing."""
        return iter([])


def on_gpu(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What room.py asks of a model on a GPU."""
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    return SimpleNamespace(parameters=lambda: iter([weight]), config=config)


def test_auto_is_what_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-1.5B's shapes: 28 KiB of keys and values a token in bfloat16."""
    state = {"free": 40 * GIB, "reserved": 30 * GIB, "allocated": 10 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: state["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["allocated"])
    config = LlamaConfig(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128,
                         hidden_size=1536, vocab_size=151_936)  # fmt: skip
    assert bytes_of(on_gpu(config)) == (28 * 1024, 151_936 * room.LOGIT_BYTES)
    engine = Recording()
    within = WithinMemory(engine, "auto")
    decode_all(within, on_gpu(config), [])
    usable = 40 * GIB + 20 * GIB - RESERVE * 80 * GIB
    rows = engine.max_tokens_in_flight / 1024
    assert engine.max_tokens_in_flight * 28 * 1024 + rows * 151_936 * room.LOGIT_BYTES == pytest.approx(usable)
    assert engine.max_tokens_in_flight > 1_500_000
    state["free"] = 0  # the same number is not kept: what is free is asked before each rollout
    decode_all(within, on_gpu(config), [])
    assert 300_000 < engine.max_tokens_in_flight < 500_000
    state["allocated"] = 30 * GIB  # nothing is left: a sequence has to fit all the same
    decode_all(within, on_gpu(config), [])
    assert engine.max_tokens_in_flight == 1024
    decode_all(WithinMemory(engine, 5000), on_gpu(config), [])
    assert engine.max_tokens_in_flight == 5000


def test_auto_on_a_cpu(model: nn.Module) -> None:
    engine = NativeDecoder([2], NEW_TOKENS, 1)
    decode_all(WithinMemory(engine, "auto"), model, REQUESTS)
    assert engine.max_tokens_in_flight == ON_CPU


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**TINY), Qwen3Config(**TINY, head_dim=16),
     DeepseekV3Config(**TINY | {"num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                      qk_nope_head_dim=6, v_head_dim=12, n_routed_experts=4, n_group=1, topk_group=1,
                      num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1)],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_bytes_of_a_token_are_those_of_a_prefill(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        layout, _ = prefill(model, [[4, 5, 6, 7, 8]])
    held = sum(each.nbytes for each in (*layout.keys.values(), *layout.values.values()))
    assert bytes_of(model)[0] == held // 5 == cache_width(config) * 2 * 4


def test_fitting() -> None:
    """Ten sequences of 100 tokens with 10 bytes each, and 500 for each sequence's draw, are 15,000 bytes."""
    assert fitting(15_000, 10, 500, 100) == 1000
    assert fitting(-1, 10, 500, 100) == 0


def test_no_warning_where_nothing_happened(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    decode_all(WithinMemory(NativeDecoder([2], NEW_TOKENS, ON_CPU), 64), model, REQUESTS)
    assert not caplog.records
