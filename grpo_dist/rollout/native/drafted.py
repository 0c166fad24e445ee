"""Passes in which a row may draw several tokens, because other completions of its prompt say what comes next.

Only for steps that compute a token to the same bits whatever else is in the pass; see `rollout/drafts.py`.

Shapes: R rows that are alive, T tokens of a pass.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..drafts import (
    Acceptance,
    Completions,
    Gain,
    Looks,
    PassTime,
    ids_of,
    numbers_of_drafts,
    text_of,
)
from ..engine import Request
from .cache import EVERYTHING
from .steps import SeveralTokensStep

if TYPE_CHECKING:
    from .engine import Decoding

MOST_ROWS = 128
"""With more rows nothing is drafted: a pass of so many tokens takes the longer the more there are."""
MOST_LOGITS = 1 << 24
"""Most logits of a pass with drafts, which bounds its memory."""
LOOK_AT = 4
"""Where drafts are not worth their time, those of so many rows are compared with what is drawn now and then. Where
looking for them is not, all rows are looked at then."""


class Drafts:
    """What drafts are made of, and what is known about their use; from one rollout to the next."""

    def __init__(self, end_ids: list[int]) -> None:
        self.completions, self.acceptance = Completions(end_ids), Acceptance()
        self.pass_time, self.step_time = PassTime(), PassTime()
        """Of all passes, and of those for which nothing was looked for."""
        self.gains, self.looks = defaultdict[int, Gain](Gain), defaultdict[int, Looks](Looks)
        """By the binary digits of the number of rows: to compute more tokens of few rows takes hardly longer."""
        self.steps = 0
        self.drafted = self.accepted = 0

    def add(self, request: Request, own: int, ids: list[int]) -> None:
        """Keep the completion of a request, the last `own` tokens of whose prompt came after the group's prompt."""
        self.completions.add(prompt_key(request, own), text_of([*_own(request, own), *ids]))

    def metrics(self) -> dict[str, float]:
        """The share of the drafted tokens that were drawn, since the last call."""
        share = self.accepted / self.drafted if self.drafted else 0.0
        self.drafted = self.accepted = 0
        return {"rollout/draft_accepted": share}


def prompt_key(request: Request, own: int) -> int:
    """Stands for the group's prompt; two prompts with one key would share drafts, and no more."""
    return hash(tuple(request.prompt[: len(request.prompt) - own]))


def _own(request: Request, own: int) -> list[int]:
    return request.prompt[len(request.prompt) - own :]


@dataclass
class _Row:
    """A row that is alive."""

    place: int
    request: int
    text: str = ""
    """Its own tokens, where there are other completions of its prompt."""
    ahead: str = ""
    """What may be drawn next."""
    match: int = 0
    """How many tokens in common it follows."""


