"""The metrics of an update against loops over its tokens, however many packs and ranks have shares of them."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from grpo_dist.algorithm.losses import Loss
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.packing import Pack
from grpo_dist.monitoring.lot import by_lot
from grpo_dist.monitoring.traces import traced_tokens, with_trace
from grpo_dist.trainer.update_metrics import NO_UPDATE, UpdateMetrics, update_metrics
from grpo_dist.types import Batch, Prompt

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


class Joined:
    """Ranks of which the others have handed in `kept`, tensor by tensor; keeps what this one hands in."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept, self.handed = kept, list[Tensor]()

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """This rank's tensor joined with the others'."""
        self.handed.append(tensor)
        if not self.kept:
            return tensor
        other = self.kept.pop(0)
        return tensor + other if operation == "sum" else torch.maximum(tensor, other)


def make_batch() -> Batch:
    """Twelve tokens of three prompts, of which the middle one is traced."""
    first, *others = by_lot([40, 41, 42])
    zeros = torch.zeros(6, dtype=torch.float64)
    return with_trace(Batch(
        [Prompt(index, [1], "") for index in (others[0], first, others[1])], torch.arange(6) // 2, torch.full((6,), 2),
        zeros == 0, torch.arange(12), torch.ones(12, dtype=torch.bool), torch.zeros(12), zeros[:, None], zeros,
    ))  # fmt: skip


def make_pack(token: list[int], filler: int) -> Pack:
    """Of the tokens at these places of the batch, and others beside them."""
    nothing, place, length = torch.tensor([]), torch.tensor(token, dtype=torch.int64), len(token) + filler
    return Pack(torch.zeros(length), nothing, nothing, nothing, place, nothing, nothing, None,
                useful=length if token else 0)  # fmt: skip


def make_loss(token: list[int], has_importance: bool) -> tuple[Loss, Tensor]:
    """Numbers that tell the batch's tokens apart, and entropies."""
    place = torch.tensor(token, dtype=torch.float32)
    loss = Loss(
        total=place.sum() / 7, policy=place.sum() / 5, kl=place / 11, ratio=1 + place / 13,
        clipped_low=place % 3 == 0, clipped_high=place % 4 == 1, gap=(place - 7) / 10,
        importance=(place % 5) / 3 if has_importance else None,
    )  # fmt: skip
    return loss, place / 17


@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize(
    ("shares", "filler"),
    [([[list(range(12))]], 2), ([[[8, 9, 10], [0, 1]], [[11, 2, 3, 4, 5, 6, 7], []]], 2), ([[[5]]], 0), ([[[]]], 2)],
)
def test_the_metrics_equal_the_loop(shares: list[list[list[int]]], filler: int, has_importance: bool) -> None:
    batch, handed = make_batch(), list[Tensor]()
    named: dict[str, float] = {}
    for packs in shares:
        metrics, ranks = UpdateMetrics(batch, CPU), Joined(handed)
        for token in packs:
            loss, entropy = make_loss(token, has_importance)
            metrics.add(loss.total, loss, make_pack(token, filler), {"entropy": entropy})
        named, handed = metrics.reduced(cast(Ranks, ranks)), ranks.handed
    tokens = [t for packs in shares for token in packs for t in token]
    gaps, count = [(t - 7) / 10 for t in tokens], max(len(tokens), 1)
    lengths = [len(token) + filler for packs in shares for token in packs]
    useful = sum(len(token) + filler for packs in shares for token in packs if token)
    expected: dict[str, Any] = {
        "loss": sum(tokens) / 7, "loss/policy": sum(tokens) / 5, "tokens/computed": sum(lengths),
        "tokens/useful_share": useful / sum(lengths),
        "kl": sum(tokens) / 11 / count, "entropy": sum(tokens) / 17 / count,
        "ratio/mean": sum(1 + t / 13 for t in tokens) / count,
        "ratio/max": max((1 + t / 13 for t in tokens), default=0),
        "clip/low": len([t for t in tokens if t % 3 == 0]) / count,
        "clip/high": len([t for t in tokens if t % 4 == 1]) / count,
        "rollout/kl": sum(math.exp(gap) - 1 - gap for gap in gaps) / count,
        "rollout/logprob_gap_max": max(map(abs, gaps), default=0),
    }  # fmt: skip
    if has_importance:
        expected |= {"importance/mean": sum(t % 5 for t in tokens) / 3 / count,
                     "importance/masked": len([t for t in tokens if t % 5 == 0]) / count}  # fmt: skip
    assert named == pytest.approx(expected, rel=1e-5)


def test_a_trace_keeps_what_the_first_pass_over_a_token_computed() -> None:
    batch = make_batch()
    traced = list(traced_tokens(batch))
    others = [t for t in range(12) if t not in traced]
    assert len(traced) == 4 and others[0] < traced[0] and traced[-1] < others[-1]
    for token, factor in (([traced[0], *others, traced[3]], 1), (traced[1:], -1)):
        loss, entropy = make_loss(token, False)
        metrics = UpdateMetrics(batch, CPU)
        metrics.add(loss.total, loss, make_pack(token, 0), {"entropy": factor * entropy})
        before = None if batch.trace is None else batch.trace.isnan().all(1).tolist()
        metrics.reduced(cast(Ranks, Joined([])))
        assert before == ([True] * 4 if factor == 1 else [False, True, True, False])
    expected = [[(t - 7) / 10, factor * t / 17] for t, factor in zip(traced, (1, -1, -1, 1), strict=True)]
    assert batch.trace is not None
    torch.testing.assert_close(batch.trace, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_a_step_has_its_last_updates_metrics_but_for_the_rollout() -> None:
    updates = [{"loss": 1.0, "rollout/logprob_gap_max": gap, "rollout/kl": kl, "rollout/router_agreement": kl}
               for gap, kl in ((0.1, 0.2), (0.5, 0.6), (0.3, 0.4))]  # fmt: skip
    updates[-1]["loss"] = 3.0
    assert update_metrics(updates) == {"loss": 3.0, "rollout/logprob_gap_max": 0.5, "rollout/kl": 0.2,
                                       "rollout/router_agreement": 0.2}  # fmt: skip
    assert update_metrics([]) is NO_UPDATE
    assert {value for value in NO_UPDATE.values() if value is not None} == {0.0} and NO_UPDATE["kl"] is None
