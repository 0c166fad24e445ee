"""Decoding on a GPU: pages, captured steps, and a host that never makes the device wait.

Rows have places in fixed buffers, so that a step of R rows is captured once and replayed whenever R rows are computed;
R climbs a short ladder, and places above the last request are rows of nobody. While the device computes some steps the
host looks at who had ended before them, hands out completions and prepares tables; it waits for copies that were queued
before those steps, never for the steps.

Shapes: N requests, C most rows, R rows computed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...distributed.transfer import to_device
from ...types import Trajectory
from ..engine import NOBODY, Request, columns_of, limit_of, trajectory
from ..room import PAGE, PREFILL_TOKENS, pages_of
from ..sampling import Rules, Sampling
from .fused_draw import fused_draw
from .graphs import Sizes
from .pages import TILE, PagePool
from .routes import RouteTable
from .steps import prefill

if TYPE_CHECKING:
    from .engine import NativeDecoder

LADDER = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
"""Numbers of rows for which a step is captured; above the last one, its multiples."""
STEPS = 8
"""Steps between two looks at who has ended."""


@dataclass
class _Prompt:
    """A prompt in flight."""

    ids: list[int]
    place: int
    pages: list[int]
    rows: int


@dataclass
class _Row:
    """A sequence in flight; `length` is the number of steps that it has been in, at most the longest completion."""

    request: int
    prompt: _Prompt
    pages: list[int] = field(default_factory=list)
    length: int = 0


class HostCopy:
    """Tensors on their way to the host; `values` waits for what was queued before them, and for nothing later."""

    def __init__(self, *tensors: Tensor) -> None:
        self.event = None
        if not tensors[0].is_cuda:
            self.copies = [tensor.clone() for tensor in tensors]
            return
        self.copies = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
        ]
        self.event = torch.cuda.Event()
        self.event.record()

    def tensors(self) -> list[Tensor]:
        """The tensors on the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.copies

    def values(self) -> list[list]:
        """The tensors as lists."""
        return [copy.tolist() for copy in self.tensors()]


