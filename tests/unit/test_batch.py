"""Batches put together from rounds of sampling, against loops over completions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_dist.algorithm.advantages import group_relative_advantages
from grpo_dist.monitoring.metrics import batch_metrics
from grpo_dist.types import Batch, Episode, Prompt, join, no_routes

pytestmark = pytest.mark.quick


def make_batch(first: int, sizes: list[int], has_token_rewards: bool, extras: dict[str, list[object]]) -> Batch:
    """A batch with a prompt for each of `sizes` completions; every number in it is its completion's or token's own."""
    group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    count = len(group)
    row_lengths = torch.tensor([2 + (first + n) % 3 for n in range(count)])
    ids = torch.arange(int(row_lengths.sum())) + 100 * first
    sampled = torch.ones(len(ids), dtype=torch.bool)
    sampled[torch.cumsum(row_lengths, 0)[::2] - 1 - first % 2] = False  # one of every other row
    tokens = ids[sampled]
    reward = torch.arange(count, dtype=torch.float64) + first
    prompts = [Prompt(first + g, [g] * (1 + g % 2), "") for g in range(len(sizes))]
    numbers = torch.arange(sum(len(prompt.ids) for prompt in prompts)) + first
    return Batch(
        prompts, group, row_lengths, reward % 2 == 0, ids,
        sampled, -tokens.float(), reward[:, None] * 2, reward, reference_logprobs=tokens.float() / 2,
        prompt_routes=torch.stack([numbers, -numbers], -1)[:, None], routes=torch.stack([ids, -ids], -1)[:, None],
        token_rewards=tokens[:, None].double() * 3 if has_token_rewards else None, extras=extras,
        scoring={"reward/a/failed": float(first), "reward/a/seconds": 0.5, "reward/a/size": float(first)}
        | ({"reward/a/once": 4.0} if has_token_rewards else {}),
    )  # fmt: skip


def test_joined_batches_equal_the_loop() -> None:
    one = make_batch(10, [2, 3, 1], has_token_rewards=False, extras={"a/note": list("abcdef")})
    two = make_batch(30, [1, 2], has_token_rewards=True, extras={"a/note": list("xyz"), "a/more": [1, 2, 3]})
    chosen = [(one, 2), (one, 0), (two, 1)]
    joined = join([one, two], [[2, 0], [1]])
    rows = [(batch, n) for batch, g in chosen for n in range(len(batch.lengths)) if int(batch.group[n]) == g]
    spans = [(batch, int(batch.starts[n]), int(batch.starts[n] + batch.lengths[n])) for batch, n in rows]
    assert joined.prompts == [batch.prompts[g] for batch, g in chosen]
    assert joined.group.tolist() == [0, 1, 1, 2, 2]
    for name in ("lengths", "row_lengths", "finished", "reward", "rewards"):
        assert torch.equal(getattr(joined, name), torch.stack([getattr(batch, name)[n] for batch, n in rows]))
    for name in ("tokens", "sampled_logprobs", "reference_logprobs"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(batch, name)[a:b] for batch, a, b in spans]))
    assert joined.routes[:, 0].tolist() == [[number, -number] for number in joined.ids.tolist()]  # type: ignore[index]
    numbers = [10 + 3, 10 + 0, 30 + 1, 30 + 2]  # of prompts with 1, 2, 1 tokens, and with 1 and 2
    assert joined.prompt_routes[:, 0].tolist() == [[n, -n] for n in numbers]  # type: ignore[index]
    assert (one.prompt_starts.tolist(), one.prompt_lengths.tolist()) == ([0, 1, 3], [1, 2, 1])
    table = [3.0 * t if batch is two else (float(batch.rewards[n, 0]) if place == b - 1 else math.nan)
             for (batch, n), (_, a, b) in zip(rows, spans, strict=True)
             for place, t in zip(range(a, b), batch.tokens[a:b].tolist(), strict=True)]  # fmt: skip
    expected = torch.tensor(table, dtype=torch.float64)[:, None]
    torch.testing.assert_close(joined.token_rewards, expected, rtol=0, atol=0, equal_nan=True)
    assert joined.extras == {"a/note": list("fabyz"), "a/more": [None, None, None, 2, 3]}
    assert joined.sequence.tolist() == [n for n, (_, a, b) in enumerate(spans) for _ in range(a, b)]
    rows_of_one = one.ids.split(one.row_lengths.tolist())
    assert [one.completion_ids(n) for n in range(6)] == [ids.tolist() for ids in rows_of_one]
    assert [joined.completion_ids(n) for n in range(5)] == [batch.completion_ids(n) for batch, n in rows]
    assert joined.tokens.tolist() == joined.ids[joined.sampled].tolist() != joined.ids.tolist()
    size = (6 * 10.0 + 3 * 30.0) / 9  # a round counts by its completions
    assert joined.scoring == {"reward/a/failed": 40.0, "reward/a/seconds": 1.0, "reward/a/size": size,
                              "reward/a/once": 4.0}  # fmt: skip


def test_a_completion_s_advantage_is_its_first_one() -> None:
    """Also where its first tokens are not trained."""
    batch = replace(make_batch(0, [2, 2], has_token_rewards=False, extras={}), sampled=torch.ones(11).bool())
    advantages = torch.tensor([0.0, 0.5, 0, 0, -1, -1, -1, 0, 0, 2, 0], dtype=torch.float64)
    assert batch.lengths.tolist() == [2, 3, 4, 2]
    assert replace(batch, advantages=advantages).first_advantages.tolist() == [0.5, -1, -1, 2]


def test_groups_without_signal_are_those_without_advantages() -> None:
    """The mean of large equal numbers is off by a rounding, which is far above that of small ones."""
    rewards = torch.tensor([1e5 + 0.1] * 3 + [1.0, 1.0, 1.5] + [0.1, math.nan, math.nan], dtype=torch.float64)
    batch = make_batch(0, [3, 3, 3], has_token_rewards=False, extras={})
    batch = replace(batch, reward=rewards, rewards=rewards[:, None], advantages=torch.zeros(len(batch.tokens)))
    assert batch_metrics(batch, ["a"])["reward/groups_zero_std"] == pytest.approx(2 / 3)
    assert group_relative_advantages(rewards, batch.group, "mean", "none")[[0, 6]].tolist() == [0, 0]


def test_of_nothing_scored_nothing_is_known() -> None:
    batch = make_batch(0, [2, 2], has_token_rewards=False, extras={})
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    batch = replace(batch, reward=nothing, rewards=nothing[:, None], advantages=torch.zeros(len(batch.tokens)))
    values = batch_metrics(batch, ["a"])
    assert all(math.isnan(values[f"reward/{name}"]) for name in ("mean", "std", "a/mean"))
    assert (values["reward/unscored"], values["reward/groups_zero_std"], values["advantage/abs_mean"]) == (1, 1, 0)


def test_joined_outcomes_have_no_table() -> None:
    batch = make_batch(0, [2, 2], has_token_rewards=False, extras={})
    joined = join([batch], [[0, 1]])
    assert joined.token_rewards is None and joined.reference_logprobs is not None
    assert torch.equal(joined.tokens, batch.tokens) and joined.prompts == batch.prompts


def test_what_was_not_recorded() -> None:
    """No expert has the number that stands for none; a tool that was never called took no time."""
    nothing = no_routes(2, torch.zeros(4, 5, 3, dtype=torch.uint8))
    assert nothing.dtype == torch.uint8 and nothing.tolist() == [[[255] * 3] * 5] * 2
    assert Episode([], 1, None, None, {}, Prompt(0, [1], "")).tool_seconds == 0
