"""This rank's packs of a batch, and what its tokens are to be pushed towards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm.losses import token_weights
from ..algorithm.targets import Targets, computed, included, minibatch_of, needs_measuring, reference_in_loss
from ..model.packing import Pack, make_pack, plan
from ..model.reference import REFERENCE_PACK
from ..types import Batch, Measured
from .build import Run


@dataclass
class Work:
    """One pack and the numbers of its M tokens; tensors (M,) on the device."""

    pack: Pack
    weights: Tensor
    sampled: Tensor
    """Log-probabilities under the rollout engine."""
    old: Tensor | None = None
    """Log-probabilities under the policy that opened the batch; None where they are the current ones, detached."""
    reference: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    values: Tensor | None = None
    """The critic's values that opened the batch."""


def pack_batch(run: Run, batch: Batch, step: int) -> list[list[Work]]:
    """This rank's packs of each minibatch of the global batch that has any, equal in number on all ranks.

    Completions of which nothing would come are left out; the weights of the others are those of their whole minibatch
    all the same.
    """
    config = run.config.at(step)
    counted, needed = included(config, batch), computed(config, batch)
    number = minibatch_of(batch, config.train.num_minibatches)
    minibatches = [_pack(run, batch, counted & (number == m), needed & (number == m))
                   for m in range(config.train.num_minibatches)]  # fmt: skip
    return [work for work in minibatches if work]


def _pack(run: Run, batch: Batch, counted: Tensor, needed: Tensor) -> list[Work]:
    config, device = run.config, run.ranks.device
    assert config.loss.aggregation != "auto", "settled when the config was made"
    weights = token_weights(batch.lengths, config.loss.aggregation, group=batch.group, included=counted,
                            longest=config.rollout.max_completion_length)  # fmt: skip
    return [Work(pack.to(device), weights[pack.token].to(device), batch.sampled_logprobs[pack.token].to(device))
            for pack in _own_packs(run, batch, needed, config.train.max_tokens_per_pack)]  # fmt: skip


def _own_packs(run: Run, batch: Batch, needed: Tensor, max_tokens: int) -> Iterator[Pack]:
    """This rank's packs of the `needed` (N,) completions, on the CPU, as many as every other rank's."""
    plans = plan(
        [len(prompt.ids) for prompt in batch.prompts], batch.group.tolist(), batch.lengths.tolist(), needed.tolist(),
        max_tokens=max_tokens, num_ranks=run.ranks.num_ranks, share_prompts=run.share_prompts,
    )  # fmt: skip
    for pieces in plans[run.ranks.rank]:
        yield make_pack(batch, pieces, share_prompts=run.share_prompts)


def reference_logprobs(run: Run, batch: Batch) -> Tensor:
    """Log-probability of each of the batch's tokens under the reference, (T,) on the CPU; a collective.

    It has packs of its own: without a backward pass a larger one fits, and no reward has to be known.
    """
    assert run.reference is not None, "asked only where the loss or the reward depends on it"
    factor = REFERENCE_PACK if run.reference.policy.fused_head else 1  # without it, whole logits are held
    everything = torch.ones(len(batch.lengths), dtype=torch.bool)
    flat = torch.zeros(len(batch.tokens), device=run.ranks.device)
    for pack in _own_packs(run, batch, everything, factor * run.config.train.max_tokens_per_pack):
        run.ranks.agree(run.watch.requested)
        pack = pack.to(run.ranks.device)
        flat[pack.token] = run.reference.logprobs(pack)
    return run.ranks.reduce(flat, "sum")


def measure(run: Run, minibatches: list[list[Work]], batch: Batch) -> Measured | None:
    """Compute what is needed before the first update of a batch, into the work; a collective.

    Returns what the policy that opens the batch makes of the whole of it where anything depends on that: it is what a
    checkpoint between two updates has to hold. What a position already holds is not computed again.
    """
    config, works = run.config, [each for part in minibatches for each in part]
    several = config.train.updates_per_batch * config.train.num_minibatches > 1
    measured = run.position.measured
    if measured is None and (several or needs_measuring(config)):
        measured = _opening(run, works, batch)
    for each in works:
        run.ranks.agree(run.watch.requested)
        places = each.pack.token.cpu()
        if several:  # with one update the old policy is the current one, and its ratio 1 whatever this pass rounds
            assert measured is not None
            each.old = measured.logprobs[places].to(run.ranks.device)
        if measured is not None and measured.values is not None:
            each.values = measured.values[places].to(run.ranks.device)
        if reference_in_loss(config):
            assert batch.reference_logprobs is not None, "gathered with the batch"
            each.reference = batch.reference_logprobs[places].to(run.ranks.device)
    return measured


@torch.no_grad()
def _opening(run: Run, works: list[Work], batch: Batch) -> Measured:
    names = ["logprobs", "entropies"] + ["values"] * (run.config.advantage.baseline == "critic")
    flat = {name: torch.zeros(len(batch.tokens)) for name in names}
    run.policy.eval()  # the rollout had no dropout either
    for each in works:
        run.ranks.agree(run.watch.requested)
        places = each.pack.token.cpu()
        for name, numbers in zip(names, run.wrapped(each.pack), strict=False):
            flat[name][places] = numbers.cpu()
    run.policy.train()
    return Measured(**{name: run.ranks.reduce(numbers, "sum") for name, numbers in flat.items()})


def aim(minibatches: list[list[Work]], targets: Targets) -> None:
    """Put the targets into the work."""
    for each in (each for part in minibatches for each in part):
        device, places = each.weights.device, each.pack.token.cpu()
        each.advantages = targets.advantages[places].float().to(device)
        each.returns = None if targets.returns is None else targets.returns[places].float().to(device)
