"""Rollouts on a GPU: a captured step draws what the same kernels draw one by one, and both what the CPU draws."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from simulated_rollouts import difference, drawn, make_case, make_model

from grpo_dist.model import attention
from grpo_dist.rollout import Sampling
from grpo_dist.rollout.choose import fused_step
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.steps import module_step, prefill
from grpo_dist.rollout.sampling import Rules, draw
from grpo_dist.rollout.stop import stop_strings

CUDA = torch.device("cuda")
NUM_CASES = 60
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_captured_is_eager_is_the_cpu_in_float32(part: int, simulated: bool) -> None:
    for seed in range(part, PARTS if simulated else NUM_CASES, PARTS):
        case, model = make_case(seed), make_model(["Llama", "Qwen2", "Qwen3"][seed % 3], seed, attention.NAME)
        on_device = copy.deepcopy(model).to(CUDA)
        expected = drawn(case, model, captures=False)
        for captures in (True, False):
            assert difference(drawn(case, on_device, captures), expected) is None, (seed, captures)


@pytest.mark.parametrize("part", range(PARTS))
def test_captured_is_eager_to_the_bit_in_bfloat16(part: int, simulated: bool) -> None:
    for seed in range(part, PARTS if simulated else NUM_CASES // 2, PARTS):
        case = make_case(seed)
        model = make_model(case["kind"], seed, attention.NAME).to(CUDA, torch.bfloat16)
        captured, eager = (drawn(case, model, captures) for captures in (True, False))
        assert [(c.ids, c.logprobs) for c in captured] == [(c.ids, c.logprobs) for c in eager], seed


@pytest.mark.parametrize("step_of", [module_step, LlamaStep])
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.9, top_p=0.9, top_k=20, min_p=0.01), Sampling(greedy=True),
     Sampling(banned=(3,), min_new_tokens=1, stop=stop_strings(["ab"], [bytes([97 + n % 8]) for n in range(61)]))],
)  # fmt: skip
@torch.inference_mode()
def test_a_step_does_not_wait_for_the_device(step_of: object, shares: bool, sampling: Sampling) -> None:
    model = make_model("Qwen3", 0, attention.NAME).to(CUDA)
    layout, _ = prefill(model, [[5, 6, 7], [8, 9, 10, 11, 12]])
    state = DecodeState(CUDA, 4, shares=shares, whole_chunks=True)
    state.admit(layout, [2, 3])
    state.make_room()
    step, tokens, keys = step_of(model), torch.full((5,), 7, device=CUDA), torch.arange(5, device=CUDA)
    rules, rows = Rules(sampling, [2, 3], CUDA), torch.arange(5, device=CUDA)
    rules.grow(5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            positions = state.prompt_lengths[state.prompt] + state.lengths
            state.begin_step()
            logits = step(tokens, positions, state)
            state.end_step()
            tokens, _ = draw(logits, keys, state.lengths, sampling, rules)
            rules.ended(tokens, rows, state.lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist()


def test_rows_that_end_at_any_time_change_nothing() -> None:
    case = make_case(4)
    requests = [replace(request, max_new_tokens=1 + n % case["sizes"][0], ignore_end=True)
                for n, request in enumerate(case["requests"])]  # fmt: skip
    model = make_model(case["kind"], 4, attention.NAME)
    expected = drawn(case | {"requests": requests}, model, captures=False)
    assert difference(drawn(case | {"requests": requests}, copy.deepcopy(model).to(CUDA), True), expected) is None


@pytest.mark.parametrize("part", range(PARTS))
def test_pages_draw_what_the_cpu_draws(part: int, simulated: bool) -> None:
    """In float32 the completions of the engine without pages; in bfloat16 captured is eager."""
    if simulated:
        pytest.skip("Triton needs the device; tests/unit/rollout/test_triton.py runs its kernels without one")
    for seed in range(part, NUM_CASES, PARTS):
        case = make_case(seed)
        case["options"] = {"step_of": [fused_step, module_step][seed // PARTS % 2], "pages": True}
        model = make_model(case["kind"], seed, attention.NAME)
        expected = drawn(case | {"options": {"step_of": module_step}}, model, captures=False)
        on_device = copy.deepcopy(model).to(CUDA)
        for captures in (True, False):
            assert difference(drawn(case, on_device, captures), expected) is None, (seed, captures)
        captured, eager = (drawn(case, on_device.bfloat16(), captures) for captures in (True, False))
        assert [(c.ids, c.logprobs) for c in captured] == [(c.ids, c.logprobs) for c in eager], seed
