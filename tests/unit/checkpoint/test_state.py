"""What a checkpoint holds of a step that is under way, and of what older versions wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_dist.checkpoint.state import TrainState
from grpo_dist.data.order import Sampler
from grpo_dist.types import Batch, OldPolicy, Prompt

pytestmark = pytest.mark.quick

PROMPTS = [Prompt(n, [n, n + 1], f"prompt {n}") for n in range(6)]
IDS = torch.tensor([5, 6, 7, 8, 9, 10])


def make_state(sampled: torch.Tensor) -> TrainState:
    """A step of which one update was made: two prompts with a completion each, of two and four tokens."""
    logprobs = -torch.arange(int(sampled.sum())).float()
    rewards = torch.tensor([[1.0, 2.0], [float("nan"), 0.5]], dtype=torch.float64)
    batch = Batch(
        [PROMPTS[4], PROMPTS[1]], torch.tensor([0, 1]), torch.tensor([2, 4]), torch.tensor([True, False]), IDS, sampled,
        logprobs, rewards, rewards.nansum(1), scoring={"reward/a/seconds": 0.5}, extras={"a/note": ["x", None]},
        old=OldPolicy(logprobs - 1, logprobs + 2),
    )  # fmt: skip
    state = TrainState(3, 0.04, Sampler(len(PROMPTS), 2, seed=0))
    state.after_update(batch, {"loss": 1.5})
    return state


def restored(tensors: dict[str, torch.Tensor], state: TrainState) -> TrainState:
    """The state as another process takes it up."""
    fresh = TrainState(0, 0.0, Sampler(len(PROMPTS), 2, seed=0))
    fresh.restore(tensors, {**state.meta(), "step": state.step}, PROMPTS)
    return fresh


@pytest.mark.parametrize("sampled", [[True] * 6, [True, False, True, False, False, True]])
def test_a_batch_under_way_is_restored(sampled: list[bool]) -> None:
    state = make_state(torch.tensor(sampled))
    again = restored(state.tensors(), state)
    assert (again.step, again.updates, again.kl_coeff, again.metrics) == (3, 1, 0.04, [{"loss": 1.5}])
    assert again.batch is not None and state.batch is not None
    assert again.batch.prompts == state.batch.prompts
    assert (again.batch.scoring, again.batch.extras) == (state.batch.scoring, state.batch.extras)
    assert again.meta() == state.meta()
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert again.batch.tokens.tolist() == [token for token, mine in zip(IDS.tolist(), sampled, strict=True) if mine]
    assert again.batch.lengths.tolist() == [sum(sampled[:2]), sum(sampled[2:])]


def test_a_step_ends_with_the_batch_of_the_next() -> None:
    state = make_state(torch.ones(6, dtype=torch.bool))
    drawn_ahead = state.batch
    state.ahead = drawn_ahead
    state.after_step(0.05, [0.5, 0.5])
    assert (state.step, state.kl_coeff, state.updates, state.metrics) == (4, 0.05, 0, [])
    assert state.batch is drawn_ahead and state.ahead is None and not state.is_start
    state.after_step(0.06, [0.5, 0.5])
    assert (state.step, state.kl_coeff) == (5, 0.06) and state.batch is None


def test_a_checkpoint_from_before_tokens_were_told_apart() -> None:
    """Older versions kept the completions' tokens and lengths alone."""
    state = make_state(torch.ones(6, dtype=torch.bool))
    older = state.tensors()
    older["batch/tokens"], older["batch/lengths"] = older.pop("batch/ids"), older.pop("batch/row_lengths")
    for name in ("sampled", "prompt_ids", "prompt_lengths"):
        del older[f"batch/{name}"]
    again = restored(older, state)
    assert again.tensors().keys() == state.tensors().keys()
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_batch_drawn_ahead_is_restored_and_becomes_the_current_one() -> None:
    state = make_state(torch.ones(6, dtype=torch.bool))
    assert state.batch is not None
    state.ahead = replace(state.batch, prompts=[PROMPTS[2], PROMPTS[0]], ids=IDS + 20, scoring={}, old=None)
    again = restored(state.tensors(), state)
    assert again.ahead is not None and again.ahead.old is None and again.batch is not None and again.batch.old
    assert again.ahead.prompts == [PROMPTS[2], PROMPTS[0]] and again.batch.prompts == [PROMPTS[4], PROMPTS[1]]
    for each in (state, again):
        each.after_step(0.04, [0.0, 1.0])
        assert each.ahead is None and each.batch is not None and each.updates == 0 and each.metrics == []
        assert each.batch.ids.tolist() == (IDS + 20).tolist()
    once_more = restored(again.tensors(), again)  # no update has used it, and it is kept all the same
    assert once_more.meta() == state.meta() and once_more.tensors().keys() == state.tensors().keys()


def test_a_prompt_is_restored_with_what_its_environment_said() -> None:
    state = make_state(torch.ones(6, dtype=torch.bool))
    assert state.batch is not None
    played = replace(PROMPTS[4], ids=[4, 5, 90, 91], text="prompt 4, you see a door")
    state.batch = replace(state.batch, prompts=[played, PROMPTS[1]])
    again = restored(state.tensors(), state)
    assert again.batch is not None and again.batch.prompts == [played, PROMPTS[1]]


def test_a_step_that_begins_anew_is_no_start() -> None:
    """Records and the evaluation of step 0 are of the model before the updates that it made."""
    state = make_state(torch.ones(6, dtype=torch.bool))
    state.step = 0
    again = restored(state.tensors(), state)
    again.begin_step_anew()
    assert (again.step, again.updates, again.metrics, again.batch, again.ahead) == (0, 0, [], None, None)
    assert not again.is_start and TrainState(0, 0.0, Sampler(1, 1, seed=0)).is_start
