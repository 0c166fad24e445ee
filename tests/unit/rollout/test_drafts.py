"""Drafts: they change how long a rollout takes, and no bit of what it draws."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from decoded_steps import GEMMA2, decoded, make_model, tokens_of
from test_kept_rows import ENDS, MOST, PROMPTS, last_first, peaked_model, played
from torch import nn

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.rollout import NativeDecoder, Request, Sampling, decode_all
from grpo_dist.rollout.drafts import (
    BEGIN,
    LOOK_EVERY,
    Acceptance,
    Completions,
    Gain,
    Looks,
    PassTime,
    numbers_of_drafts,
    text_of,
)
from grpo_dist.rollout.native import drafted
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.steps import prefill
from grpo_dist.rollout.stop import stop_strings
from grpo_dist.types import Trajectory


def ahead(completions: Completions, ids: list[int]) -> tuple[list[int], int]:
    text, match = completions.ahead(7, text_of(ids))
    return [ord(character) - 1 for character in text], match


def test_what_came_after_the_same_tokens_is_drafted() -> None:
    completions = Completions(end_ids=[2])
    assert ahead(completions, [5]) == ([], 0)
    completions.add(7, text_of([5, 6, 7, 8, 9, 2]))
    completions.add(7, text_of([5, 6, 4, 4, 9, 2]))
    assert ahead(completions, [5]) == ([6, 4, 4, 9], 16), "from the newest one's beginning to its end"
    assert ahead(completions, [5, 6, 7]) == ([8, 9], 16)
    assert ahead(completions, [3, 7, 8]) == ([9], 2), "the last two tokens"
    assert ahead(completions, [3, 8]) == ([], 0)
    assert completions.ahead(8, text_of([5])) == ("", 0), "another prompt"


def test_nothing_is_drafted_beyond_the_end_of_a_turn() -> None:
    completions = Completions(end_ids=[2, 93])
    completions.add(7, text_of([5, 6, 93, 40, 41, 2]))
    assert ahead(completions, [5]) == ([6], 16)
    assert ahead(completions, [5, 6]) == ([], 16)
    assert ahead(completions, [5, 6, 93, 40]) == ([41], 16)


def test_completions_are_kept_in_bounded_memory() -> None:
    completions = Completions([], most=100, most_of_prompt=30)
    for n in range(1000):
        completions.add(n % 70, text_of([n] * 9))
        assert completions.characters <= 100
    assert completions.ahead(999 % 70, text_of([999, 999]))[0] and completions.ahead(990 % 70, text_of([990, 990]))[0]
    assert completions.ahead(989 % 70, text_of([989, 989])) == ("", 0), "used longest ago"
    completions.add(50, text_of([3] * 200))
    assert completions.ahead(50, text_of([3, 3]))[0] == text_of([3])


def test_texts_have_room_for_every_token() -> None:
    ids = [0, 1, 0xD7FF, 0xDFFF, 262_143]
    completions = Completions(end_ids=[-1])
    completions.add(7, text_of(ids))
    assert ahead(completions, ids[:1]) == (ids[1:], 16) and BEGIN not in text_of(ids)


def test_the_time_of_a_pass_is_learned() -> None:
    time, drawn = PassTime(), random.Random(0)
    assert time.least_chance(4, 4) == 1.0, "no drafts before anything is known"
    for _ in range(60):
        tokens = drawn.randint(1, 40)
        time.add(tokens, 3.0 + 0.5 * tokens + drawn.gauss(0, 0.1))
    assert time.start == pytest.approx(3.0, abs=0.2) and time.each == pytest.approx(0.5, abs=0.02)
    time.add(10, 1000.0)
    assert time.start + 10 * time.each < 20, "something else had the processor"
    for _ in range(300):
        time.add(16, 4.0)
    assert time.each > 0 and time.start + 16 * time.each == pytest.approx(4.0, abs=0.1)


def test_no_pass_takes_less_than_no_time() -> None:
    """Steps of few rows become faster, after slow ones of many."""
    time = PassTime()
    for tokens, seconds in [(64, 0.1), (32, 0.06), (8, 0.03), *[(8, 0.004)] * 40]:
        time.add(tokens, seconds)
        assert 0 < time.of(1) < time.of(8)


def test_looking_for_drafts_has_to_save_time() -> None:
    gain = Gain()
    assert not gain.is_none, "drafts are looked for at first"
    gain.add(2.0, 3.0)
    gain.add(2.5, 1.0)
    assert gain.is_none
    for _ in range(60):
        gain.add(2.0, 2.2)
    assert not gain.is_none, "what was long ago counts less"
    gain.add(1000.0, 2.0)
    assert not gain.is_none, "something else had the processor"


def test_looking_in_vain_costs_a_hundredth_of_the_time() -> None:
    looks = Looks()
    for spent, wait in ((0.9, LOOK_EVERY), (1.05, LOOK_EVERY), (1.5, 50), (1000.0, 200)):  # at the last one others work
        looks.add(7, spent, 1.0)
        assert looks.next == 7 + wait


def test_acceptance_follows_what_is_drawn() -> None:
    acceptance = Acceptance(memory=100)
    for n in range(2000):
        acceptance.count(16, 1, int(n % 10 > 0))
        acceptance.count(2, 1, int(n < 1000))
    assert acceptance.share(16) == pytest.approx(0.9, abs=0.03) and acceptance.share(2) < 0.01
    assert acceptance.share(6) == 0.75, "as at the beginning"
    chances = acceptance.chances(0.2)
    assert chances[2] == [] and chances[6][:2] == [0.75, 0.75**2] and len(chances[6]) == 5
    assert chances[16][2] == pytest.approx(acceptance.share(16) ** 3)
    assert all(chance > 0.2 for each in chances.values() for chance in each)


def test_drafts_count_by_the_tokens_that_they_have_in_common() -> None:
    """A row behind 5 equal tokens, 13 drafts drawn and one that was not: one more token in common after each."""
    acceptance = Acceptance()
    acceptance.count(5, 14, 13)
    assert acceptance.share(2) == 4 / 5 and acceptance.share(6) == 13 / 14
    assert acceptance.share(16) == (3 + 2) / (4 + 3)


def test_a_pass_has_the_drafts_that_make_it_fastest() -> None:
    drawn = random.Random(1)
    for _ in range(50):
        time = PassTime()
        time.start, time.each = drawn.uniform(0, 8), drawn.uniform(0.1, 2)
        chances = [sorted((drawn.random() for _ in range(drawn.randint(0, 3))), reverse=True) for _ in range(3)]

        def rate(numbers: tuple[int, ...]) -> float:
            tokens = 3 + sum(sum(row[:n]) for row, n in zip(chances, numbers, strict=True))  # noqa: B023
            return tokens / (time.start + time.each * (3 + sum(numbers)))  # noqa: B023

        best = max(product(*(range(len(row) + 1) for row in chances)), key=rate)
        assert rate(tuple(numbers_of_drafts(chances, time))) == pytest.approx(rate(best))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize(
    ("dtype", "kind", "options"),
    [(torch.float32, "qwen3", {}), (torch.bfloat16, "qwen3", {}), (torch.float32, "gemma2", GEMMA2)],
)
@torch.inference_mode()
def test_several_tokens_of_a_row_are_computed_as_one_after_another(
    dtype: torch.dtype, kind: str, options: dict[str, Any], shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: rows of different prompts, lengths and numbers of tokens in one pass, after wrong drafts, and by
    threads that compute different tokens of a row."""
    model = make_model(kind, hidden_size=528, **options).to(dtype)
    expected, rows = decoded(KernelStep, model, [3, 2, 3], shares), [5, 0, 1, 7]
    layout, _ = prefill(model, PROMPTS_OF_KERNEL)
    state = DecodeState(torch.device("cpu"), 40, shares=shares, whole_chunks=False)
    state.admit(layout, [3, 2, 3])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    step, tokens = KernelStep(model), tokens_of(torch.arange(8))
    lengths = {row: 0 for row in rows}
    for numbers in ([1, 9, 4, 2], [3, 1, 17, 1], [12, 5, 1, 30], [2, 2, 2, 2]):
        for right in (False, True):
            entered = [(int(tokens[lengths[row] + n, row]) if right or n < 1 else 60, row,
                        int(state.starts[row]) + lengths[row] + n)
                       for row, number in zip(rows, numbers, strict=True) for n in range(number)]  # fmt: skip
            state.make_room(max(numbers))
            logits = step.several(*torch.tensor(entered).T.contiguous(), state).double()
        places = [(lengths[row] + n, row) for row, number in zip(rows, numbers, strict=True) for n in range(number)]
        assert torch.equal(logits, torch.stack([expected[place] for place in places]))
        for row, number in zip(rows, numbers, strict=True):
            lengths[row] += number
        state.set_lengths(torch.tensor(rows), torch.tensor(list(lengths.values())))


