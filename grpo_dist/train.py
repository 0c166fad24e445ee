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

from torch import Tensor

from .algorithm.losses import policy_loss, value_loss
from .algorithm.ratios import rollout_weights
from .algorithm.targets import next_kl_coeff, objective_of, penalty_metrics, targets_of
from .checkpoint.state import Position
from .monitoring.metrics import UpdateMetrics, batch_metrics, pass_rates, update_metrics
from .trainer.batches import batch_of
from .trainer.build import Run
from .trainer.ending import main
from .trainer.evaluation import evaluate
from .trainer.work import Work, aim, measure, pack_batch
from .types import Batch


def train(run: Run) -> None:
    """Train the run's policy and leave everything in train.output_dir. Raises Interrupted at safe points."""
    config = run.config
    if run.position.is_start:
        run.write({"step": 0, **evaluate(run, 0)})
    for step in run.steps():
        start, position = time.perf_counter(), run.position
        batch, facts = batch_of(run, step)
        minibatches = pack_batch(run, batch, step)
        with run.phase("reference"):
            measured = measure(run, minibatches, batch)
        targets = targets_of(config.at(step), batch, measured, position.kl_coeff)
        aim(minibatches, targets)
        with run.phase("update"):
            while minibatches and position.updates < config.train.updates_per_batch * len(minibatches):
                found = update(run, minibatches[position.updates % len(minibatches)], step)
                run.first_update.check(found)
                skipped = run.bad_updates.judge(step + 1, found["grad_norm"], batch, targets.advantages)
                position.add(batch, measured, facts, found | {"update/skipped": float(skipped)})
        with run.phase("sync"):
            run.rollout_model.sync()
        metrics = batch_metrics(batch, targets.advantages, run.reward_names) | facts | update_metrics(position.metrics)
        metrics |= penalty_metrics(config, batch, measured)
        record(run, step, batch, targets.advantages, metrics, time.perf_counter() - start)
    run.save_final()


def update(run: Run, work: list[Work], step: int) -> dict[str, float]:
    """One optimizer step on a minibatch; returns its metrics."""
    config, loss_config = run.config, run.config.loss
    objective = objective_of(loss_config, run.position.kl_coeff)
    dropout_key = run.dropout_key(step)
    measured = UpdateMetrics(run.ranks.device)
    for number, each in enumerate(work, 1):
        assert each.advantages is not None, "`aim` comes first"
        last = number == len(work)
        run.ranks.agree(run.watch.requested)
        with run.ranks.quiet(run.wrapped, last):
            logprobs, entropies, values = run.wrapped(each.pack, dropout_key)
            old = logprobs.detach() if each.old is None else each.old
            trust = rollout_weights(
                old, each.sampled, each.pack.sequence, loss_config.importance_correction, loss_config.importance_level,
                loss_config.importance_low, loss_config.importance_high,
            )  # fmt: skip
            loss = policy_loss(objective, logprobs, entropies, old, each.reference, each.advantages * trust,
                               each.weights, each.pack.sequence)  # fmt: skip
            total, means = loss.total, {"entropy": entropies}
            if values is not None:
                assert each.values is not None and each.returns is not None, "`measure` and `aim` come first"
                errors = value_loss(values, each.values, each.returns, each.weights, config.critic.clip)
                total = total + config.critic.loss_coeff * errors
                means |= {"value/mean": values, "value/error": (values - each.returns) ** 2}
            if loss_config.importance_correction != "none":
                means |= {"importance/mean": trust, "importance/masked": trust == 0}
            run.ranks.backward(run.wrapped, total, last)
        measured.add(total, loss, old - each.sampled, each.pack.useful, len(each.pack.ids), means)
    learning_rate = run.learning_rate(step)
    norm = run.ranks.optimizer_step(run.wrapped, run.optimizer, learning_rate)
    return measured.reduced(run.ranks) | {"grad_norm": norm, "learning_rate": learning_rate}


def record(
    run: Run, step: int, batch: Batch, advantages: Tensor, metrics: dict[str, float | None], seconds: float
) -> None:
    """Write the step down; evaluate and save where they are due."""
    done, config = step + 1, run.config.train
    metrics = {"step": done, "epoch": run.sampler.epoch(done), **metrics}
    metrics |= run.clock.seconds | {"time/step": seconds} | run.memory.metrics()
    rollout_seconds, tokens = metrics.get("time/rollout"), metrics["tokens/completion"]
    if rollout_seconds is not None and tokens is not None:  # not where the batch came from a checkpoint
        metrics["rollout/tokens_per_second"] = tokens / rollout_seconds
    kl_coeff = next_kl_coeff(run.config.loss, run.position.kl_coeff, metrics)
    run.clock.seconds = {}
    last = done == config.num_train_steps
    if last or (config.eval_every and done % config.eval_every == 0):
        metrics |= evaluate(run, done)
    run.write(metrics, batch, advantages)
    run.display.step(metrics)
    run.sampler.record(pass_rates(batch, run.config.weights_at(step)))
    run.position = Position(done, kl_coeff)
    if last or (config.save_every and done % config.save_every == 0):
        run.save(may_fail=not last)


if __name__ == "__main__":
    sys.exit(main(train))
