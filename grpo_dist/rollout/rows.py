"""The plain decoder for models whose attention cannot share a prompt."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.routing import routers_of
from ..types import Trajectory, no_routes
from .engine import Decoder, Request, columns_of, limit_of, take_group, trajectory
from .sampling import Rules, Sampling, draw

CACHES = ("cache", "past_key_values", "cache_params")
"""What transformers and models' own code call a cache, in what a call takes and gives."""
COUNTS_ANEW = ("bamba",)
"""Types whose code gives the first token of each call the position 0, unless it is given another."""


class RowDecoder(Decoder):
    """Decodes one group at a time with the model's own cache and attention: right for every architecture, not fast.

    All rows of a group have the same prompt and the same age, so nothing is padded and the model needs no mask.
    """

    def __init__(self, end_ids: list[int], max_new_tokens: int) -> None:
        self.end_ids, self.max_new_tokens = end_ids, max_new_tokens

    @torch.no_grad()
    def decode(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """See `Decoder`."""
        while queue:
            yield from self._group(model, take_group(queue), sampling)

    def _group(self, model: nn.Module, group: list[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        device = next(model.parameters()).device
        inputs = torch.tensor([group[0].prompt] * len(group), device=device)
        keys, limits, offsets, may_end = columns_of(group, self.max_new_tokens, device)
        rules, rows = Rules(sampling, self.end_ids, device), torch.arange(len(group), device=device)
        rules.grow(len(group))
        length = torch.zeros(len(group), dtype=torch.int64, device=device)  # once it has ended
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        state: dict[str, Any] = {}
        routers, routes = routers_of(model), []
        for position in range(max(limit_of(request, self.max_new_tokens) for request in group)):
            if position:
                yield []
            output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **state)
            if routers is not None:  # of the prompt, or of the newest token of each row
                routes.append(routers.recorded().view(len(group), -1, *routers.shape))
            state = _state_after(model, output, len(group[0].prompt) + position)
            token, logprob = draw(output.logits[:, -1], keys, offsets + position, sampling, rules)
            tokens.append(token)
            logprobs.append(logprob)
            over = (rules.ended(token, rows, offsets + position) & may_end) | (position + 1 >= limits)
            length = torch.where(over & (length == 0), position + 1, length)
            if bool((length > 0).all()):
                break
            inputs = token[:, None]
        drawn = zip(group, length.tolist(), torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(),
                    _of_rows(routes, length.tolist()), strict=True)  # fmt: skip
        yield [trajectory(request, ids[:most], values[:most], self.end_ids, sampling, routes)
               for request, most, ids, values, routes in drawn]  # fmt: skip


def _of_rows(routes: list[Tensor], lengths: list[int]) -> list[Tensor | None]:
    """Routes of each row of a group, from those of each call; the last token of a row came into no call."""
    if not routes:
        return [None] * len(lengths)
    prompt, table = routes[0].shape[1], torch.cat(routes, 1).cpu()
    return [torch.cat([row[: prompt + length - 1], no_routes(1, like=row)])
            for row, length in zip(table, lengths, strict=True)]  # fmt: skip


def _state_after(model: nn.Module, output: Any, length: int) -> dict[str, Any]:
    """What the model's next call takes over from its last one, for rows of `length` tokens; ValueError for nothing."""
    state = {name: output[name] for name in output if name in CACHES}
    if not state:
        raise ValueError(f"{type(model).__name__} keeps its state in a way this engine does not know")
    # before transformers 5.4, Mamba asks for it, and takes a place within its convolution's width for a prompt's
    if "cache_params" in state and "cache_position" in inspect.signature(model.forward).parameters:
        place = length + getattr(model.config, "conv_kernel", 0)
        state["cache_position"] = torch.tensor([place], device=output.logits.device)
    if model.config.model_type in COUNTS_ANEW:
        state["position_ids"] = torch.tensor([[length]], device=output.logits.device)
    return state
