"""What tests of rollout.lag start: a reward that teaches nothing at one step, and a trainer whose engine draws from
weights of its own in a thread, as one in another process does."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from grpo_dist import train
from grpo_dist.rollout import LocalEngine, choose
from grpo_dist.trainer.ending import main


def nothing_at_the_second_step(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """The length in characters, and at the second step 0 for all, so that no update is made."""
    return [0.0 if trainer_state.global_step == 1 else float(len(text)) for text in completions]


class Elsewhere(LocalEngine):
    """It decodes with a copy of the adapters."""

    is_elsewhere = True

    def wake(self) -> None:
        """Copy what the update changes."""
        super().wake()
        torch.set_grad_enabled(True)  # the weights are open without gradients, and stay so in this thread
        assert self._model is not None
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.numel() < 100_000:
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)


if __name__ == "__main__":
    choose.LocalEngine = Elsewhere  # type: ignore[misc]
    sys.exit(main(train.train))
