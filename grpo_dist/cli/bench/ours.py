"""Our worker: the trainer as users run it. It waits for a request before each step.

    python -m grpo_dist.cli.bench.ours --config FILE     started by `bench`, which sends it requests
"""  # fmt: skip

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

from ...distributed.spinning import allow_long, watch_spinning
from ...preflight.early import refuse_mistakes

if __name__ == "__main__":
    # before the imports of torch, so that the answer to a mistake comes at once
    refuse_mistakes()
    allow_long(os.environ)

import psutil
import torch

from ...checkpoint.state import TrainState
from ...config.parse import parse_config
from ...data.order import Sampler
from ...monitoring.console import set_up_logging
from ...rollout import LocalEngine, Request, Sampling
from ...train import train_step
from ...trainer.build import build, close
from ...trainer.collect import first_round, generate
from ...trainer.parts import Parts
from ...trainer.profile import profile_path, profiled
from ...types import Metrics
from .turns import connect, let_go, own_peak_gib


class ExactLengths(LocalEngine):
    """An engine whose completions have given lengths, one a request in their order; None for their own."""

    lengths: list[int] | None = None

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """See `Engine`."""
        if self.lengths is not None:
            requests = [replace(each, max_new_tokens=length, ignore_end=True)
                        for each, length in zip(requests, self.lengths, strict=True)]  # fmt: skip
        super().submit(requests, sampling)


class PeersOrder(Sampler):
    """The prompts that TRL takes: the data in order, repeatedly."""

    def batch_indices(self, step: int) -> list[int]:
        """See `Sampler`."""
        return [n % self.num_prompts for n in range(step * self.batch_size, (step + 1) * self.batch_size)]


def rollout(parts: Parts, state: TrainState) -> Metrics:
    """Draw the completions of a step's prompts and go on to the next step; returns what tables show of it."""
    trajectories, _ = generate(parts, state, first_round(parts, state, state.step))
    state.step += 1
    return {"tokens/completion": float(sum(len(each.ids) for each in trajectories))}


def peak_gib(metrics: Metrics) -> float:
    """The most memory of a step with these metrics: tensors on a GPU, else this process and those of its rewards."""
    if not torch.cuda.is_available():
        return own_peak_gib() + sum(child.memory_info().rss for child in psutil.Process().children(True)) / 2**30
    # the phases of a step note torch's peak and reset it
    return max(torch.cuda.max_memory_allocated() / 2**30, metrics.get("memory/peak_gib") or 0.0)


def take_turns(parts: Parts, state: TrainState) -> None:
    """Take a step for each request, and answer with its time, metrics, peak memory and the place of its profile."""
    assert isinstance(parts.engine, LocalEngine)
    engine = ExactLengths(parts.engine.decoder, parts.engine.weights, parts.engine.decoding)
    parts = replace(parts, engine=engine)
    state.sampler = PeersOrder(len(parts.prompts), parts.config.train.batch_size, seed=0)
    line = connect()
    while (request := line.recv()) is not None:
        engine.lengths = request["lengths"]
        start = time.perf_counter()
        with profiled(parts, state.step + 1):
            metrics = rollout(parts, state) if request["is_rollout"] else train_step(parts, state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = peak_gib(metrics)
        let_go()
        profile = str(profile_path(parts.directory, state.step, parts.ranks.rank))
        line.send({"seconds": seconds, "metrics": metrics, "peak_gib": peak, "profile": profile})


if __name__ == "__main__":
    set_up_logging()
    watch_spinning()
    parts, state = build(parse_config(sys.argv[1:]))
    take_turns(parts, state)
    close(parts, all_ranks=True)
