"""Decoding on a GPU: pages, captured steps, and a host that never makes the device wait.

Rows have places in fixed buffers, so that a step of R rows is captured once and replayed whenever R rows are computed;
R climbs a short ladder, and places above the last request are rows of nobody. While the device computes some steps the
host looks at who had ended before them, hands out completions and prepares tables; it waits for copies that were queued
before those steps, never for the steps.

Shapes: C most rows, R rows computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...distributed.transfer import HostCopy, to_device
from ...types import Trajectory
from ..engine import Request, limit_of, take_group, trajectory
from ..room import PAGE, PREFILL_TOKENS, pages_of
from ..sampling import Rules, Sampling
from .fused_draw import fused_draw
from .graphs import Sizes
from .kept import begins_with
from .pages import PagePool
from .routes import RouteTable
from .seats import Seats
from .steps import prefill
from .tables import PromptInFlight, RowInFlight, lay_tables, rung

if TYPE_CHECKING:
    from .engine import NativeDecoder

STEPS = 8
"""Steps between two looks at who has ended."""
ANSWER_TOKENS = 128
"""Longest answer after which a kept row goes on. It takes a step for each token of the answer, beside rows that draw
theirs: the row is computed again sooner than it takes many."""


class DecodingOverPages:
    """One call of `decode` on a GPU.

    A row that has ended and may go on keeps its pages. The request that goes on with it brings what was answered: the
    row takes these tokens one a step, as the other rows draw theirs.
    """

    def __init__(self, engine: NativeDecoder, model: nn.Module, queue: deque[Request], sampling: Sampling) -> None:
        self.engine, self.model, self.queue, self.sampling = engine, model, queue, sampling
        self.end_ids, self.most = engine.end_ids, engine.max_new_tokens
        self.device = device = next(model.parameters()).device
        self.goes_on = any(request.keeps for request in queue)
        # what is computed again begins with tokens of its own
        self.longest = max(len(request.prompt) for request in queue) + (self.most if self.goes_on else 0)
        least = pages_of(self.longest) + pages_of(self.most)
        num_pages = max(least, min(self._needed(), engine.max_tokens_in_flight // PAGE))
        least_room = min(self._room(request) for request in queue)
        capacity = rung(min(len(queue), max(1, num_pages // pages_of(least_room))))
        self.pool = PagePool(device, num_pages, capacity, self.most, self.longest)
        self.places = list(range(capacity - 1, -1, -1))  # of prompts
        self.decode = engine.step_of(model)
        self.waiting: deque[list[Request]] = deque()  # in groups with one prompt
        self.rows: list[RowInFlight] = []  # that are computed
        self.kept: dict[tuple[int, int], RowInFlight] = {}  # by group and sample
        self.held: set[RowInFlight] = set()  # both, and those that have ended and are on their way to the host
        self.advance = Sizes(self._step) if engine.captures and device.type == "cuda" else self._step
        rules, routes = Rules(sampling, engine.end_ids, device), RouteTable(model, self.most, device)
        self.seats = Seats(capacity, self.most, rules, routes, device)
        self.seat = torch.full((capacity,), self.seats.nobody, device=device)
        self.last = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.alive = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.looked: tuple[list[RowInFlight], HostCopy] | None = None
        self.results: deque[tuple[list[RowInFlight], list[Tensor], HostCopy]] = deque()  # with routes of prompts

    def _needed(self) -> int:
        """Pages for all requests of the queue at once."""
        queue, needed = deque(self.queue), 0
        while queue:
            group = take_group(queue)
            needed += self._pages_for(group)
            if self.goes_on:  # what is computed again shares its prompt with nobody
                needed += len(group) * (pages_of(len(group[0].prompt)) + 1)
        return needed

    def run(self) -> Iterator[list[Trajectory]]:
        """Decode until every request is answered, and no row is kept."""
        while True:
            self._take()
            self._admit()
            if self.rows:
                self._lay_tables()
                for _ in range(self.steps):
                    self.advance(self.computed, self.tiles)
                yield self._look()
            elif self.waiting or self.results or self.kept:
                yield self._ended()
            else:
                return

    def close(self) -> None:
        """Let go now of what refers back to this object, and would hold pages and graphs until it is collected."""
        del self.advance

    # --- on the device ------------------------------------------------------------------------------------------------

    def _step(self, rows: int, tiles: int) -> None:
        """One more token of every row; nothing is allocated that outlives it, and nothing is read back."""
        pool, routes = self.pool, self.seats.routes
        pool.begin_step(rows, tiles)
        positions = pool.prompt_lengths[pool.prompt[:rows]] + pool.lengths[:rows]
        logits = self.decode(self.last[:rows], positions.long(), pool)
        if routes.keeps:
            routes.keep_step(self._seats_of(slice(0, rows)), pool.lengths[:rows].long())
        pool.lengths[:rows].add_(self.alive[:rows])
        self._draw(logits, slice(0, rows))

    def _seats_of(self, rows: slice) -> Tensor:
        """The seats of rows; what has ended goes on for nobody."""
        return torch.where(self.alive[rows], self.seat[rows], self.seats.nobody)

    def _draw(self, logits: Tensor, rows: slice) -> None:
        seats, alive, position = self.seats, self.alive[rows], self.pool.lengths[rows].long()
        seat = self._seats_of(rows)
        place = seats.offset[seat] + position
        token, logprob = fused_draw(logits, seats.keys[seat], place, self.sampling, seats.rules)
        judged = seat
        if self.goes_on:
            is_given = position < seats.start[seat]
            token = torch.where(is_given, seats.tokens[seat, position], token)
            judged = torch.where(is_given, seats.nobody, seat)
        ends = seats.rules.ended(token, judged, place) & seats.may_end[judged]
        seats.tokens[seat, position] = token
        seats.logprobs[seat, position] = logprob
        self.last[rows] = token
        drawn = position + 1
        over = ends | (drawn >= seats.limit[seat])
        seats.ended_at[seat] = torch.where(over, drawn, 0)
        self.alive[rows] = alive & ~over
        if not self.goes_on:  # a row that has ended reads only the token that it writes, over its first one
            self.pool.lengths[rows].mul_(self.alive[rows])

    # --- on the host --------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Let rows go that were released, and take the queue's requests: some go on with kept rows, others wait."""
        for place in self.engine.released & self.kept.keys():
            self._let_go(self.kept.pop(place))
        self.engine.released.clear()
        going_on: list[RowInFlight] = []
        while self.queue and len(self.queue[0].prompt) <= self.longest:  # the tables are too short for a longer one
            group = []
            for request in take_group(self.queue):
                if row := self._going_on(request):
                    going_on.append(row)
                else:
                    group.append(request)
            self.waiting.extend(self._that_fit(group))
        if going_on:
            self._compute(going_on)

    def _going_on(self, request: Request) -> RowInFlight | None:
        """The row that the request goes on with; None where it has to be computed."""
        row = self.kept.pop((request.group, request.sample), None)
        if row is None:
            return None
        own = request.prompt[len(row.prompt.ids) :]
        limit = len(own) + limit_of(request, self.most)
        is_short = limit <= row.room and len(own) - len(row.own) <= ANSWER_TOKENS
        if not (is_short and begins_with(request, row.prompt.ids + row.own)):
            self._let_go(row)
            return None
        self.held.remove(row)
        return replace(row, request=request, limit=limit, length=len(row.own) - 1, own=own)

    def _that_fit(self, group: list[Request]) -> Iterator[list[Request]]:
        """Requests of one prompt in parts that fit by themselves."""
        part: list[Request] = []
        for request in group:
            if part and (len(part) == len(self.seat) or self._pages_for([*part, request]) > self.pool.num_pages):
                yield part
                part = []
            part.append(request)
        if part:
            yield part

    def _pages_for(self, group: list[Request]) -> int:
        """Most pages of requests with one prompt."""
        return pages_of(len(group[0].prompt)) + sum(pages_of(self._room(each)) for each in group)

    def _room(self, request: Request) -> int:
        """Most tokens of its own that a row comes to have which is computed for a request."""
        return self.most - request.offset if self._keeps(request) else limit_of(request, self.most)

    def _keeps(self, request: Request) -> bool:
        """Whether the row stays once it has ended by itself."""
        return self.goes_on and request.keeps

    def _admit(self) -> None:
        """Prefill as many waiting prompts as there are pages for, once a quarter of all pages is free."""
        pool = self.pool
        while self.waiting:
            spare = len(pool.free) - sum(pages_of(row.room) - len(row.pages) for row in self.held)
            if self.rows and spare < pool.num_pages // 4:
                return
            chosen: list[list[Request]] = []
            tokens = rows = 0
            while self.waiting:
                group, length = self.waiting[0], len(self.waiting[0][0].prompt)
                need = self._pages_for(group)
                full = need > spare or len(self.held) + rows + len(group) > len(self.seat)
                if full or (chosen and tokens + length > PREFILL_TOKENS):
                    break
                spare, tokens, rows = spare - need, tokens + length, rows + len(group)
                chosen.append(self.waiting.popleft())
            if not chosen:
                return
            self._prefill(chosen)

    def _prefill(self, groups: list[list[Request]]) -> None:
        """Compute the prompts of groups in a row, and draw the first token of each sequence."""
        layout, logits = prefill(self.model, [group[0].prompt for group in groups])
        new: list[list[RowInFlight]] = []
        for group in groups:
            ids = group[0].prompt
            prompt = PromptInFlight(ids, self.places.pop(), self.pool.take(len(ids)), len(group))
            new.append([RowInFlight(each, self.seats.free.pop(), prompt, self._room(each), limit_of(each, self.most))
                        for each in group])  # fmt: skip
        self.pool.store(layout, [rows[0].prompt.pages for rows in new])
        self.seats.routes.keep_prompts([[row.seat for row in rows] for rows in new], layout.lengths)
        which = torch.tensor([n for n, rows in enumerate(new) for _ in rows])
        places = self._compute([row for rows in new for row in rows])
        (which,) = to_device([which], self.device)
        self._draw(logits[which], places)

    def _compute(self, rows: list[RowInFlight]) -> slice:
        """Take rows among those that are computed, and return their places."""
        first = len(self.rows)
        self.rows += rows
        self.held |= set(rows)
        seats, lengths = [row.seat for row in rows], [row.length for row in rows]
        answers = [row.own[row.length + 1 :] for row in rows]
        self.seats.place([row.request for row in rows], seats, [len(row.own) for row in rows], answers)
        newest = [row.own[row.length] if row.own else 0 for row in rows]
        columns = [torch.tensor(column) for column in (seats, newest, lengths)]
        places = slice(first, len(self.rows))
        self.seat[places], self.last[places], self.pool.lengths[places] = to_device(columns, self.device)
        self.alive[places] = True
        return places

    def _lay_tables(self) -> None:
        """Give every row pages for the next steps, and tell the device whose pages are which."""
        pool, rows = self.pool, self.rows
        self.steps = min(STEPS, max(self._steps_left(row) for row in rows))
        for row in rows:
            row.length = min(row.length + self.steps, row.limit)
            row.pages += pool.take(row.length, len(row.pages))
        self.computed, self.tiles = lay_tables(pool, rows)

    def _look(self) -> list[Trajectory]:
        """Queue a look at who is alive, and act upon the one before: drop the rows that had ended, and those that have
        all of their tokens by now, and queue a copy of them. Returns the trajectories whose copies were queued before
        that."""
        before, self.looked = self.looked, (list(self.rows), HostCopy(self.alive[: len(self.rows)]))
        trajectories = self._ended()
        ended = {row for row in self.rows if self._steps_left(row) <= 0}
        if before is not None:
            rows, flags = before
            ended |= {row for row, alive in zip(rows, flags.tensors()[0].tolist(), strict=True) if not alive}
        if ended := ended & set(self.rows):
            self._drop(ended)
        return trajectories

    def _steps_left(self, row: RowInFlight) -> int:
        """Steps until a row has as many tokens as it may have; its first one was drawn before any."""
        return row.limit - 1 - row.length

    def _drop(self, ended: set[RowInFlight]) -> None:
        """Drop rows from those that are computed."""
        dropped = [row for row in self.rows if row in ended]
        staying = [n for n, row in enumerate(self.rows) if row not in ended]
        seats, order = to_device([torch.tensor([row.seat for row in dropped]),
                                  torch.tensor(staying, dtype=torch.int64)], self.device)  # fmt: skip
        routes = self.seats.routes.of_prompts([row.seat for row in dropped])
        self.results.append((dropped, routes, HostCopy(*self.seats.drawn(seats))))
        for row in dropped:
            if not self._keeps(row.request):
                self._let_go(row)
        was, now = len(self.rows), len(staying)
        self.rows = [self.rows[n] for n in staying]
        for buffer, nothing in ((self.seat, self.seats.nobody), (self.last, 0), (self.alive, False),
                                (self.pool.lengths, 0)):  # fmt: skip
            buffer[:now] = buffer[order]
            buffer[now:was] = nothing

    def _let_go(self, row: RowInFlight) -> None:
        """Give back what a row has."""
        self.held.remove(row)
        self.seats.free.append(row.seat)
        self.pool.give_back(row.pages)
        row.prompt.rows -= 1
        if not row.prompt.rows:
            self.pool.give_back(row.prompt.pages)
            self.places.append(row.prompt.place)

    def _ended(self) -> list[Trajectory]:
        """The trajectories whose copies were queued, waiting for these; the rows of some are kept from now on."""
        results, self.results = self.results, deque()
        trajectories = []
        for rows, of_prompts, copy in results:
            tensors = copy.tensors()
            lengths, tokens, logprobs = (tensor.tolist() for tensor in tensors[:3])
            routes = self.seats.routes.of(of_prompts, lengths, tensors[3:])
            for row, length, ids, values, taken in zip(rows, lengths, tokens, logprobs, routes, strict=True):
                drawn = slice(len(row.own), length)
                trajectories.append(
                    trajectory(row.request, ids[drawn], values[drawn], self.end_ids, self.sampling, taken)
                )
                if not self._keeps(row.request):
                    continue
                if trajectories[-1].finished:
                    row.own = ids[:length]
                    self.kept[row.request.group, row.request.sample] = row
                else:
                    self._let_go(row)
        return trajectories
