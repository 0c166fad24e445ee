"""The engines: the fast one draws what the plain one draws, and the plain one what transformers generates."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable

import pytest
import torch
from engine_pairs import (
    CONFIGS,
    ENDS,
    ENGINES,
    MOST,
    REQUESTS,
    TINY,
    Pair,
    assert_equal,
    drawn_by_rows,
    exactly,
    make_pair,
    make_requests,
    with_paged,
)
from torch import nn
from transformers import DeepseekV3Config, DiffLlamaConfig

from grpo_dist.model import attention
from grpo_dist.model.load import packing_obstacle
from grpo_dist.rollout import Decoder, NativeDecoder, PagedDecoder, Request, RowDecoder, Sampling, decode_all, paged
from grpo_dist.rollout.engine import in_order
from grpo_dist.rollout.native import cache
from grpo_dist.rollout.native import engine as native
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.steps import Step, module_step, prefill
from grpo_dist.rollout.probe import packing_leak
from grpo_dist.types import Trajectory


@pytest.fixture(params=[0, 64], ids=["shared", "copied"])
def longest_copied_prompt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that sequences share, and copies of their own, for engines that the test makes."""
    monkeypatch.setattr(native, "COPIED_PROMPT", request.param)


either_prompt = pytest.mark.usefixtures("longest_copied_prompt")


def check_form(completions: list[Trajectory], requests: list[Request], most: int) -> None:
    """One completion a request, ended by its first end token or by the limit."""
    assert [(c.group, c.sample) for c in completions] == [(r.group, r.sample) for r in requests]
    for completion in completions:
        assert 1 <= len(completion.ids) == len(completion.logprobs) <= most
        assert not set(completion.ids[:-1]) & set(ENDS)
        assert completion.finished == (completion.ids[-1] in ENDS)
        assert completion.finished or len(completion.ids) == most


