"""Our worker: the trainer as users run it, which waits for its turn before each step.

    python -m grpo_dist.cli.bench.ours --config FILE     started by `bench`, which tells it what to do
"""  # fmt: skip

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn

from ...config.parse import parse_config
from ...monitoring.alarms import Metrics
from ...monitoring.console import set_up_logging
from ...rollout import Request, Sampling
from ...rollout.engine import Engine
from ...train import train
from ...trainer.build import Run
from ...types import Batch, Completion, Prompt
from .turns import connect, let_go, own_peak_gib


class ExactLengths:
    """An engine whose completions have the lengths it is told."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lengths: list[int] | None = None

    def generate(
        self, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None = None, check: Callable[[], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See `rollout.engine.Engine`."""
        if self.lengths is not None:
            requests = [replace(r, exact_length=n) for r, n in zip(requests, self.lengths, strict=True)]
        return self.engine.generate(model, requests, sampling, on_finish, check)


class TurnRun(Run):
    """A run whose steps are ordered one by one; it takes prompts in the data's order and leaves nothing behind."""

    def steps(self) -> Iterator[int]:
        """Yield a step for each order."""
        self.engine = ExactLengths(self.engine)
        line = connect()
        step = 0
        while (order := line.recv()) is not None:
            self.engine.lengths = order["lengths"]
            start = time.perf_counter()
            yield step
            peak = own_peak_gib() + sum(child.memory_info().rss for child in psutil.Process().children(True)) / 2**30
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                peak = self.told["memory/peak_gib"]
            seconds = time.perf_counter() - start
            let_go()
            line.send({"seconds": seconds, "metrics": self.told, "peak_gib": peak})
            step += 1

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts TRL takes in its step of this number."""
        size = self.config.train.batch_size
        return [self.prompts[n % len(self.prompts)] for n in range(step * size, (step + 1) * size)]

    def write(self, metrics: Metrics, batch: Batch | None = None, advantages: Tensor | None = None) -> None:
        """Keep what was measured."""
        super().write(metrics, batch, advantages)
        self.told = dict(metrics)

    def save_final(self) -> None:  # type: ignore[override]
        """Nothing was trained that anyone would want."""


if __name__ == "__main__":
    set_up_logging()
    run = TurnRun(parse_config(sys.argv[1:]))
    train(run)
    run.close(all_ranks=True)
