"""GRPO on one screen. What differs from the textbook:

1. The batch is global: every rank gathers all completions and rewards, so a group may span ranks and nothing that is
   learned depends on how many there are.
2. A prompt is computed once for its whole group, in the rollout and in the update.
3. Rollouts run on the frozen copy of the base model, into which the policy's adapters are merged after each step.
4. Log-probabilities of the policy that opened the batch are the detached current ones while the batch serves one update.

    accelerate launch --config_file accelerate_configs/zero2.yaml -m grpo_dist.train --config configs/quickstart.yaml
    python -m grpo_dist.train --config configs/quickstart.yaml                                        # one process
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .advantages import group_relative_advantages
from .batch import Batch, Completion, Prompt
from .cli_config import parse_config
from .display import set_up_logging
from .evaluation import evaluate
from .gathering import gather
from .losses import policy_loss, token_weights
from .metrics import UpdateMetrics, batch_metrics, peak_memory_gib
from .packing import Pack, make_pack, plan
from .rewards.pool import Pending
from .run import Run, UserError


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
    """Train the run's policy and leave everything in train.output_dir."""
    config = run.config
    if run.first_step == 0:
        run.write({"step": 0} | evaluate(run, 0))
    for step in run.steps():
        start = time.perf_counter()
        prompts = [run.prompts[i] for i in run.sampler.batch_indices(step)]
        with run.phase("rollout"):
            completions, pending = run.generate(prompts, config.rollout.group_size, run.sampling, f"train/{step}", step)
        with run.phase("reward"):
            batch = score(run, prompts, completions, pending, step)
        advantages = advantages_of(run, batch)
        work = pack(run, batch, advantages)
        with run.phase("reference"):
            for each in work:
                each.reference = run.reference.logprobs(each.pack) if config.loss.kl_coeff else None
        with run.phase("update"):
            metrics = [update(run, work, step) for _ in range(config.train.updates_per_batch if work else 0)]
        with run.phase("sync"):
            run.reference.sync(run.policy)
        seconds = time.perf_counter() - start
        record(run, step, batch, advantages, metrics, seconds)
    run.save_final()


def score(run: Run, prompts: list[Prompt], completions: list[Completion], pending: Pending, step: int) -> Batch:
    """Wait for this rank's rewards and gather the global batch, under the rewards' weights of this step."""
    with run.ranks.together("scoring"):
        scores = pending.result()
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


def update(run: Run, work: list[Work], step: int) -> dict[str, float]:
    """One optimizer step on the whole batch; returns its metrics."""
    loss_config = run.config.loss
    estimator = loss_config.kl_estimator
    if estimator == "auto":
        estimator = "k3" if loss_config.objective == "grpo" else "squared_sequence"
    if run.config.train.updates_per_batch > 1 and work[0].old is None:
        with torch.no_grad():
            for each in work:
                each.old = run.wrapped(each.pack)[0]
    measured = UpdateMetrics(run.ranks.device)
    for number, each in enumerate(work, 1):
        last = number == len(work)
        with run.ranks.quiet(run.wrapped, last):
            logprobs, entropies = run.wrapped(each.pack)
            loss = policy_loss(
                logprobs, logprobs.detach() if each.old is None else each.old, each.reference, each.advantages,
                each.weights, each.pack.sequence, objective=loss_config.objective, clip_low=loss_config.clip_low,
                clip_high=loss_config.clip_high, kl_coeff=loss_config.kl_coeff, kl_estimator=estimator,
            )  # fmt: skip
            run.ranks.backward(run.wrapped, loss.total, last)
        gap = (logprobs.detach() - each.sampled).abs()
        measured.add(loss, entropies, gap, useful=len(each.pack.ids) if len(logprobs) else 0, computed=len(each.pack.ids))
    learning_rate = run.learning_rate(step)
    norm = run.ranks.optimizer_step(run.wrapped, run.optimizer, learning_rate)
    return measured.reduced(run.ranks) | {"grad_norm": norm, "learning_rate": learning_rate}


def record(
    run: Run, step: int, batch: Batch, advantages: Tensor, updates: list[dict[str, float]], seconds: float
) -> None:
    """Write the step down; evaluate and save where they are due."""
    done, config = step + 1, run.config.train
    metrics = {"step": done, "epoch": run.sampler.epoch(done)} | batch_metrics(batch, advantages, run.reward_names)
    if updates:  # what the update left, and how far from the rollout's numbers its first pass was
        metrics |= updates[-1] | {"rollout/logprob_gap_max": updates[0]["rollout/logprob_gap_max"]}
    rollout_seconds = run.clock.seconds["time/rollout"]
    metrics |= {"rollout/tokens_per_second": metrics["tokens/completion"] / rollout_seconds, "time/step": seconds}
    metrics |= run.clock.seconds | {"memory/peak_gib": peak_memory_gib()}
    run.clock.seconds = {}
    last = done == config.num_train_steps
    if last or (config.eval_every and done % config.eval_every == 0):
        metrics |= evaluate(run, done)
    run.write(metrics, batch, advantages)
    run.display.step(metrics)
    if last or (config.save_every and done % config.save_every == 0):
        run.save(done)


def main() -> int:
    """The command line."""
    config = parse_config()
    set_up_logging()
    try:
        run = Run(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(run)
    finally:
        run.close()
    if run.ranks.is_main:
        print(run.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