class DraftedSteps:
    """The steps of one rollout."""

    def __init__(self, decoding: Decoding, step: SeveralTokensStep, drafts: Drafts) -> None:
        self.decoding, self.step, self.drafts = decoding, step, drafts
        self.texts: dict[int, str] = {}  # by request, the row's own tokens
        self.keys: dict[int, int] = {}
        self.looked_at = (0, 0)
        self.is_any_known = False

    def __call__(self) -> None:
        """One more token of every row, or several."""
        decoding, drafts, begun, first = self.decoding, self.drafts, time.perf_counter(), self.drafts.steps
        # what waits is prefilled with others, as rows end without drafts
        if decoding.waiting or decoding.state.num_rows > MOST_ROWS or not self._knows_any():
            self._advance(EVERYTHING)
            return
        alive = decoding.alive.nonzero()[:, 0]
        if not (num_rows := len(alive)):
            return
        gain, looks = drafts.gains[num_rows.bit_length()], drafts.looks[num_rows.bit_length()]
        is_due = first >= looks.next
        chances = drafts.acceptance.chances(drafts.pass_time.least_chance(num_rows, num_rows))
        worth_it = any(chances.values()) and not gain.is_none
        if not worth_it:
            alive = alive[: 0 if not is_due else None if any(chances.values()) else LOOK_AT]
        rows = self._rows(alive)
        numbers = self._numbers(rows, chances) if any(row.ahead for row in rows) else []
        looked, accepted = time.perf_counter(), drafts.accepted
        if any(numbers):
            self._pass(rows, numbers)
            drafts.steps += 1
            drafts.pass_time.add(num_rows + sum(numbers), time.perf_counter() - looked)
        else:
            self._advance(1 if rows else max(1, looks.next - first))
            self._compare(rows)
        if not rows:
            return
        spent = time.perf_counter() - begun
        plain = (num_rows + drafts.accepted - accepted) / num_rows * drafts.step_time.of(num_rows)
        if len(rows) == num_rows:
            gain.add(spent, plain)
        if not worth_it:
            looks.add(first, spent, plain)

    def _advance(self, most: int) -> None:
        """Steps without drafts, at most so many."""
        drafts, begun = self.drafts, time.perf_counter()
        steps, computed = self.decoding.advance(most)
        drafts.steps += steps
        if 0 < computed <= MOST_ROWS * steps:
            for each in (drafts.pass_time, drafts.step_time):
                each.add(computed / steps, (time.perf_counter() - begun) / steps)

    def _knows_any(self) -> bool:
        """Whether there are other completions of any row's prompt."""
        completions, requests = self.drafts.completions, self.decoding.requests
        if self.looked_at != (now := (len(requests), completions.added)):
            self.looked_at = now
            rows = self.decoding.row_request.tolist()
            self.is_any_known = any(completions.knows(self._key(n)) for n in rows)
        return self.is_any_known

    def _rows(self, alive: Tensor) -> list[_Row]:
        """The rows at the places `alive`."""
        if not len(alive):
            return []
        decoding, rows = self.decoding, []
        columns = alive, decoding.row_request[alive], decoding.state.lengths[alive]
        for place, n, length in torch.stack(columns, 1).tolist():
            key, row = self._key(n), _Row(place, n)
            if self.drafts.completions.knows(key):
                row.text = self._text(n, length)
                row.ahead, row.match = self.drafts.completions.ahead(key, row.text)
            rows.append(row)
        return rows

    def _numbers(self, rows: list[_Row], chances: dict[int, list[float]]) -> list[int]:
        """How many drafts of each row are computed."""
        most = max(1, MOST_LOGITS // self.step.vocabulary // max(1, len(rows)) - 1)
        limits = self.decoding.limit[[row.request for row in rows]].tolist()
        # a token is drawn behind the last draft
        room = [min(len(row.ahead), limit - len(row.text) - 1, most) for row, limit in zip(rows, limits, strict=True)]
        return numbers_of_drafts([chances[row.match][: max(0, number)] for row, number in zip(rows, room, strict=True)],
                                 self.drafts.pass_time)  # fmt: skip

    def _pass(self, rows: list[_Row], numbers: list[int]) -> None:
        """Compute the newest token of each row and its drafts, draw what comes after each, and keep what counts."""
        decoding, state = self.decoding, self.decoding.state
        state.make_room(1 + max(numbers))
        counts = torch.tensor(numbers) + 1
        first = torch.cumsum(counts, 0) - counts
        row = torch.repeat_interleave(counts)
        ahead = torch.arange(len(row)) - first[row]
        places, requests = torch.tensor([[row.place, row.request] for row in rows]).T[:, row]
        tokens = torch.empty_like(ahead)
        tokens[first] = decoding.last[places[first]]
        tokens[ahead > 0] = torch.tensor(ids_of("".join(row.ahead[:n] for row, n in zip(rows, numbers, strict=True))))
        positions = state.lengths[places] + ahead
        logits = self.step.several(tokens, places, state.starts[places] + positions, state)
        positions += 1
        offsets = decoding.offset[requests] + positions
        drawn, logprobs = decoding.draw(logits, decoding.keys[requests], offsets, decoding.sampling, decoding.rules)
        kept = self._kept(rows, numbers, text_of(drawn.tolist()))
        valid = (ahead < kept[row]).nonzero()[:, 0]
        decoding.tokens[requests[valid], positions[valid]] = drawn[valid]
        decoding.logprobs[requests[valid], positions[valid]] = logprobs[valid]
        # drafts end where an id would end the row; a stop string may end it at any token
        newest = [first + kept - 1]
        if decoding.sampling.stop is not None:
            newest = [first[kept > n] + n for n in range(int(kept.max()))]
        for which in newest:
            at = which[decoding.alive[places[which]]]
            if len(at):
                state.set_lengths(places[at], positions[at])
                decoding.take(places[at], requests[at], positions[at], drawn[at], logprobs[at])

    def _kept(self, rows: list[_Row], numbers: list[int], drawn: str) -> Tensor:
        """How many tokens of each row count, of those drawn behind its newest one and behind each draft: (R,) int64."""
        kept, first = [], 0
        for row, number in zip(rows, numbers, strict=True):
            behind = drawn[first : first + number + 1]
            first += number + 1
            pairs = zip(behind, row.ahead[:number], strict=False)
            right = next((n for n, (token, draft) in enumerate(pairs) if token != draft), number)
            kept.append(right + 1)
            if row.text:
                self.texts[row.request] = row.text + behind[: right + 1]
            self.drafts.acceptance.count(row.match, min(number, right + 1), right)
            self.drafts.drafted += number
            self.drafts.accepted += right
        return torch.tensor(kept)

    def _compare(self, rows: list[_Row]) -> None:
        """Take in a step without drafts: whether the first ones would have been right."""
        if rows := [row for row in rows if row.text]:
            drawn = text_of(self.decoding.last[[row.place for row in rows]].tolist())
            for row, token in zip(rows, drawn, strict=True):
                self.texts[row.request] = row.text + token
                if row.ahead:
                    self.drafts.acceptance.count(row.match, 1, int(row.ahead[0] == token))

    def _text(self, n: int, length: int) -> str:
        """The own tokens of request n's row: `length` of them and the newest one."""
        text = self.texts.get(n)
        if text is None or len(text) != length + 1:
            own = int(self.decoding.start[n])
            drawn = self.decoding.tokens[n, own : length + 1].tolist()
            text = self.texts[n] = text_of([*_own(self.decoding.requests[n], own), *drawn])
        return text

    def _key(self, n: int) -> int:
        if n not in self.keys:
            self.keys[n] = prompt_key(self.decoding.requests[n], int(self.decoding.start[n]))
        return self.keys[n]
