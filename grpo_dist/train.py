"""GRPO on one screen. What differs from the textbook:

1. The batch is global: every rank gathers all completions and rewards, so a group may span ranks and nothing that is
   learned depends on how many there are.
2. A prompt is computed once for its whole group, in the rollout and in the update.
3. Rollouts are drawn with the policy's own weights, adapters apart: nothing of an update is lost to rounding.
4. The old policy's log-probabilities are the detached current ones while the batch serves one update.

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train --config FILE
    python -m grpo_dist.train --config FILE                                                           # one process

`--num_processes` is the number of GPUs, over all machines.
"""

from __future__ import annotations

import sys
import time

from .algorithm.hashing import stream_key
from .algorithm.losses import policy_loss, value_loss
from .algorithm.ratios import rollout_weights
from .algorithm.schedule import learning_rate
from .algorithm.targets import needs_old_policy, next_kl_coeff, with_advantages
from .checkpoint.state import TrainState
from .monitoring.alarms import Metrics
from .monitoring.metrics import UpdateMetrics, pass_rates
from .trainer.collect import collect, with_reference
from .trainer.ending import main
from .trainer.evaluation import evaluate
from .trainer.packs import Minibatch, pack_minibatches, remaining_minibatches, tokens_of, with_old_policy
from .trainer.parts import Parts
from .trainer.record import is_due, record, write
from .trainer.saving import save_checkpoint, save_model
from .types import Batch


def train(parts: Parts, state: TrainState) -> None:
    """Train the policy and leave everything in train.output_dir. Raises Interrupted at safe points."""
    if state.is_start:
        write(parts, {"step": 0, **evaluate(parts, state, 0)})
    while state.step < parts.config.train.num_train_steps:
        train_step(parts, state)
    save_model(parts, state)


def train_step(parts: Parts, state: TrainState) -> Metrics:
    """One step, from prompts to a trained policy; returns its metrics."""
    config, start = parts.config, time.perf_counter()
    reward_weights = config.weights_at(state.step)
    batch = state.batch or collect(parts, state)  # prompts, completions, rewards: the same on every rank
    batch = with_reference(parts, batch)
    if not needs_old_policy(config):
        batch = with_advantages(config, batch, reward_weights, state.kl_coeff)
    minibatches = pack_minibatches(parts, batch)  # this rank's share of what teaches anything
    batch = with_old_policy(parts, batch, minibatches)
    if needs_old_policy(config):
        batch = with_advantages(config, batch, reward_weights, state.kl_coeff)
    with parts.phase("update"):
        for minibatch in remaining_minibatches(config, state, minibatches):
            metrics = update(parts, state, batch, minibatch)
            state.after_update(batch, metrics)  # a checkpoint may fall between any two
    with parts.phase("sync"):
        parts.engine.update_weights()
    step_metrics = record(parts, state, batch, time.perf_counter() - start)
    kl_coeff = next_kl_coeff(config.loss, state.kl_coeff, step_metrics["kl"])
    state.after_step(kl_coeff, pass_rates(batch, reward_weights))
    if is_due(config.train.save_every, state.step, config.train.num_train_steps):
        save_checkpoint(parts, state, may_fail=state.step < config.train.num_train_steps)
    return step_metrics


def update(parts: Parts, state: TrainState, batch: Batch, minibatch: Minibatch) -> dict[str, float]:
    """One optimizer step on a minibatch; returns its metrics."""
    config, loss_config = parts.config, parts.config.loss
    dropout_key = stream_key(config.train.seed, "dropout", state.step, state.updates)
    metrics = UpdateMetrics(parts.ranks.device)
    for number, each in enumerate(minibatch.packs, 1):
        is_last = number == len(minibatch.packs)
        parts.ranks.stop_if_any(parts.watch.requested)
        pack = each.to(parts.ranks.device)
        tokens = tokens_of(config, batch, minibatch, each, parts.ranks.device)
        with parts.ranks.no_sync(parts.wrapped, is_last):
            logprobs, entropies, values = parts.wrapped(pack, dropout_key)
            old = logprobs.detach() if tokens.old is None else tokens.old
            importance = rollout_weights(
                old, tokens.sampled, pack.sequence, loss_config.importance_correction, loss_config.importance_level,
                loss_config.importance_low, loss_config.importance_high,
            )  # fmt: skip
            loss = policy_loss(loss_config, state.kl_coeff, logprobs, entropies, old, tokens.reference,
                               tokens.advantages * importance, tokens.weights, pack.sequence)  # fmt: skip
            total, means = loss.total, {"entropy": entropies}
            if values is not None:
                assert tokens.values is not None and tokens.returns is not None, "a critic has an old policy"
                errors = value_loss(values, tokens.values, tokens.returns, tokens.weights, config.critic.clip)
                total = total + config.critic.loss_coeff * errors
                means |= {"value/mean": values, "value/error": (values - tokens.returns) ** 2}
            if loss_config.importance_correction != "none":
                means |= {"importance/mean": importance, "importance/masked": importance == 0}
            parts.ranks.backward(parts.wrapped, total, is_last)
        metrics.add(total, loss, old - tokens.sampled, pack.useful, len(pack.ids), means)
    rate = learning_rate(state.step, config.train.num_train_steps, config.optim)
    norm = parts.ranks.optimizer_step(parts.wrapped, parts.optimizer, rate)
    reduced = metrics.reduced(parts.ranks) | {"grad_norm": norm, "learning_rate": rate}
    parts.first_update.check(reduced)
    skipped = parts.bad_updates.is_skipped(state.step + 1, norm, batch)
    return reduced | {"update/skipped": float(skipped)}


if __name__ == "__main__":
    sys.exit(main(train))
