"""This rank's packs of a batch, and the log-probabilities that are computed before the first update of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algorithm.losses import PackTokens, token_weights
from ..algorithm.targets import computed, included, minibatch_of, needs_old_policy
from ..checkpoint.state import TrainState
from ..config.algorithm import reference_in_loss, serves_several_updates
from ..config.schema import Config
from ..model.packing import Pack, computed_lengths, make_pack, plan
from ..model.reference import REFERENCE_PACK
from ..model.split_rows import split_pack
from ..types import Batch, OldPolicy
from .parts import Parts


@dataclass(frozen=True)
class Minibatch:
    """This rank's packs of what shares an optimizer step, as many as every other rank's."""

    packs: list[Pack]
    """On the CPU."""
    weights: Tensor
    """(T,) float32: weight of each of the batch's tokens in the loss."""


def pack_minibatches(parts: Parts, batch: Batch) -> list[Minibatch]:
    """Each minibatch of the global batch that has any packs.

    Completions of which nothing would come are left out; the weights of the others are those of all of their minibatch
    all the same.
    """
    config = parts.config
    counted, needed = included(config, batch), computed(config, batch)
    number = minibatch_of(batch, config.train.num_minibatches)
    minibatches = []
    for m in range(config.train.num_minibatches):
        packs = list(_own_packs(parts, batch, needed & (number == m), config.train.max_tokens_per_pack))
        assert config.loss.aggregation != "auto", "settled when the config was made"
        weights = token_weights(batch.lengths, config.loss.aggregation, group=batch.group,
                                included=counted & (number == m),
                                longest=config.rollout.max_completion_length)  # fmt: skip
        minibatches.append(Minibatch(packs, weights))
    return [each for each in minibatches if each.packs]


def remaining_minibatches(config: Config, state: TrainState, minibatches: list[Minibatch]) -> Iterator[Minibatch]:
    """The minibatches that are left of the step: all, unless it was stopped between two of its updates."""
    for number in range(state.updates, config.train.updates_per_batch * len(minibatches)):
        yield minibatches[number % len(minibatches)]


def on_device(
    config: Config, batch: Batch, minibatch: Minibatch, pack: Pack, device: torch.device
) -> tuple[Pack, PackTokens]:
    """One pack of `minibatch` and what the loss needs of its tokens, from a batch that has advantages, on `device`. To
    a GPU both go in one copy, for which the host does not wait."""
    assert batch.advantages is not None
    old = batch.old
    values: dict[str, Tensor | None] = {
        "weights": minibatch.weights, "rollout": batch.sampled_logprobs, "advantages": batch.advantages,
        "old": old.logprobs if old is not None and serves_several_updates(config) else None,
        "reference": batch.reference_logprobs if reference_in_loss(config) else None,
        "values": None if old is None else old.values, "returns": batch.returns,
    }  # fmt: skip
    present = {name: value[pack.token].float() for name, value in values.items() if value is not None}
    pack, moved = pack.to_with(list(present.values()), device)
    there = dict(zip(present, moved, strict=True))
    return pack, PackTokens(pack.sequence, **{name: there.get(name) for name in values})  # type: ignore[arg-type]


def reference_logprobs(parts: Parts, batch: Batch) -> Tensor:
    """Log-probability of each sampled token under the reference, (T,) on the CPU; a collective.

    It has packs of its own: without a backward pass a larger one fits, and no reward has to be known.
    """
    assert parts.reference is not None, "asked only where the loss or the reward depends on it"
    factor = REFERENCE_PACK if parts.reference.policy.fused_head else 1  # without it, logits are not cut into chunks
    everything = torch.ones(len(batch.lengths), dtype=torch.bool)
    flat = torch.zeros(len(batch.tokens), device=parts.ranks.device)
    for pack in _own_packs(parts, batch, everything, factor * parts.config.train.max_tokens_per_pack):
        parts.ranks.stop_if_any(parts.watch.requested)
        pack = pack.to(parts.ranks.device)
        flat[pack.token] = parts.reference.logprobs(pack)
    return parts.ranks.reduce(flat, "sum")


@torch.no_grad()
def with_old_policy(parts: Parts, batch: Batch, minibatches: list[Minibatch]) -> Batch:
    """The batch with what the policy computes for it before its first update, where anything depends on that and it is
    not there yet; a collective."""
    config = parts.config
    if batch.old is not None or not (serves_several_updates(config) or needs_old_policy(config)):
        return batch
    names = ["logprobs", "entropies"] + ["values"] * config.has_critic
    with parts.phase("reference"):
        flat = {name: torch.zeros(len(batch.tokens), device=parts.ranks.device) for name in names}
        parts.policy.eval()  # the rollout had no dropout either
        for pack in (pack for each in minibatches for pack in each.packs):
            parts.ranks.stop_if_any(parts.watch.requested)
            pack = pack.to(parts.ranks.device)
            for name, numbers in zip(names, parts.wrapped(pack), strict=False):
                flat[name][pack.token] = numbers
        parts.policy.train()
        old = OldPolicy(**{name: parts.ranks.reduce(numbers, "sum") for name, numbers in flat.items()})
    return replace(batch, old=old)


def _own_packs(parts: Parts, batch: Batch, needed: Tensor, max_tokens: int) -> Iterator[Pack]:
    """This rank's packs of the `needed` (N,) completions, on the CPU, as many as every other rank's. With sequence
    parallelism, its tokens of the packs that its group of ranks shares."""
    group = parts.ranks.row_group
    prompts, lengths = [len(prompt.ids) for prompt in batch.prompts], computed_lengths(batch.row_lengths)
    plans = plan(
        prompts, batch.group.tolist(), lengths.tolist(), needed.tolist(), max_tokens=max_tokens,
        num_ranks=parts.ranks.num_ranks // group.size, share_prompts=parts.share_prompts,
    )  # fmt: skip
    for pieces in plans[group.number]:
        pack = make_pack(batch, pieces, share_prompts=parts.share_prompts)
        yield pack if group.size == 1 else split_pack(pack, group)
