"""GRPO on one screen. What differs from the textbook:

1. The batch is global: every rank gathers all completions and rewards. So a group may span ranks, and the result does
   not depend on the number of ranks.
2. A prompt is computed once for its group, in the rollout and in the update.
3. Rollouts use the policy's own weights with unmerged adapters, so that rounding cannot lose a small update.
4. If a batch is used for only one update, the old policy's log-probabilities are the detached current ones.

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train --config FILE
    python -m grpo_dist.train --config FILE                                                           # one process

`--num_processes` is the number of GPUs, over all machines.
"""

from __future__ import annotations

import time

from .distributed import process
from .preflight.early import refuse_mistakes

if __name__ == "__main__":
    process.begin()
    # before the imports of torch, so that the answer to a mistake comes at once
    refuse_mistakes()

from .algorithm.hashing import stream_key
from .algorithm.losses import policy_loss, value_loss
from .algorithm.schedule import learning_rate
from .algorithm.targets import needs_old_policy, next_kl_coeff, with_advantages
from .checkpoint.state import TrainState
from .monitoring.metrics import pass_rates
from .monitoring.traces import with_trace
from .trainer.ahead import drawn_ahead
from .trainer.collect import collect, with_reference
from .trainer.ending import main
from .trainer.evaluation import evaluate
from .trainer.packs import Minibatch, on_device, pack_minibatches, remaining_minibatches, with_old_policy
from .trainer.parts import Parts
from .trainer.profile import profiled
from .trainer.record import is_due, record, write
from .trainer.saving import save_checkpoint, save_model
from .trainer.update_metrics import UpdateMetrics
from .types import Batch, Metrics


def train(parts: Parts, state: TrainState) -> None:
    """Train the policy and leave everything in train.output_dir. Raises Interrupted at safe points."""
    if state.is_start:
        write(parts, {"step": 0, **evaluate(parts, state, 0), **parts.phase.metrics()})
    while state.step < parts.config.train.num_train_steps:
        with profiled(parts, state.step + 1):
            train_step(parts, state)
    save_model(parts, state)


def train_step(parts: Parts, state: TrainState) -> Metrics:
    """One step, from prompts to a trained policy; returns the step's metrics."""
    config, start = parts.config, time.perf_counter()
    reward_weights = config.weights_at(state.step)
    # prompts, completions, rewards, the same on every rank; kept where the run was stopped, or where it was drawn ahead
    batch = state.batch or collect(parts, state, state.step)
    with drawn_ahead(parts, state):  # with rollout.lag 1, the next step's batch by the policy before this update
        batch = with_trace(with_reference(parts, batch))
        if not needs_old_policy(config):
            batch = with_advantages(config, batch, reward_weights, state.kl_coeff)
        minibatches = pack_minibatches(parts, batch)  # this rank's share of the completions that have a gradient
        batch = with_old_policy(parts, batch, minibatches)  # the same batch where nothing needs the old policy
        if needs_old_policy(config):  # for values, a KL term in the reward, or entropies of the batch
            batch = with_advantages(config, batch, reward_weights, state.kl_coeff)
        with parts.phase("update"):
            for minibatch in remaining_minibatches(config, state, minibatches):
                metrics = update(parts, state, batch, minibatch)
                state.after_update(batch, metrics)  # a stop after this saves, and the next run goes on from here
    with parts.phase("sync"):
        parts.engine.update_weights(parts.watch.check)
    step_metrics = record(parts, state, batch, time.perf_counter() - start)
    kl_coeff = next_kl_coeff(config.loss, state.kl_coeff, step_metrics["kl"])
    state.after_step(kl_coeff, pass_rates(batch, reward_weights))
    if is_due(config.train.save_every, state.step, config.train.num_train_steps):
        save_checkpoint(parts, state, may_fail=state.step < config.train.num_train_steps)
    return step_metrics


def update(parts: Parts, state: TrainState, batch: Batch, minibatch: Minibatch) -> dict[str, float]:
    """One optimizer step on a minibatch; returns its metrics."""
    config = parts.config
    dropout_key = stream_key(config.train.seed, "dropout", state.step, state.updates)
    metrics = UpdateMetrics(batch, parts.ranks.device)
    for number, cpu_pack in enumerate(minibatch.packs, 1):
        is_last = number == len(minibatch.packs)
        parts.ranks.stop_if_any(parts.watch.requested)
        pack, tokens = on_device(config, batch, minibatch, cpu_pack, parts.ranks.device)
        with parts.ranks.no_sync(parts.wrapped, unless=is_last):
            logprobs, entropies, values = parts.wrapped(pack, dropout_key)
            loss = policy_loss(config.loss, state.kl_coeff, logprobs, entropies, tokens)
            total, means = loss.total, {"entropy": entropies, **parts.policy.router_agreement(pack)}
            if values is not None:
                critic_loss, errors = value_loss(values, tokens, config.critic.clip)
                total = total + config.critic.loss_coeff * critic_loss
                means |= {"value/mean": values, "value/error": errors}
            parts.ranks.backward(parts.wrapped, total, is_last)
        metrics.add(total, loss, cpu_pack, means)
    rate = learning_rate(state.step, config.train.num_train_steps, config.optim)
    norm = parts.ranks.optimizer_step(parts.wrapped, parts.optimizer, rate)
    reduced = metrics.reduced(parts.ranks) | {"grad_norm": norm, "learning_rate": rate}
    parts.first_update.check(reduced)
    # the optimizer took no step where the norm is not finite
    skipped = parts.bad_updates.is_skipped(state.step + 1, norm, batch)
    return reduced | {"update/skipped": float(skipped)}


if __name__ == "__main__":
    process.run_to_the_end(lambda: main(train))
