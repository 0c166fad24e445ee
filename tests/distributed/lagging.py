"""What a test of rollout.lag starts: a trainer whose engine draws from weights of its own in a thread, as one elsewhere
does."""

from __future__ import annotations

import sys

import torch
from torch import nn

from grpo_dist import train
from grpo_dist.rollout import LocalEngine, choose
from grpo_dist.trainer.ending import main


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
