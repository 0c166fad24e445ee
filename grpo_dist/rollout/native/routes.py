"""The experts that the tokens of a rollout take, kept for routing replay.

Shapes: N requests, J routers, K experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...model.routing import routers_of
from ...types import no_routes
from .cache import longer


class RouteTable:
    """The routes of all requests of a rollout. It is empty for a model whose routers nobody replays."""

    def __init__(self, model: nn.Module, most: int, device: torch.device) -> None:
        """At most `most` tokens are drawn for a request."""
        self.routers = routers_of(model)
        self.prompts: dict[int, Tensor] = {}  # by request, (tokens, J, K) on the CPU; a group shares them
        if self.routers is not None:
            nothing = self.routers.nothing.to(device)
            self.drawn = nothing.new_zeros((0, most + 1, *self.routers.shape))  # (N, most + 1, J, K)

    @property
    def keeps(self) -> bool:
        """Whether there are routers, whose choices are kept."""
        return self.routers is not None

    def grow(self, requests: int) -> None:
        """Make room for so many requests more."""
        if self.routers is not None:
            self.drawn = longer(self.drawn, requests)

    def keep_prompts(self, groups: list[list[int]], lengths: list[int]) -> None:
        """Keep the routes of the row of prompts that was computed last, each for the requests of its group."""
        if self.routers is not None:
            for group, routes in zip(groups, self.routers.recorded().cpu().split(lengths), strict=True):
                self.prompts |= dict.fromkeys(group, routes)

    def keep_step(self, requests: Tensor, places: Tensor) -> None:
        """Keep, in place, the routes of the tokens that were computed last; `places` are theirs among a row's own.
        Where nothing is kept, a step does not pay for these arguments."""
        assert self.routers is not None
        self.drawn[requests, places] = self.routers.recorded()

    def of_drawn(self, requests: Tensor) -> list[Tensor]:
        """One tensor of the routes of what was drawn for `requests`, or nothing."""
        return [] if self.routers is None else [self.drawn[requests]]

    def of_prompts(self, requests: list[int]) -> list[Tensor]:
        """The routes of the requests' prompts, or nothing."""
        return [] if self.routers is None else [self.prompts[n] for n in requests]

    def of(self, of_prompts: list[Tensor], lengths: list[int], of_drawn: list[Tensor]) -> list[Tensor | None]:
        """The routes of each request's prompt and of the tokens that were drawn for it, of which the last one has none:
        nothing came after it."""
        if not of_drawn:
            return [None] * len(lengths)
        return [torch.cat([prompt, routes[: length - 1], no_routes(1, like=routes)])
                for prompt, routes, length in zip(of_prompts, of_drawn[0].cpu(), lengths, strict=True)]  # fmt: skip