PROMPTS_OF_KERNEL = [[5, 9, 40, 7, 7], [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]


STOP = stop_strings(["abca"], [bytes([97 + n % 5]) for n in range(61)])


def assert_seldom(looked: list[int]) -> None:
    """Steps in which drafts are looked for: LOOK_EVERY from one to the next, but where fewer rows are alive."""
    apart = [later - first for first, later in pairwise(looked)]
    assert apart.count(LOOK_EVERY) > 2 and max(apart) == LOOK_EVERY and sum(apart) > 0.7 * LOOK_EVERY * len(apart)


class Fixed(PassTime):
    """Passes that take what the test says."""

    def __init__(self, start: float, each: float) -> None:
        super().__init__()
        self.start, self.each = start, each

    def add(self, tokens: int, seconds: float) -> None:
        pass


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def certain(request: pytest.FixtureRequest) -> nn.Module:
    """A model that often, but not always, draws the same."""
    return peaked_model(60).to(request.param)


def decoder(drafts: bool, in_flight: int = 1 << 16, copied: int = 0) -> NativeDecoder:
    made = NativeDecoder(ENDS, MOST, in_flight, step_of=KernelStep, copied_prompt=copied, drafts=drafts)
    if made.drafts:
        made.drafts.pass_time = Fixed(1.0, 1e-9)  # tokens cost nothing: all drafts are computed
        made.drafts.step_time = Fixed(1e3, 1e-9)  # and looking for them is worth its time
    return made


def epochs(made: NativeDecoder, model: nn.Module, sampling: Sampling, edit: Any = lambda r: r) -> list[Trajectory]:
    """The completions of two passes over the prompts, two groups of them the same prompt's."""
    return [each for epoch in range(2) for each in decode_all(made, model, [
        edit(Request(group, sample, prompt, stream_key(epoch, group, sample)))
        for group, prompt in enumerate([*PROMPTS, PROMPTS[0]]) for sample in range(3)], sampling)]  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("in_flight", "copied", "sampling"),
    [(1 << 16, 0, Sampling(0.8, top_p=0.9, top_k=20)), (1 << 16, 0, Sampling(greedy=True)), (250, 0, Sampling()),
     (1 << 16, 99, Sampling()), (1 << 16, 0, Sampling(stop=STOP, min_new_tokens=4, banned=(7,)))],
    ids=["truncated", "greedy", "few", "copied", "stop"],
)  # fmt: skip
def test_the_same_completions_to_the_last_bit(
    in_flight: int, copied: int, sampling: Sampling, certain: nn.Module
) -> None:
    with_drafts = decoder(True, in_flight, copied)
    assert epochs(with_drafts, certain, sampling) == epochs(decoder(False, in_flight, copied), certain, sampling)
    assert with_drafts.drafts is not None
    assert 0 < with_drafts.drafts.accepted <= with_drafts.drafts.drafted
    if sampling.stop is None and not sampling.greedy:
        assert with_drafts.drafts.accepted < 0.98 * with_drafts.drafts.drafted, "the test needs drafts that are wrong"
    share = with_drafts.metrics()["rollout/draft_accepted"]
    assert 0 < share <= 1 and with_drafts.metrics() == {"rollout/draft_accepted": 0.0}, "counted once"


