"""Rows that keep their cache between two turns: drawn as from a row computed again, whatever answers first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.model import attention
from grpo_dist.rollout import LoadedModel, LocalEngine, NativeDecoder, Request, RowDecoder, Sampling, awake
from grpo_dist.rollout.engine import Decoder
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.types import Trajectory

pytestmark = pytest.mark.usefixtures("kernel")

ENDS = [2, 3, 17, 18]
MOST = 48
TURNS = 3
PROMPTS = [[5, 9, 40, 7, 7, 8], [21, 4], [31] * 70]
Place = tuple[int, int]
"""Group and sample."""


def peaked_model(factor: float) -> nn.Module:
    """A small model whose logits are `factor` times those of random weights."""
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return peaked_model(20)


def native(in_flight: int = 1 << 16) -> NativeDecoder:
    return NativeDecoder(ENDS, MOST, in_flight, step_of=KernelStep, copied_prompt=0)


def first_turns() -> list[Request]:
    return [Request(group, sample, prompt, stream_key(4, group, sample), max_new_tokens=20, keeps=True)
            for group, prompt in enumerate(PROMPTS) for sample in range(5)]  # fmt: skip


def answer_to(turn: Trajectory) -> list[int]:
    """What somebody says to a turn: of different lengths, none of them short."""
    return [20 + (7 * turn.sample + n) % 40 for n in range(1 + (5 * turn.group + turn.sample) % 7)]


@contextmanager
def computed_prompts() -> Iterator[list[int]]:
    """How many tokens of prompts are computed each time."""
    counts: list[int] = []
    prefill = KernelStep.prefill

    def counted(step: KernelStep, prompts: list[list[int]]) -> Any:
        counts.append(sum(map(len, prompts)))
        return prefill(step, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelStep, "prefill", counted)
        yield counts


def in_turn(waiting: list[Place]) -> list[Place]:
    return waiting


def last_first(waiting: list[Place]) -> list[Place]:
    return waiting[:-3:-1]


def all_at_the_end(waiting: list[Place]) -> list[Place]:
    return waiting if len(waiting) == 15 else []


def played(
    decoder: Decoder, model: nn.Module, next_of: Callable[[list[Place]], list[Place]] = in_turn,
    edit: Callable[[Request], Request] = lambda request: request,
) -> dict[Place, list[tuple[list[int], list[float]]]]:  # fmt: skip
    """Ids and log-probabilities of each row's turns; `next_of` chooses whose answers come, or nobody's yet."""
    engine = LocalEngine(decoder, LoadedModel(model), {})
    turns: dict[Place, list[tuple[list[int], list[float]]]] = {}
    rows = {(request.group, request.sample): request for request in first_turns()}
    under_way, waiting = set(rows), []
    with awake(engine):
        engine.submit(list(rows.values()), Sampling())
        while under_way or waiting:
            for turn in engine.poll():
                place = turn.group, turn.sample
                under_way.remove(place)
                turns.setdefault(place, []).append((turn.ids, turn.logprobs))
                added = [*turn.ids, *answer_to(turn)]
                asked = rows[place]
                rows[place] = replace(asked, prompt=asked.prompt + added, offset=asked.offset + len(added),
                                      max_new_tokens=8, keeps=len(turns[place]) < TURNS)  # fmt: skip
                room = MOST - rows[place].offset
                if turn.finished and len(turns[place]) < TURNS and room >= 8:
                    waiting.append(place)
                else:
                    engine.release([place])
            for place in list(next_of(waiting) or waiting * (not under_way)):
                waiting.remove(place)
                under_way.add(place)
                engine.submit([edit(rows[place])], Sampling())
        assert engine.poll() == []
    return turns


def test_kept_rows_are_drawn_as_rows_computed_again(model: nn.Module) -> None:
    with computed_prompts() as counts:
        kept = played(native(), model)
    assert counts == [sum(map(len, PROMPTS))], "the prompts, and nothing again"
    assert sum(len(turns) == TURNS for turns in kept.values()) > 3
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="sdpa").eval()
    plain.load_state_dict(model.state_dict())
    again = played(RowDecoder(ENDS, MOST), plain)
    for place, turns in again.items():
        assert [ids for ids, _ in kept[place]] == [ids for ids, _ in turns]
        for (_, some), (_, others) in zip(kept[place], turns, strict=True):
            assert some == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("next_of", [last_first, all_at_the_end])
def test_the_order_of_answers_changes_nothing(next_of: Any, model: nn.Module) -> None:
    """To the last bit."""
    assert played(native(), model, next_of) == played(native(), model)


def test_rows_wait_within_the_memory_there_is(model: nn.Module) -> None:
    """Groups come after those before them have ended, although rows that wait are computed no more."""
    turns, expected = played(native(in_flight=5 * MOST + 70), model), played(native(), model)
    assert {place: [ids for ids, _ in each] for place, each in turns.items()} == {
        place: [ids for ids, _ in each] for place, each in expected.items()
    }


def test_a_request_that_does_not_go_on_with_its_row_is_computed(model: nn.Module) -> None:
    """As where an earlier turn was written anew, or where the row would get longer than the cache can be."""

    def edit(request: Request) -> Request:
        return replace(request, prompt=[6, *request.prompt[1:]]) if request.sample < 2 else request

    with computed_prompts() as counts:
        turns = played(native(), model, edit=edit)
    assert len(counts) > 1
    expected = played(native(), model)
    assert {place for place in turns if turns[place] != expected[place]} <= {place for place in turns if place[1] < 2}
