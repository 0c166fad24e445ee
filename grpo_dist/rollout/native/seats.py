"""What steps on a GPU know of the requests in flight, and what they draw for them.

A request keeps its seat while its row moves, so that only a number moves with it. The buffers are as many as rows in
flight, and not as requests: captured steps go on with them when requests come later.

Shapes: C seats, and one more that is nobody's; N requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...distributed.transfer import to_device
from ..engine import Request, columns_of
from ..sampling import Rules
from .routes import RouteTable


class Seats:
    """The seats of one decoding."""

    def __init__(self, count: int, most: int, rules: Rules, routes: RouteTable, device: torch.device) -> None:
        """`most` is the most tokens of a row's own."""
        self.most, self.device, self.nobody = most, device, count
        self.rules, self.routes = rules, routes
        rules.grow(count + 1)
        routes.grow(count + 1)
        self.free = list(range(count - 1, -1, -1))
        columns = torch.zeros((5, count + 1), dtype=torch.int64, device=device)
        self.keys, self.limit, self.offset, self.start, self.ended_at = columns
        self.may_end = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((count + 1, most), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((count + 1, most), dtype=torch.float32, device=device)

    def place(
        self, requests: Sequence[Request], seats: Sequence[int], starts: Sequence[int], answers: Sequence[list[int]]
    ) -> None:
        """Give requests their seats. Their rows have `starts` tokens of their own before what is drawn for them, the
        last of which, `answers`, were not drawn."""
        keys, limits, offsets, may_end = columns_of(requests, self.most, self.device)
        given = [(seat, start - len(ids) + n, token) for seat, start, ids in zip(seats, starts, answers, strict=True)
                 for n, token in enumerate(ids)]  # fmt: skip
        columns = [torch.tensor(seats), torch.tensor(starts), torch.tensor(given, dtype=torch.int64).view(-1, 3).T]
        at, start, (of, places, tokens) = to_device(columns, self.device)
        self.keys[at], self.may_end[at], self.start[at] = keys, may_end, start
        self.limit[at], self.offset[at] = limits + start, offsets - start
        self.tokens[of, places] = tokens
        self.rules.restart(at)

    def drawn(self, seats: Tensor) -> list[Tensor]:
        """The numbers of their own tokens (N,), these and their log-probabilities (N, most), and routes if there are
        any."""
        return [self.ended_at[seats], self.tokens[seats], self.logprobs[seats], *self.routes.of_drawn(seats)]