@pytest.mark.usefixtures("kernel")
def test_limits_and_ends_that_do_not_count(certain: nn.Module) -> None:
    def edit(request: Request) -> Request:
        return replace(request, max_new_tokens=1 + 14 * request.sample, ignore_end=request.sample == 1)

    assert epochs(decoder(True), certain, Sampling(), edit) == epochs(decoder(False), certain, Sampling(), edit)


@pytest.mark.usefixtures("kernel")
def test_rows_may_all_have_ended_before_that_is_looked_at(certain: nn.Module) -> None:
    seldom = decoder(True)
    seldom.steps_between_checks = 8
    assert epochs(seldom, certain, Sampling()) == epochs(decoder(False), certain, Sampling())


@pytest.mark.usefixtures("kernel")
def test_turns_of_kept_rows_are_drafted_too(certain: nn.Module) -> None:
    with_drafts = decoder(True)
    assert played(with_drafts, certain, last_first) == played(decoder(False), certain)
    assert with_drafts.drafts is not None and with_drafts.drafts.accepted > 0


@pytest.mark.usefixtures("kernel")
def test_drafts_that_are_never_right_are_no_longer_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafted.Completions, "ahead", lambda *_: (text_of([59] * 8), 16))
    model, made, expected = make_model(), decoder(True), decoder(False)
    assert made.drafts is not None
    made.drafts.pass_time = Fixed(1.0, 0.05)
    assert epochs(made, model, Sampling()) == epochs(expected, model, Sampling())
    before = made.drafts.drafted
    epochs(made, model, Sampling())
    assert before > 0 and made.drafts.drafted < 1.2 * before


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("is_none", [True, False])
def test_where_looking_saves_no_time_it_is_done_in_every_eighth_step(
    is_none: bool, certain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gain, "is_none", is_none)
    made, plain_rows, looks = decoder(True), drafted.DraftedSteps._rows, []

    def rows(self: drafted.DraftedSteps, alive: torch.Tensor) -> list[Any]:
        looks.append((self.drafts.steps, len(alive) > 0))
        return plain_rows(self, alive)

    monkeypatch.setattr(drafted.DraftedSteps, "_rows", rows)
    assert epochs(made, certain, Sampling()) == epochs(decoder(False), certain, Sampling())
    looked = [number for number, is_looked in looks if is_looked]
    assert len(looked) > 2 and (len(looked) == len(looks)) == (not is_none)
    if is_none:
        assert_seldom(looked)
    assert made.drafts is not None and made.drafts.accepted > 0


@pytest.mark.usefixtures("kernel")
def test_where_no_draft_is_worth_its_time_a_few_are_looked_at_now_and_then(
    certain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []  # steps so far, and rows that were looked at in the newest one
    compare = drafted.DraftedSteps._compare

    def counting(steps: drafted.DraftedSteps, rows: list[Any]) -> None:
        compared.append((steps.drafts.steps, len(rows)))
        compare(steps, rows)

    monkeypatch.setattr(drafted.DraftedSteps, "_compare", counting)
    made = decoder(True)
    assert made.drafts is not None
    made.drafts.pass_time = Fixed(1.0, 1e9)  # a token more takes as long as a pass
    assert epochs(made, certain, Sampling()) == epochs(decoder(False), certain, Sampling())
    assert made.drafts.drafted == 0
    looked = [number for number, rows in compared if rows]
    assert_seldom(looked)
    assert max(rows for _, rows in compared) == drafted.LOOK_AT
    chances = made.drafts.acceptance.chances(0.5)
    assert chances[16][0] != 0.75, "what was looked at counts"
