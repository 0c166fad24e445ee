"""Measure the cost of the global batch on every rank: gathering it, and everything that is computed from it.

    python docs/batch_costs.py                                         # one process
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 docs/batch_costs.py

Completions are random: 4,096 prompts × 16, with geometric lengths of 500 tokens in the mean and at most 2,048. Prints
a line for each part with its seconds and the CPU seconds of this rank. Compare the CPU seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from grpo_dist.algorithm.advantages import relative_advantages
from grpo_dist.algorithm.losses import token_weights
from grpo_dist.config.schema import Config, ModelConfig, OptimConfig
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.model.packing import Piece, make_pack, plan
from grpo_dist.monitoring.metrics import batch_metrics
from grpo_dist.monitoring.recorder import Recorder
from grpo_dist.rewards.scores import Scores
from grpo_dist.trainer.gathering import gather_scores, gather_trajectories
from grpo_dist.types import Batch, Prompt, Trajectory, all_token_rewards, join

Result = TypeVar("Result")
LONGEST = 2048


def timed(ranks: Ranks, name: str, work: Callable[[], Result]) -> Result:
    """Run a function and print its time."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    if ranks.is_main:
        print(f"| {name} | {time.perf_counter() - start:.2f} | {time.process_time() - cpu:.2f} |", flush=True)
    return result


def make_rollouts(
    ranks: Ranks, num_prompts: int, group_size: int, mean: float
) -> tuple[list[Prompt], list[Trajectory]]:
    """The prompts, the same on all ranks, and this rank's share of the completions."""
    numbers = np.random.default_rng(0)
    prompts = [Prompt(n, numbers.integers(250, size=length).tolist(), f"prompt {n}")
               for n, length in enumerate(numbers.integers(50, 500, size=num_prompts))]  # fmt: skip
    lengths = np.minimum(numbers.geometric(1 / mean, size=num_prompts * group_size), LONGEST)
    return prompts, [
        Trajectory(n // group_size, n % group_size, numbers.integers(250, size=length).tolist(),
                   (-numbers.random(length)).tolist(), bool(length < LONGEST), [True] * int(length))
        for n, length in list(enumerate(lengths))[ranks.share(len(lengths))]
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--mean", type=float, default=500.0, help="mean tokens of a completion")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="ranks to plan for")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ranks = Ranks(torch.float32, OptimConfig())
    prompts, completions = make_rollouts(ranks, given.prompts, given.group_size, given.mean)
    count, own = len(prompts) * given.group_size, len(completions)
    scores = Scores(np.random.default_rng(ranks.rank).random((own, 1)), np.zeros((own, 1), bool), [], ["made up"],
                    np.zeros(1), [0])  # fmt: skip
    ranks.barrier()
    if ranks.is_main:
        print("| part | seconds | CPU seconds |\n|---|---|---|")
    batch = timed(ranks, f"gather, {own:,} of {count:,} completions own",
                  lambda: gather_scores(ranks, gather_trajectories(ranks, prompts, completions), ranks.share(count),
                                        scores, [1.0], 0.1))  # fmt: skip
    completions.clear()
    advantages = timed(ranks, "advantages", lambda: relative_advantages(
        all_token_rewards(batch), [1.0], batch.lengths, batch.group, baseline="mean", scale="group",
        normalise_each=False, gamma=1.0))  # fmt: skip
    batch = replace(batch, advantages=advantages)
    everything = torch.ones_like(batch.finished)
    timed(ranks, "weights of tokens", lambda: token_weights(
        batch.lengths, "sequence_mean", group=batch.group, included=everything, longest=LONGEST))  # fmt: skip
    timed(ranks, "metrics of the batch", lambda: batch_metrics(batch, ["made up"]))
    half = len(prompts) // 2
    timed(ranks, "joining two rounds of dynamic sampling",
          lambda: join([batch, batch], [list(range(half)), list(range(half, len(prompts)))]))  # fmt: skip
    for num_ranks in given.ranks:
        packs = timed(ranks, f"plan for {num_ranks} ranks", partial(
            plan, [len(p.ids) for p in prompts], batch.group.tolist(), batch.lengths.tolist(), everything.tolist(),
            max_tokens=8192, num_ranks=num_ranks))  # fmt: skip
        mine = packs[0]
        timed(ranks, f"tensors of one rank's {len(mine)} packs, of {num_ranks} ranks",
              partial(tensors_of, batch, mine))  # fmt: skip
    if ranks.is_main:
        record(ranks, batch)
    ranks.barrier()
    ranks.end()


def tensors_of(batch: Batch, packs: list[list[Piece]]) -> None:
    """Make a rank's packs."""
    for pieces in packs:
        make_pack(batch, pieces)


def record(ranks: Ranks, batch: Batch) -> None:
    """The work of only the main rank: the table of completions."""
    tokenizer = load_tokenizer(ModelConfig())
    batch = replace(batch, ids=batch.ids % len(tokenizer))
    rows = [ids.tolist() for ids in torch.split(batch.ids, batch.row_lengths.tolist())]
    texts = timed(ranks, "main rank: texts", lambda: tokenizer.batch_decode(rows, skip_special_tokens=True))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(Config(), logging=replace(Config().logging, trackers=[]))
        recorder = Recorder(config, Path(folder), -1)
        timed(ranks, "main rank: table of completions",
              lambda: recorder.completions(1, batch, texts, [""] * len(texts), ["made up"]))  # fmt: skip
        recorder.close()


if __name__ == "__main__":
    main()
