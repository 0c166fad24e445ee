"""Steps with their draws in one call: to the last bit what steps draw of which each is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoded_steps import GEMMA2, make_model
from test_kept_rows import ENDS, MOST, PROMPTS, last_first, peaked_model, played
from torch import nn

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.rollout import NativeDecoder, Request, Sampling, decode_all
from grpo_dist.rollout.native import drawn_steps
from grpo_dist.rollout.native.drawn_steps import MOST_STEPS, DrawnSteps
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.stop import stop_strings
from grpo_dist.types import Trajectory

pytestmark = pytest.mark.usefixtures("kernel")


def decoder(in_flight: int = 1 << 16, **options: Any) -> NativeDecoder:
    return NativeDecoder(ENDS, MOST, in_flight, step_of=KernelStep, **{"copied_prompt": 0, **options})


def drawn(made: NativeDecoder, model: nn.Module, sampling: Sampling, edit: Any = lambda r: r) -> list[Trajectory]:
    requests = [Request(group, sample, prompt, stream_key(1, group, sample))
                for group, prompt in enumerate(PROMPTS) for sample in range(5)]  # fmt: skip
    return decode_all(made, model, [edit(each) for each in requests], sampling)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Inside, each token is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelStep, "together", lambda *_: None)
        yield


def odd(request: Request) -> Request:
    """Of different limits, some of which end tokens do not end, some later turns of a trajectory."""
    n = request.sample
    return replace(request, max_new_tokens=[1, 2, 17, 30, MOST][n], ignore_end=n in (2, 4), offset=9 * (n == 3))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Steps and tokens of each call."""
    results, call = [], DrawnSteps.__call__

    def counted(steps: DrawnSteps, most: int) -> tuple[int, int]:
        results.append(call(steps, most))
        return results[-1]

    monkeypatch.setattr(DrawnSteps, "__call__", counted)
    return results


@pytest.mark.parametrize("seconds", [1e9, 0.0])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [("llama", torch.float32, {}), ("llama", torch.bfloat16, {}), ("llama", torch.float32, {"in_flight": 250}),
     ("llama", torch.float32, {"copied_prompt": 99}), ("gemma2", torch.float32, {}), ("gemma3", torch.float32, {})],
)  # fmt: skip
@pytest.mark.usefixtures("all_threads")
def test_the_same_to_the_last_bit(
    kind: str, dtype: torch.dtype, options: dict[str, Any], threads: int, seconds: float,
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = {"gemma2": GEMMA2, "gemma3": {"sliding_window": 20}}.get(kind)
    model = (peaked_model(20) if more is None else make_model(kind, **more)).to(dtype)
    with one_by_one():
        expected = drawn(decoder(**options), model, Sampling(0.7), odd)
    assert not calls
    torch.set_num_threads(threads)
    monkeypatch.setattr(drawn_steps, "SECONDS", seconds)
    assert drawn(decoder(**options), model, Sampling(0.7), odd) == expected
    assert {len(each.ids) for each in expected} >= {1, 2, 17, MOST}
    assert any(each.finished and len(each.ids) > 2 for each in expected), "the test needs rows that end by themselves"
    # the first token of each is drawn behind its prompt
    assert sum(tokens for _, tokens in calls) == sum(len(each.ids) for each in expected) - len(expected)
    steps = [steps for steps, _ in calls]
    assert max(steps) == (MOST_STEPS if seconds else 1)


def test_turns_of_kept_rows(calls: list[tuple[int, int]]) -> None:
    model = peaked_model(20)
    with one_by_one():
        expected = played(decoder(), model)
    assert played(decoder(), model, last_first) == expected
    assert max(steps for steps, _ in calls) > 1


@pytest.mark.parametrize(
    "sampling",
    [Sampling(greedy=True), Sampling(top_p=0.9), Sampling(top_k=9), Sampling(min_p=0.1), Sampling(banned=(7,)),
     Sampling(min_new_tokens=3), Sampling(stop=stop_strings(["ab"], [bytes([97 + n % 5]) for n in range(61)]))],
    ids=["greedy", "top_p", "top_k", "min_p", "banned", "least", "stop"],
)  # fmt: skip
def test_what_has_to_be_looked_at_is(sampling: Sampling, calls: list[tuple[int, int]]) -> None:
    assert drawn(decoder(), peaked_model(20), sampling) and not calls


def test_a_pass_of_a_rollout_knows_what_a_call_did(calls: list[tuple[int, int]]) -> None:
    """Rows of one prompt end one after another; the call says how many tokens there were with that."""
    lengths = [3, 9, 14]
    requests = [Request(0, n, PROMPTS[0], stream_key(1, 0, n), max_new_tokens=length, ignore_end=True)
                for n, length in enumerate(lengths)]  # fmt: skip
    got = decode_all(decoder(), peaked_model(20), requests)
    assert [len(each.ids) for each in got] == lengths
    assert calls == [(13, 2 + 8 + 13)]


@pytest.mark.parametrize("is_turn", [True, False])
def test_turns_are_handed_over_sooner(
    is_turn: bool, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_steps, "SECONDS_OF_TURNS", 0.0)
    requests = [Request(0, 0, PROMPTS[0], 7, ignore_end=True, keeps=is_turn)]
    decode_all(decoder(), peaked_model(20), requests)
    steps = MOST - 1
    assert [number for number, _ in calls] == ([1] * steps if is_turn else [MOST_STEPS, steps - MOST_STEPS])


BOUND = {"original_max_position_embeddings": MOST + 70}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, **BOUND}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 512, **BOUND}),
     ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": MOST + 70})],
)  # fmt: skip
def test_no_rotation_is_that_of_a_longer_text(kind: str, options: dict[str, Any]) -> None:
    """Prompts have up to 70 tokens, so that a position more would change the rotations of all."""
    model = make_model(kind, **options)
    with one_by_one():
        expected = drawn(decoder(), model, Sampling(0.7), lambda request: replace(request, ignore_end=True))
    assert drawn(decoder(), model, Sampling(0.7), lambda request: replace(request, ignore_end=True)) == expected


def test_a_call_ends_before_its_works_cannot_be_told_apart(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are 2^16 numbers for the common works of the threads."""
    monkeypatch.setattr(drawn_steps, "SECONDS", 1e9)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    requests = [Request(0, 0, PROMPTS[0], 7, max_new_tokens=40, ignore_end=True)]
    model = make_model("llama", num_hidden_layers=400, **sizes)
    got = decode_all(decoder(), model, requests)
    assert sum(steps for steps, _ in calls) == 39 and 8 < max(steps for steps, _ in calls) < MOST_STEPS
    with one_by_one():
        assert decode_all(decoder(), model, requests) == got
