"""The two forward passes of a rollout, of a model's own modules: a row of prompts, and one more token of each sequence.

Shapes: P prompts, R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..sampling import Rules, Sampling
from .cache import DecodeState, Prefilled, PrefillLayout


class Step(Protocol):
    """One more token of every sequence."""

    def __call__(self, tokens: Tensor, positions: Tensor, state: Any) -> Tensor:
        """Logits (R, V) after the newest `tokens` (R,) int64 at `positions` (R,) int64; inside a step of `state`, which
        is a DecodeState or, for steps over pages, a PagePool."""


@runtime_checkable
class SeveralTokensStep(Step, Protocol):
    """A step that computes any of the rows, and several tokens of a row at once: to the last bit as one after another.

    Its arguments are `tokens` of `rows` and the `slots` of the cache that they get, all (T,) int64, those of a row one
    after another.
    """

    vocabulary: int

    def draw(
        self, logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, rules: Rules | None = None
    ) -> tuple[Tensor, Tensor]:
        """`sampling.draw` of its logits."""

    def together(self, decoding: Any) -> Callable[[int], tuple[int, int]] | None:
        """What draws at most so many tokens of each row of an `engine.Decoding` that is alive, and says how many steps
        it took and tokens it drew; None where somebody has to look at each token."""

    def enters(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens is computed by `prefill` of this step sooner than by the model."""

    def prefill(self, prompts: list[list[int]]) -> tuple[Prefilled, Tensor]:
        """As the function below; the numbers of a prompt do not depend on the others."""

    def enter(self, tokens: Tensor, rows: Tensor, slots: Tensor, state: DecodeState) -> None:
        """Put the keys and values of tokens that nobody samples into the cache."""

    def several(self, tokens: Tensor, rows: Tensor, slots: Tensor, state: DecodeState) -> Tensor:
        """Logits (T, V) after each token; their keys and values are then in the cache."""


def module_step(model: nn.Module) -> Step:
    """The step as the model computes it."""

    def step(tokens: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        return model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, layout=state
        ).logits[0]  # fmt: skip

    return step


def prefill(model: nn.Module, prompts: list[list[int]]) -> tuple[PrefillLayout, Tensor]:
    """Compute token ids of prompts in one row; what their attention saw, and the logits (P, V) after each."""
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    layout = PrefillLayout(lengths, device)
    row = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    last = torch.cumsum(torch.tensor(lengths), 0).to(device) - 1
    output = model(
        input_ids=row[None], position_ids=positions[None], use_cache=False, layout=layout, logits_to_keep=last
    )
    return layout, output.logits[0]
