"""GRPO on one screen. What differs from the textbook:

1. The batch is global: every rank gathers all completions and rewards, so a group may span ranks and nothing that is
   learned depends on how many there are.
2. A prompt is computed once for its whole group, in the rollout and in the update.
3. Rollouts run on the frozen copy of the base model, into which the policy's adapters are merged after each step.
4. The old policy's log-probabilities are the detached current ones while the batch serves one update.

    accelerate launch --config_file accelerate_configs/zero2.yaml -m grpo_dist.train --config configs/quickstart.yaml
    python -m grpo_dist.train --config configs/quickstart.yaml                                        # one process
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .advantages import group_relative_advantages
from .batch import Batch, Completion, Prompt
from .ending import main
from .evaluation import evaluate
from .gathering import gather
from .losses import policy_loss, token_weights
from .metrics import NO_UPDATE, UpdateMetrics, batch_metrics, pass_rates, peak_memory_gib
from .packing import Pack, make_pack, plan
from .rewards.pool import Pending
from .run import Position, Run

GAP = "rollout/logprob_gap_max"


@dataclass
class Work:
    """One pack and what its M tokens are to be pushed towards; tensors (M,) on the device."""

    pack: Pack
    advantages: Tensor
    weights: Tensor
    sampled: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


def train(run: Run) -> None:
    """Train the run's policy and leave everything in train.output_dir. Raises Interrupted at safe points."""
    config = run.config
    if run.position == Position(0):
        run.write({"step": 0} | evaluate(run, 0))
    for step in run.steps():
        start = time.perf_counter()
        prompts = run.prompts_of(step)
        batch = run.position.batch  # there already where the run was stopped between two updates
        if batch is None:
            with run.phase("rollout"):
                size = config.rollout.group_size
                completions, pending = run.generate(prompts, size, run.sampling, f"train/{step}", step)
            with run.phase("reward"):
                batch = score(run, prompts, completions, pending, step)
        advantages = advantages_of(run, batch)
        work = pack(run, batch, advantages)
        with run.phase("reference"):
            for each in work:
                run.ranks.agree(run.watch.requested)
                each.reference = run.reference.logprobs(each.pack) if config.loss.kl_coeff else None
        with run.phase("update"):
            open_batch(run, work, batch)
            while work and run.position.updates < config.train.updates_per_batch:
                measured = update(run, work, step)
                skipped = run.bad_updates.judge(step + 1, measured["grad_norm"], batch, advantages)
                run.position.add(batch, measured | {"update/skipped": float(skipped)})
        with run.phase("sync"):
            run.reference.sync(run.policy)
        record(run, step, batch, advantages, time.perf_counter() - start)
    run.save_final()


def score(run: Run, prompts: list[Prompt], completions: list[Completion], pending: Pending, step: int) -> Batch:
    """Wait for this rank's rewards and gather the global batch, under the rewards' weights of this step."""
    with run.ranks.together("scoring"):
        scores = pending.result(run.watch.check)
    weights = [reward.weight_at(step) for reward in run.config.rewards]
    return gather(run.ranks, prompts, completions, scores, weights, run.config.scoring.error_budget)


def advantages_of(run: Run, batch: Batch) -> Tensor:
    """Advantage of each completion of the global batch: (N,) float64."""
    scale = run.config.advantage.scale
    if scale == "auto":
        scale = "group" if run.config.loss.objective == "grpo" else "batch"
    return group_relative_advantages(batch.reward, batch.group, scale)


def pack(run: Run, batch: Batch, advantages: Tensor) -> list[Work]:
    """This rank's packs of the global batch, equal in number on all ranks.

    Completions without advantage are left out where nothing else could come of them (no KL term); the weights of the
    others are those of the whole batch all the same.
    """
    config = run.config
    aggregation = config.loss.aggregation
    if aggregation == "auto":
        aggregation = "sequence_mean" if config.loss.objective == "grpo" else "sequence_sum"
    weights = token_weights(batch.lengths, aggregation)
    keep = (advantages != 0) | (config.loss.kl_coeff > 0)
    plans = plan(
        [len(prompt.ids) for prompt in batch.prompts], batch.group.tolist(), batch.lengths.tolist(), keep.tolist(),
        max_tokens=config.train.max_tokens_per_pack, num_ranks=run.ranks.num_ranks, share_prompts=run.share_prompts,
    )  # fmt: skip
    per_token = advantages.float()[batch.sequence]
    work = []
    for pieces in plans[run.ranks.rank]:
        made = make_pack(batch, pieces, share_prompts=run.share_prompts)
        tensors = (values[made.token].to(run.ranks.device) for values in (per_token, weights, batch.sampled_logprobs))
        work.append(Work(made.to(run.ranks.device), *tensors))
    return work