class DecodingOverPages:
    """Some requests decoded on a GPU."""

    def __init__(self, engine: NativeDecoder, model: nn.Module, requests: list[Request], sampling: Sampling) -> None:
        self.model, self.requests, self.sampling = model, requests, sampling
        self.end_ids, self.most = engine.end_ids, engine.max_new_tokens
        self.device = device = next(model.parameters()).device
        longest = max((len(request.prompt) for request in requests), default=1)
        groups = [list(members) for _, members in groupby(range(len(requests)), key=lambda n: requests[n].slot)]
        needed = sum(pages_of(len(requests[g[0]].prompt)) + len(g) * pages_of(self.most) for g in groups)
        least = pages_of(longest) + pages_of(self.most)
        num_pages = max(least, min(needed, engine.max_tokens_in_flight // PAGE))
        self.waiting = deque(piece for group in groups for piece in self._that_fit(group, num_pages))
        capacity = _rung(min(len(requests), max(1, num_pages // pages_of(self.most))))
        self.pool = PagePool(device, num_pages, capacity, self.most, longest)
        self.places = list(range(capacity - 1, -1, -1))  # of prompts
        self.decode = engine.step_of(model)
        self.rows: list[_Row] = []
        self.advance = Sizes(self._step) if engine.captures and device.type == "cuda" else self._step
        nobody = len(requests)
        self.row_request = torch.full((capacity,), nobody, device=device)
        self.last = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.alive = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.keys, self.limit, self.offset, self.may_end = columns_of([*requests, NOBODY], self.most, device)
        self.rules = Rules(sampling, engine.end_ids, device)
        self.rules.grow(nobody + 1)
        self.tokens = torch.zeros((nobody + 1, self.most), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((nobody + 1, self.most), dtype=torch.float32, device=device)
        self.ended_at = torch.zeros(nobody + 1, dtype=torch.int64, device=device)
        self.routes = RouteTable(model, self.most, device)
        self.routes.grow(nobody + 1)
        self.looked: tuple[list[_Row], HostCopy] | None = None
        self.results: deque[tuple[list[int], HostCopy]] = deque()

    def _that_fit(self, group: list[int], num_pages: int) -> list[list[int]]:
        """Requests of one prompt in parts that fit by themselves."""
        each = pages_of(self.most)
        most = max(1, (num_pages - pages_of(len(self.requests[group[0]].prompt))) // each)
        return [group[start : start + most] for start in range(0, len(group), most)]

    def run(self) -> Iterator[list[Trajectory]]:
        """Decode until every request is answered."""
        while self.waiting or self.rows:
            self._admit()
            self._lay_tables()
            for _ in range(self.steps):
                self.advance(self.computed, self.tiles)
            yield self._look()
        yield self._ended()

    def close(self) -> None:
        """Let go now of what refers back to this object, and would hold pages and graphs until it is collected."""
        del self.advance

    # --- on the device ------------------------------------------------------------------------------------------------

    def _step(self, rows: int, tiles: int) -> None:
        """One more token of every row; nothing is allocated that outlives it, and nothing is read back."""
        pool = self.pool
        pool.begin_step(rows, tiles)
        positions = pool.prompt_lengths[pool.prompt[:rows]] + pool.lengths[:rows]
        logits = self.decode(self.last[:rows], positions.long(), pool)
        if self.routes.keeps:
            self.routes.keep_step(self._request(slice(0, rows)), pool.lengths[:rows].long())
        pool.lengths[:rows].add_(self.alive[:rows])
        self._draw(logits, slice(0, rows))

    def _request(self, rows: slice) -> Tensor:
        """The requests of rows; what has ended goes on for nobody."""
        return torch.where(self.alive[rows], self.row_request[rows], len(self.requests))

    def _draw(self, logits: Tensor, rows: slice) -> None:
        alive, position, request = self.alive[rows], self.pool.lengths[rows].long(), self._request(rows)
        place = self.offset[request] + position
        token, logprob = fused_draw(logits, self.keys[request], place, self.sampling, self.rules)
        ends = self.rules.ended(token, request, place) & self.may_end[request]
        self.tokens[request, position] = token
        self.logprobs[request, position] = logprob
        self.last[rows] = token
        drawn = position + 1
        over = ends | (drawn >= self.limit[request])
        self.ended_at[request] = torch.where(over, drawn, 0)
        self.alive[rows] = alive & ~over
        self.pool.lengths[rows].mul_(self.alive[rows])  # a row that has ended reads no more than the token it writes

    # --- on the host --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Prefill as many waiting prompts as there are pages for, once a quarter of all pages is free."""
        pool = self.pool
        each = pages_of(self.most)
        while self.waiting:
            spare = len(pool.free) - sum(each - len(row.pages) for row in self.rows)
            if self.rows and spare < pool.num_pages // 4:
                return
            chosen: list[list[int]] = []
            tokens = rows = 0
            while self.waiting:
                ids, count = self.requests[self.waiting[0][0]].prompt, len(self.waiting[0])
                need = pages_of(len(ids)) + count * each
                full = need > spare or len(self.rows) + rows + count > len(self.row_request)
                if full or (chosen and tokens + len(ids) > PREFILL_TOKENS):
                    break
                spare, tokens, rows = spare - need, tokens + len(ids), rows + count
                chosen.append(self.waiting.popleft())
            if not chosen:
                return
            self._prefill(chosen)

    def _prefill(self, groups: list[list[int]]) -> None:
        """Compute the prompts of groups in a row, and draw the first token of each sequence."""
        pool, first = self.pool, len(self.rows)
        prompts = []
        for group in groups:
            ids = self.requests[group[0]].prompt
            prompts.append(_Prompt(ids, self.places.pop(), pool.take(len(ids)), len(group)))
            self.rows += [_Row(n, prompts[-1]) for n in group]
        layout, logits = prefill(self.model, [prompt.ids for prompt in prompts])
        self.routes.keep_prompts(groups, layout.lengths)
        pool.store(layout, [prompt.pages for prompt in prompts])
        new = slice(first, len(self.rows))
        which = torch.tensor([n for n, group in enumerate(groups) for _ in group])
        which, request = to_device([which, torch.tensor([n for group in groups for n in group])], self.device)
        self.row_request[new] = request
        self.alive[new] = True
        pool.lengths[new] = 0
        self._draw(logits[which], new)

    def _lay_tables(self) -> None:
        """Give every row pages for the next steps, and tell the device whose pages are which."""
        pool, rows = self.pool, self.rows
        self.steps = min(STEPS, max(self._steps_left(row) for row in rows))
        for row in rows:
            row.length = min(row.length + self.steps, self.most)
            row.pages += pool.take(row.length, len(row.pages))
        members: dict[int, tuple[_Prompt, list[int]]] = {}
        for n, row in enumerate(rows):
            members.setdefault(row.prompt.place, (row.prompt, []))[1].append(n)
        tiles = [(prompt.place, of[start : start + TILE])
                 for prompt, of in members.values() for start in range(0, len(of), TILE)]  # fmt: skip
        self.computed, self.tiles = _rung(len(rows)), 1 << (len(tiles) - 1).bit_length() if tiles else 1
        spare = self.tiles - len(tiles)
        self._send([
            (pool.table[: self.computed], _table([row.pages for row in rows], self.computed, pool.table.shape[1])),
            (pool.prompt_table, _table({p.place: p.pages for p, _ in members.values()}, *pool.prompt_table.shape)),
            (pool.prompt_lengths,
             _column({p.place: len(p.ids) for p, _ in members.values()}, len(pool.prompt_lengths))),
            (pool.prompt[: self.computed], _column([row.prompt.place for row in rows], self.computed)),
            (pool.tile_prompt[: self.tiles], torch.tensor([place for place, _ in tiles] + [-1] * spare)),
            (pool.tile_rows[: self.tiles],
             torch.tensor([of + [-1] * (TILE - len(of)) for _, of in tiles] + [[-1] * TILE] * spare)),
        ])  # fmt: skip

    def _send(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for (to, _), sent in zip(pairs, to_device([values.int() for _, values in pairs], self.device), strict=True):
            to.copy_(sent)

    def _look(self) -> list[Trajectory]:
        """Queue a look at who is alive, and act upon the one before: drop the rows that had ended, and those that have
        all of their tokens by now, and queue a copy of them. Returns the trajectories whose copies were queued before
        that."""
        before, self.looked = self.looked, (list(self.rows), HostCopy(self.alive[: len(self.rows)]))
        trajectories = self._ended()
        ended = {id(row) for row in self.rows if self._steps_left(row) <= 0}
        if before is not None:
            rows, flags = before
            ended |= {id(row) for row, alive in zip(rows, flags.values()[0], strict=True) if not alive}
        if ended := ended & {id(row) for row in self.rows}:
            self._drop(ended)
        return trajectories

    def _steps_left(self, row: _Row) -> int:
        """Steps until a row has as many tokens as it may have; its first one was drawn before any."""
        return limit_of(self.requests[row.request], self.most) - 1 - row.length

    def _drop(self, ended: set[int]) -> None:
        """Drop the rows with these identities."""
        requests = [row.request for row in self.rows if id(row) in ended]
        (places,) = to_device([torch.tensor(requests)], self.device)
        copy = HostCopy(self.ended_at[places], self.tokens[places], self.logprobs[places],
                        *self.routes.of_drawn(places))  # fmt: skip
        self.results.append((requests, copy))
        alive_rows = [n for n, row in enumerate(self.rows) if id(row) not in ended]
        for row in self.rows:
            if id(row) in ended:
                self._let_go(row)
        (order,) = to_device([torch.tensor(alive_rows, dtype=torch.int64)], self.device)
        was, now = len(self.rows), len(alive_rows)
        self.rows = [self.rows[n] for n in alive_rows]
        for buffer, nothing in ((self.row_request, len(self.requests)), (self.last, 0), (self.alive, False),
                                (self.pool.lengths, 0)):  # fmt: skip
            buffer[:now] = buffer[order]
            buffer[now:was] = nothing

    def _let_go(self, row: _Row) -> None:
        self.pool.give_back(row.pages)
        row.prompt.rows -= 1
        if not row.prompt.rows:
            self.pool.give_back(row.prompt.pages)
            self.places.append(row.prompt.place)

    def _ended(self) -> list[Trajectory]:
        """The trajectories whose copies were queued, waiting for these."""
        results, self.results = self.results, deque()
        trajectories = []
        for requests, copy in results:
            tensors = copy.tensors()
            lengths, tokens, logprobs = (tensor.tolist() for tensor in tensors[:3])
            routes = self.routes.of(requests, lengths, tensors[3:])
            trajectories += [
                trajectory(self.requests[n], ids[:length], values[:length], self.end_ids, self.sampling, taken)
                for n, length, ids, values, taken in zip(requests, lengths, tokens, logprobs, routes, strict=True)
            ]
        return trajectories


def _rung(rows: int) -> int:
    """How many rows are computed for `rows` of them."""
    top = LADDER[-1]
    return LADDER[bisect_left(LADDER, rows)] if rows <= top else -(-rows // top) * top


def _table(pages: list[list[int]] | dict[int, list[int]], rows: int, width: int) -> Tensor:
    table = [[0] * width for _ in range(rows)]  # one tensor of lists: a tensor for each row takes ten times as long
    for n, each in pages.items() if isinstance(pages, dict) else enumerate(pages):
        table[n][: len(each)] = each
    return torch.tensor(table, dtype=torch.int32)


def _column(values: list[int] | dict[int, int], rows: int) -> Tensor:
    column = [0] * rows
    for n, each in values.items() if isinstance(values, dict) else enumerate(values):
        column[n] = each
    return torch.tensor(column, dtype=torch.int32)