@either_prompt
@pytest.mark.parametrize("name", CONFIGS)
def test_both_engines_draw_the_same(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    expected = drawn_by_rows(pair)
    check_form(expected, REQUESTS, MOST)
    assert len({len(c.ids) for c in expected}) > 4, "the test needs completions of many lengths"
    assert any(not c.finished for c in expected) or max(len(c.ids) for c in expected) > 20
    for in_flight in (200, 100000):
        assert_equal(decode_all(NativeDecoder(ENDS, MOST, in_flight), pair.shared, REQUESTS), expected)


@either_prompt
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("step_of", [LlamaStep, KernelStep])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_faster_step_draws_the_same(name: str, step_of: Callable[[nn.Module], Step], pairs: dict[str, Pair]) -> None:
    for in_flight in (200, 100000):
        engine = NativeDecoder(ENDS, MOST, in_flight, step_of=step_of)
        assert_equal(decode_all(engine, pairs[name].shared, REQUESTS), drawn_by_rows(pairs[name]))


@either_prompt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_few_operations_rounds_as_the_model_does(dtype: torch.dtype, pairs: dict[str, Pair]) -> None:
    model = copy.deepcopy(pairs["qwen3"].shared).to(dtype)
    tokens, positions = torch.tensor([5, 60, 17]), torch.tensor([9, 40, 900])
    logits = []
    with torch.inference_mode():
        layout, _ = prefill(model, [REQUESTS[4].prompt, REQUESTS[0].prompt])
        for step_of in (module_step, LlamaStep):
            state = cache.DecodeState(torch.device("cpu"), 1, shares=native.COPIED_PROMPT == 0, whole_chunks=False)
            state.admit(layout, [2, 1])
            state.make_room()
            state.begin_step()
            logits.append(step_of(model)(tokens, positions, state).float())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert float((logits[1] - logits[0]).norm()) <= tolerance * float(logits[0].norm())


@with_paged
@pytest.mark.parametrize("name", [
    "qwen2", "mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "gemma")),
])  # fmt: skip
def test_continuous_batching_draws_the_same(name: str, pairs: dict[str, Pair]) -> None:
    pair, sampling = pairs[name], Sampling(temperature=0.9, top_p=0.95, top_k=30)
    for in_flight in (40, 100000):
        drawn = decode_all(PagedDecoder(ENDS, MOST, in_flight), pair.shared, REQUESTS, sampling)
        assert_equal(drawn, drawn_by_rows(pair, sampling))
    assert pair.shared.config._attn_implementation == attention.NAME, "as it was"


@with_paged
def test_continuous_batching_with_prompts_that_come_in_parts(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a long prompt is still being computed others draw, and some have ended before."""
    monkeypatch.setattr(paged, "BATCH_TOKENS", 8)
    requests = make_requests([1] * 4, [2, 2, 2, 20])
    requests = [exactly(r, n) for r, n in zip(requests, [2, 6, 6, 6], strict=True)]
    expected = decode_all(NativeDecoder(ENDS, MOST, 10000), pairs["llama"].shared, requests)
    assert_equal(decode_all(PagedDecoder(ENDS, MOST, 10000), pairs["llama"].shared, requests), expected)


@either_prompt
@pytest.mark.parametrize("in_flight", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_room_in_flight_changes_nothing(in_flight: int, pairs: dict[str, Pair]) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=30, min_p=0.001)
    drawn = decode_all(NativeDecoder(ENDS, MOST, in_flight), pairs["qwen2"].shared, REQUESTS, sampling)
    assert_equal(drawn, drawn_by_rows(pairs["qwen2"], sampling))


@either_prompt
def test_a_request_alone_gives_what_it_gives_in_a_batch(pairs: dict[str, Pair]) -> None:
    pair = pairs["llama"]
    for engine, model in ((NativeDecoder(ENDS, MOST, 10000), pair.shared), (RowDecoder(ENDS, MOST), pair.plain)):
        together = drawn_by_rows(pair)
        for n in (0, 6, 15):
            assert_equal(decode_all(engine, model, [REQUESTS[n]]), [together[n]])
        order = [12, 13, 14, 15, 0, 1, 2, 3, 9, 10]
        assert_equal(decode_all(engine, model, [REQUESTS[n] for n in order]), [together[n] for n in order])


@pytest.mark.parametrize("engine", [*ENGINES, RowDecoder(ENDS, MOST)])
def test_each_completion_is_reported_once(engine: Decoder, pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen2"]
    model = pair.plain if isinstance(engine, RowDecoder) else pair.shared
    calls = [call for call in engine.decode(model, deque(REQUESTS), Sampling()) if call]
    reported = [completion for call in calls for completion in call]
    assert len(calls) > 1
    assert Counter((c.group, c.sample) for c in reported) == Counter((r.group, r.sample) for r in REQUESTS)
    assert_equal(in_order(REQUESTS, reported), drawn_by_rows(pair))


@either_prompt
@pytest.mark.parametrize("in_flight", [5, 100000])
def test_a_single_new_token(in_flight: int, pairs: dict[str, Pair]) -> None:
    pair = pairs["llama"]
    expected = decode_all(RowDecoder(ENDS, 1), pair.plain, REQUESTS)
    check_form(expected, REQUESTS, 1)
    assert_equal(decode_all(NativeDecoder(ENDS, 1, in_flight), pair.shared, REQUESTS), expected)


@either_prompt
def test_no_requests(pairs: dict[str, Pair]) -> None:
    assert decode_all(NativeDecoder(ENDS, 4, 100), pairs["llama"].shared, []) == []
    assert decode_all(RowDecoder(ENDS, 4), pairs["llama"].plain, []) == []


def test_paged_refuses_a_transformers_it_cannot_draw_for(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "ContinuousBatchingManager", object)
    with pytest.raises(RuntimeError, match="has no continuous batching that another sampler can draw for"):
        decode_all(PagedDecoder(ENDS, MOST, 200), pairs["llama"].shared, REQUESTS)


@either_prompt
def test_every_completion_may_end_at_once(pairs: dict[str, Pair]) -> None:
    """Every token ends: nothing is left to decode after a prefill, and the next prompts must still come in."""
    everything = list(range(61))
    completions = decode_all(NativeDecoder(everything, MOST, 50), pairs["llama"].shared, REQUESTS)
    assert [len(c.ids) for c in completions] == [1] * len(REQUESTS) and all(c.finished for c in completions)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_greedy_is_what_transformers_generates(name: str, pairs: dict[str, Pair]) -> None:
    pair, requests = pairs[name], make_requests([1] * 4, [3, 20, 7, 12])
    native = decode_all(NativeDecoder(ENDS, 24, 10000), pair.shared, requests, Sampling(greedy=True))
    assert_equal(native, decode_all(RowDecoder(ENDS, 24), pair.plain, requests, Sampling(greedy=True)))
    for request, completion in zip(requests, native, strict=True):
        row = torch.tensor([request.prompt])
        output = pair.plain.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=24,
                                     eos_token_id=ENDS, pad_token_id=0)  # fmt: skip
        assert completion.ids == output[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_the_models(temperature: float, pairs: dict[str, Pair]) -> None:
    pair = pairs["mistral"]
    completions = decode_all(NativeDecoder(ENDS, MOST, 10000), pair.shared, REQUESTS, Sampling(temperature, top_k=20))
    for request, completion in zip(REQUESTS, completions, strict=True):
        row = torch.tensor([request.prompt + completion.ids])
        with torch.no_grad():
            logits = pair.plain(input_ids=row, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        rows = torch.log_softmax(logits / temperature, -1)
        expected = rows.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@either_prompt
def test_values_narrower_than_keys() -> None:
    """DeepSeek's value heads have a size of their own: the probe accepts them, so the engine has to take them."""
    config = DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16,
    )  # fmt: skip
    pair, requests = make_pair(config), REQUESTS[:4]
    expected = decode_all(RowDecoder(ENDS, 8), pair.plain, requests)
    assert_equal(decode_all(NativeDecoder(ENDS, 8, 10000), pair.shared, requests), expected)


def test_a_layer_that_attends_twice() -> None:
    """DiffLlama calls its attention twice a layer, with other values: named beforehand, or decoded right."""
    config = DiffLlamaConfig(**TINY)
    if packing_obstacle(config, 512):
        return
    pair, requests = make_pair(config), REQUESTS[:4]
    if packing_leak(pair.shared):
        return
    expected = decode_all(RowDecoder(ENDS, 8), pair.plain, requests)
    assert_equal(decode_all(NativeDecoder(ENDS, 8, 10000), pair.shared, requests), expected)


@either_prompt
@pytest.mark.parametrize(("steps", "in_flight"), [
    (2, 100), (50, 100000), *(pytest.param(*each, marks=pytest.mark.slow)
                              for each in ((2, 100000), (8, 100), (8, 100000), (50, 100))),
])  # fmt: skip
def test_asking_seldom_who_has_ended_changes_nothing(steps: int, in_flight: int, pairs: dict[str, Pair]) -> None:
    """Rows that have ended draw on until they are dropped, and none of that may be seen."""
    expected = drawn_by_rows(pairs["qwen2"])
    assert any(len(c.ids) == MOST for c in expected), "rows that go on past the last place are part of the test"
    engine = NativeDecoder(ENDS, MOST, in_flight, steps_between_checks=steps)
    assert_equal(decode_all(engine, pairs["qwen2"].shared, REQUESTS), expected)


@either_prompt
def test_rows_that_linger_do_not_make_the_cache_grow(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows end late and wait to be dropped while new prompts decode: no sequence gets more room than it can use."""
    monkeypatch.setitem(native.COMPACT_BELOW, "cpu", 0.1)
    slots: list[int] = []
    make_room = cache.DecodeState.make_room

    def spy(state: cache.DecodeState) -> None:
        make_room(state)
        slots.append(next(iter(state.own_keys.values())).shape[2])

    monkeypatch.setattr(cache.DecodeState, "make_room", spy)
    requests = make_requests([3] * 12, [4] * 12)
    requests = [exactly(r, MOST if r.group % 2 else 5 + r.sample) for r in requests]
    completions = decode_all(NativeDecoder(ENDS, MOST, 6 * MOST), pairs["qwen2"].shared, requests)
    assert [len(c.ids) for c in completions] == [r.max_new_tokens for r in requests]
    assert max(slots) <= MOST + 1 + (4 if native.COPIED_PROMPT else 0)
    alone = decode_all(NativeDecoder(ENDS, MOST, 10**6), pairs["qwen2"].shared, requests[-3:])
    assert_equal(completions[-3:], alone)