def open_batch(run: Run, work: list[Work], batch: Batch) -> None:
    """Fix the log-probabilities all updates of the batch are measured against, where it serves more than one."""
    if run.config.train.updates_per_batch == 1 or not work:
        return
    if run.position.old is None:
        old = torch.zeros(len(batch.tokens))
        with torch.no_grad():
            for each in work:
                run.ranks.agree(run.watch.requested)
                old[each.pack.token.cpu()] = run.wrapped(each.pack)[0].cpu()
        run.position.old = run.ranks.reduce(old, "sum")  # whole, so that a checkpoint between two updates can hold it
    for each in work:
        each.old = run.position.old[each.pack.token.cpu()].to(run.ranks.device)


def update(run: Run, work: list[Work], step: int) -> dict[str, float]:
    """One optimizer step on the whole batch; returns its metrics."""
    loss_config = run.config.loss
    estimator = loss_config.kl_estimator
    if estimator == "auto":
        estimator = "k3" if loss_config.objective == "grpo" else "squared_sequence"
    measured = UpdateMetrics(run.ranks.device)
    for number, each in enumerate(work, 1):
        last = number == len(work)
        run.ranks.agree(run.watch.requested)
        with run.ranks.quiet(run.wrapped, last):
            logprobs, entropies = run.wrapped(each.pack)
            loss = policy_loss(
                logprobs, logprobs.detach() if each.old is None else each.old, each.reference,
                each.advantages, each.weights, each.pack.sequence, objective=loss_config.objective,
                clip_low=loss_config.clip_low, clip_high=loss_config.clip_high, kl_coeff=loss_config.kl_coeff,
                kl_estimator=estimator,
            )  # fmt: skip
            run.ranks.backward(run.wrapped, loss.total, last)
        gap = (logprobs.detach() - each.sampled).abs()
        measured.add(loss, entropies, gap, useful=each.pack.useful, computed=len(each.pack.ids))
    learning_rate = run.learning_rate(step)
    norm = run.ranks.optimizer_step(run.wrapped, run.optimizer, learning_rate)
    return measured.reduced(run.ranks) | {"grad_norm": norm, "learning_rate": learning_rate}


def record(run: Run, step: int, batch: Batch, advantages: Tensor, seconds: float) -> None:
    """Write the step down; evaluate and save where they are due."""
    done, config, updates = step + 1, run.config.train, run.position.metrics
    metrics = {"step": done, "epoch": run.sampler.epoch(done)} | batch_metrics(batch, advantages, run.reward_names)
    # what the last update left, and how far from the rollout's numbers the first one was
    metrics |= updates[-1] | {GAP: updates[0][GAP]} if updates else NO_UPDATE
    metrics |= run.clock.seconds | {"time/step": seconds, "memory/peak_gib": peak_memory_gib()}
    if "time/rollout" in metrics:  # not where the batch came from a checkpoint
        metrics["rollout/tokens_per_second"] = metrics["tokens/completion"] / metrics["time/rollout"]
    run.clock.seconds = {}
    last = done == config.num_train_steps
    if last or (config.eval_every and done % config.eval_every == 0):
        metrics |= evaluate(run, done)
    run.write(metrics, batch, advantages)
    run.display.step(metrics)
    run.sampler.record(pass_rates(batch, [reward.weight_at(step) for reward in run.config.rewards]))
    run.position = Position(done)
    if last or (config.save_every and done % config.save_every == 0):
        run.save()


if __name__ == "__main__":
    sys.exit(main(train))
