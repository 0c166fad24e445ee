"""What every engine takes and gives, and the plain engine for models whose attention cannot share a prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..types import Completion
from .sampling import Sampling, draw

COUNTS_ANEW = ("bamba",)
"""Types whose code gives the first token of each call the position 0, unless it is given another."""


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    slot: int
    """The prompt's place in the step's batch."""
    sample: int
    """The completion's place in its group."""
    prompt: list[int]
    """Token ids of the prompt."""
    key: int
    """Key of its noise, see hashing.stream_key."""
    exact_length: int | None = None
    """Sample exactly this many tokens, whatever they are, so that a benchmark can repeat another trainer's work."""


class Engine(Protocol):
    """Samples completions."""

    def generate(
        self, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None = None, check: Callable[[], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """One completion a request, in the order of the requests.

        `on_finish` is told of completions as they end; `check` is called as the work moves and may raise to give up.
        """


def check_lengths(requests: list[Request], most: int) -> None:
    """Raise ValueError where a request's exact length is not one of 1 to `most` tokens."""
    for request in requests:
        if request.exact_length is not None and not 1 <= request.exact_length <= most:
            raise ValueError(f"exact_length: {request.exact_length} given, expected 1 to {most}")


def ends_by_itself(request: Request, ids: list[int], end_ids: list[int], most: int) -> bool:
    """Whether a completion counts as ended by the model rather than by the limit of `most` tokens."""
    return ids[-1] in end_ids if request.exact_length is None else len(ids) < most


def finished_completion(request: Request, ids: list[int], logprobs: list[float], ended: bool) -> Completion:
    """The answer to a request; raises FloatingPointError where the model's output was not a distribution."""
    if not all(map(math.isfinite, logprobs)):
        raise FloatingPointError(
            f"the rollout model's log-probabilities for prompt {request.slot}, sample {request.sample} are not finite: "
            "its weights or activations have overflowed"
        )
    return Completion(request.slot, request.sample, ids, logprobs, ended)


class RowEngine:
    """Decodes one group at a time with the model's own cache and attention: right for every architecture, not fast.

    All rows of a group have the same prompt and the same age, so nothing is padded and the model needs no mask.
    """

    def __init__(self, end_ids: list[int], max_new_tokens: int) -> None:
        self.end_ids, self.max_new_tokens = end_ids, max_new_tokens

    @torch.no_grad()
    def generate(
        self, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None = None, check: Callable[[], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See `Engine`."""
        if any(request.exact_length is not None for request in requests):
            raise ValueError("exact_length: only models whose prompts can be shared take completions of given lengths")
        completions: list[Completion] = []
        for _, members in groupby(requests, key=lambda request: request.slot):
            group = self._group(model, list(members), sampling, check)
            completions += group
            if on_finish:
                on_finish(group)
        return completions

    def _group(
        self, model: nn.Module, group: list[Request], sampling: Sampling, check: Callable[[], None] | None
    ) -> list[Completion]:
        device = next(model.parameters()).device
        inputs = torch.tensor([group[0].prompt] * len(group), device=device)
        keys = torch.tensor([request.key for request in group], device=device)
        ends = torch.tensor(self.end_ids, device=device)
        ended = torch.zeros(len(group), dtype=torch.bool, device=device)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        state: dict[str, Any] = {}
        for position in range(self.max_new_tokens):
            if check:
                check()
            output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **state)
            state = _state_after(model, output, len(group[0].prompt) + position)
            positions = torch.full_like(keys, position)
            token, logprob = draw(output.logits[:, -1], keys, positions, sampling)
            tokens.append(token)
            logprobs.append(logprob)
            ended |= torch.isin(token, ends)
            if bool(ended.all()):
                break
            inputs = token[:, None]
        return [self._completion(request, ids, values) for request, ids, values in zip(
            group, torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)]  # fmt: skip

    def _completion(self, request: Request, ids: list[int], logprobs: list[float]) -> Completion:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        length = len(ids) if end is None else end + 1
        return finished_completion(request, ids[:length], logprobs[:length], end is not None)


def _state_after(model: nn.Module, output: Any, length: int) -> dict[str, Any]:
    """What the model's next call takes of its last, of rows of `length` tokens; ValueError where it kept nothing."""
    state = {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}
    if not state:
        raise ValueError(f"{type(model).__name__} keeps its state in a way this engine does not know")
    # before transformers 5.4, Mamba asks for it, and takes a place within its convolution's width for a prompt's
    if "cache_params" in state and "cache_position" in inspect.signature(model.forward).parameters:
        place = length + getattr(model.config, "conv_kernel", 0)
        state["cache_position"] = torch.tensor([place], device=output.logits.device)
    if model.config.model_type in COUNTS_ANEW:
        state["position_ids"] = torch.tensor([[length]], device=output.logits.device)
    return state
