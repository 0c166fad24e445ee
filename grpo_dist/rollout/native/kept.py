"""Rows that have ended and stay in the cache, for requests that go on with them.

The next turn of an episode begins with what such a row has computed, and with what was answered to it.

Shapes: R sequences in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..engine import Request, limit_of
from .steps import SeveralTokensStep

if TYPE_CHECKING:
    from .engine import Decoding


@dataclass(frozen=True)
class _Kept:
    """A row that has ended and stays for a request that goes on with it."""

    request: int
    """Place of the request that it answered."""
    prompt_tokens: int
    """Tokens of its prompt; what comes after them is its own."""
    ids: list[int]
    """All its tokens; the newest one is not in the cache."""


class KeptRows:
    """The rows of one decoding that are kept."""

    def __init__(self, decoding: Decoding, step: SeveralTokensStep) -> None:
        self.decoding, self.step = decoding, step
        self.at: dict[tuple[int, int], _Kept] = {}  # by group and sample
        self.going_on: list[tuple[int, _Kept]] = []  # requests that go on with a row

    def keep(self, row: int, n: int, ids: list[int]) -> None:
        """Keep a row that has ended with the tokens `ids`, the answer to request `n`."""
        decoding, request = self.decoding, self.decoding.requests[n]
        prompt_tokens = int(decoding.state.prompt_lengths[decoding.state.prompt[row]])
        self.at[request.group, request.sample] = _Kept(n, prompt_tokens, request.prompt + ids)
        decoding.kept[row] = True

    def goes_on(self, n: int) -> bool:
        """Whether request `n` goes on with a row that was kept; one that does not drops it."""
        decoding, request = self.decoding, self.decoding.requests[n]
        kept = self.at.pop((request.group, request.sample), None)
        if kept is None:
            return False
        tokens = len(request.prompt) + limit_of(request, decoding.engine.max_new_tokens) - kept.prompt_tokens
        if begins_with(request, kept.ids) and tokens <= decoding.engine.max_new_tokens:
            self.going_on.append((n, kept))
            return True
        decoding.kept[self._row_of(kept)] = False
        return False

    def release(self, places: set[tuple[int, int]]) -> None:
        """Drop the rows of these groups and samples."""
        for place in places & self.at.keys():
            self.decoding.kept[self._row_of(self.at.pop(place))] = False

    def enter(self) -> None:
        """Put what came after kept rows into their cache, up to the token that the next one is drawn after."""
        decoding, state = self.decoding, self.decoding.state
        going_on = sorted((self._row_of(kept), n, kept) for n, kept in self.going_on)
        self.going_on = []
        if not going_on:
            return
        entered: list[tuple[int, int, int]] = []  # row, slot and token
        for row, n, kept in going_on:
            own, cached = decoding.requests[n].prompt[kept.prompt_tokens :], len(kept.ids) - kept.prompt_tokens - 1
            entered += [(row, slot, own[slot]) for slot in range(cached, len(own) - 1)]
            decoding.row_request[row], decoding.last[row], decoding.start[n] = n, own[-1], len(own)
            decoding.offset[n] -= len(own)
            decoding.limit[n] += len(own)
        rows = torch.tensor([row for row, _, _ in going_on])
        decoding.alive[rows], decoding.reported[rows], decoding.kept[rows] = True, False, False
        lengths = decoding.start[decoding.row_request[rows]] - 1
        state.make_room(int((lengths - state.lengths[rows]).max()))
        if entered:
            columns = torch.tensor(entered).T
            self.step.enter(columns[2], columns[0], columns[1], state)
        state.set_lengths(rows, lengths)

    def _row_of(self, kept: _Kept) -> int:
        return int((self.decoding.row_request == kept.request).nonzero())


def begins_with(request: Request, ids: list[int]) -> bool:
    """Whether a request's prompt is these tokens and at least one more."""
    return len(request.prompt) > len(ids) and request.prompt[: len(ids)] == ids
