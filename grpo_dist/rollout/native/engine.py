"""The native engine: each prompt is computed once for its whole group, and nothing that has ended is computed at all.

Sequences leave the batch as they end, and waiting prompts enter as room is freed, so that memory is bounded by
`max_tokens_in_flight` and not by the size of the step. A step of decoding changes tensors in place and reads nothing
back; only every few steps is the device asked who has ended. On a GPU the step is captured and replayed (`graphs.py`).

Shapes: N requests, R sequences in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor, nn

from ...types import Trajectory
from ..engine import Decoder, Request, columns_of, take_group, trajectory
from ..sampling import Rules, Sampling, draw
from .cache import EVERYTHING, DecodeState, longer
from .drafted import DraftedSteps, Drafts
from .graphs import Replayed
from .kept import KeptRows
from .routes import RouteTable
from .steps import SeveralTokensStep, Step, module_step, prefill

COMPACT_BELOW = {"cpu": 0.85, "cuda": 0.7}
"""Ended sequences are dropped when fewer than this share of those computed are alive: dropping copies the cache, and on
a GPU captures the step anew."""
COPIED_PROMPT = 64
"""Where no prompt is longer than this many tokens, each sequence has its own copy of the prompt's keys and values."""
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 8}
"""Steps until the device is asked who has ended: asking waits for it."""


class NativeDecoder(Decoder):
    """Decodes with shared prompts; needs a model loaded with `attn_implementation=attention.NAME`."""

    def __init__(
        self, end_ids: list[int], max_new_tokens: int, max_tokens_in_flight: int, *,
        step_of: Callable[[nn.Module], Step] = module_step, steps_between_checks: int | None = None,
        captures: bool = True, copied_prompt: int | None = None, pages: bool = False, drafts: bool = False,
    ) -> None:  # fmt: skip
        """All but the first three change the speed alone: `step_of` (how to make a step of decoding from a model),
        `steps_between_checks` (by default the device's), `captures` (on a GPU), `copied_prompt` (by default
        COPIED_PROMPT), `pages` (on a GPU with Triton: keys and values lie in pages, see `gpu.py`), and `drafts` (for a
        step that computes several tokens of a row)."""
        self.end_ids, self.max_new_tokens, self.max_tokens_in_flight = end_ids, max_new_tokens, max_tokens_in_flight
        self.steps_between_checks, self.captures, self.step_of = steps_between_checks, captures, step_of
        self.copied_prompt = COPIED_PROMPT if copied_prompt is None else copied_prompt
        self.pages, self.drafts = pages, Drafts(end_ids) if drafts else None
        self.released: set[tuple[int, int]] = set()

    @torch.inference_mode()
    def decode(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """See `Decoder`."""
        if self.pages:
            yield from self._over_pages(model, queue, sampling)
            return
        with closing(Decoding(self, model, queue, sampling)) as decoding:
            yield from decoding.run()

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """See `Engine`."""
        self.released.update(places)

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        return self.drafts.metrics() if self.drafts else {}

    def _over_pages(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        from .gpu import DecodingOverPages  # needs Triton

        while queue:  # again for requests that are longer than the tables
            with closing(DecodingOverPages(self, model, queue, sampling)) as decoding:
                yield from decoding.run()


class Decoding:
    """One call of `decode`."""

    def __init__(self, engine: NativeDecoder, model: nn.Module, queue: deque[Request], sampling: Sampling) -> None:
        self.engine, self.model, self.queue, self.sampling = engine, model, queue, sampling
        self.device = next(model.parameters()).device
        kind = self.device.type
        self.compact_below = COMPACT_BELOW.get(kind, COMPACT_BELOW["cuda"])
        self.steps_between_checks = engine.steps_between_checks or STEPS_BETWEEN_CHECKS.get(kind, 1)
        self.requests: list[Request] = []  # all that were taken from the queue
        self.has_turns = False  # whether others may go on with one of them
        self.waiting: deque[list[int]] = deque()  # places in `requests`, in groups with one prompt
        self.finished: list[Trajectory] = []  # not yet handed out
        self.longest_prompt = max((len(request.prompt) for request in queue), default=0)
        self.shares = self.longest_prompt > engine.copied_prompt
        self.state = DecodeState(self.device, engine.max_new_tokens, shares=self.shares, whole_chunks=kind == "cuda")
        captures = kind == "cuda" and engine.captures
        self.replayed = Replayed(self._step, lambda: self.state.version) if captures else None
        self.decode = engine.step_of(model)
        self.routes = RouteTable(model, engine.max_new_tokens, self.device)
        self.rules = Rules(sampling, engine.end_ids, self.device)
        self.several = several = self.decode if isinstance(self.decode, SeveralTokensStep) else None
        self.draw = several.draw if several else draw
        self.together = several.together(self) if several else None
        self.drafted = DraftedSteps(self, several, engine.drafts) if several and engine.drafts else None
        self.row_request = torch.zeros(0, dtype=torch.int64, device=self.device)  # (R,) place in `requests`
        self.last = torch.zeros(0, dtype=torch.int64, device=self.device)  # (R,) newest token
        self.alive = torch.zeros(0, dtype=torch.bool, device=self.device)  # (R,)
        self.reported = torch.zeros(0, dtype=torch.bool)  # (R,) ended, and its trajectory collected
        self.kept = torch.zeros(0, dtype=torch.bool)  # (R,) ended, and waits for a request that goes on with it
        self.keeping = KeptRows(self, several) if self.shares and several else None
        self.keys = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,)
        self.limit = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,) most tokens to sample
        self.offset = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,) tokens before the first one
        self.may_end = torch.zeros(0, dtype=torch.bool, device=self.device)  # (N,)
        self.start = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,) own tokens of its row before it
        self.ended_at = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,) tokens sampled, once it has ended
        # one place more than there can be tokens, for what ended rows draw until they are dropped
        self.tokens = torch.zeros((0, engine.max_new_tokens + 1), dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros((0, engine.max_new_tokens + 1), dtype=torch.float32, device=self.device)

    @property
    def row_tokens(self) -> int:
        """Most tokens a sequence's own cache comes to hold; with copied prompts it has room for the longest of them."""
        return self.engine.max_new_tokens + (0 if self.shares else self.longest_prompt)

    def _take(self) -> None:
        """Take all requests of the queue, in groups that fit in flight by themselves."""
        if not self.queue:
            return
        first = len(self.requests)
        self.longest_prompt = max(self.longest_prompt, *(len(request.prompt) for request in self.queue))
        while self.queue:
            group = take_group(self.queue)
            places = list(range(len(self.requests), len(self.requests) + len(group)))
            self.requests += group
            if self.keeping and not (places := [n for n in places if not self.keeping.goes_on(n)]):
                continue
            most = max(1, (self.engine.max_tokens_in_flight - self._shared(places)) // self.row_tokens)
            self.waiting.extend(places[start : start + most] for start in range(0, len(places), most))
        new = self.requests[first:]
        self.has_turns |= any(request.keeps for request in new)
        keys, limit, offset, may_end = columns_of(new, self.engine.max_new_tokens, self.device)
        self.rules.grow(len(new))
        self.routes.grow(len(new))
        self.keys, self.limit = torch.cat([self.keys, keys]), torch.cat([self.limit, limit])
        self.offset, self.may_end = torch.cat([self.offset, offset]), torch.cat([self.may_end, may_end])
        self.start, self.ended_at = longer(self.start, len(new)), longer(self.ended_at, len(new))
        self.tokens, self.logprobs = longer(self.tokens, len(new)), longer(self.logprobs, len(new))
        self.state.version += 1  # a captured step knows the tables of before

    def run(self) -> Iterator[list[Trajectory]]:
        """Decode until every request is answered."""
        while True:
            if self.keeping:
                self.keeping.release(self.engine.released)
            self.engine.released.clear()
            self._take()
            if not self.waiting and not self.state.num_rows:
                return
            if self.keeping:
                self.keeping.enter()
            self._admit()
            for _ in range(self.steps_between_checks):
                if not self.state.num_rows or (self.kept.any() and not self.alive.any()):  # all have ended
                    break
                (self.drafted or self.advance)()
            self._retire()
            finished, self.finished = self.finished, []
            yield finished

    def close(self) -> None:
        """Let go now of what refers back to this object, and would hold its memory until it is collected."""
        self.replayed = self.together = self.drafted = self.keeping = None

    def advance(self, most: int = EVERYTHING) -> tuple[int, int]:
        """One more token of every row that is not kept, or several, at most so many, of those that are alive. Returns
        the steps and the tokens of all rows."""
        if self.together:
            return self.together(most)
        self.state.make_room()
        (self.replayed or self._step)()
        self.state.count_step()
        return 1, self.state.num_rows

    def _step(self) -> None:
        """One more token of every row that is not kept; sizes and places in memory stay as they are."""
        # rows that have ended go on for nothing until they are dropped, but never past the model's last position
        own = self.state.lengths.clamp(max=self.engine.max_new_tokens - 1)
        positions = self.state.prompt_lengths[self.state.prompt] + own
        rows = self.alive.nonzero()[:, 0] if self.kept.any() else slice(None)
        self.state.begin_step(None if isinstance(rows, slice) else rows)
        logits = self.decode(self.last[rows], positions[rows], self.state)
        if self.routes.keeps:
            self.routes.keep_step(self.row_request[rows], self.state.lengths[rows])
        self.state.end_step()
        self._draw(logits, rows)

    def _shared(self, group: list[int]) -> int:
        """Tokens that requests with one prompt share."""
        return len(self.requests[group[0]].prompt) if self.shares else 0

    def _reserved(self) -> int:
        shared = int(self.state.prompt_lengths.sum()) if self.shares else 0
        return shared + self.state.num_rows * self.row_tokens

    def _admit(self) -> None:
        """Prefill as many waiting prompts as there is room for, once enough room is free to be worth it."""
        if not self.waiting:
            return
        room = self.engine.max_tokens_in_flight - self._reserved()
        if self.state.num_rows and room < self.engine.max_tokens_in_flight // 4:
            return
        groups: list[list[int]] = []
        while self.waiting:
            need = self._shared(self.waiting[0]) + len(self.waiting[0]) * self.row_tokens
            if need > room and (groups or self.state.num_rows):
                break
            room -= need
            groups.append(self.waiting.popleft())
        for by_step in (True, False):
            if part := [group for group in groups if self._enters(group) == by_step]:
                self._prefill(part, by_step)

    def _enters(self, group: list[int]) -> bool:
        """Whether the step computes the group's prompt, and not the model's own modules."""
        return self.several is not None and self.several.enters(len(self.requests[group[0]].prompt))

    def _prefill(self, groups: list[list[int]], by_step: bool) -> None:
        """Compute the groups' prompts, and draw the first token of each sequence."""
        prompts, sizes = [self.requests[group[0]].prompt for group in groups], [len(group) for group in groups]
        layout, logits = self.several.prefill(prompts) if by_step and self.several else prefill(self.model, prompts)
        self.routes.keep_prompts(groups, layout.lengths)
        prompt_of_row = self.state.admit(layout, sizes)
        new = torch.tensor([n for group in groups for n in group], device=self.device)
        self.row_request = torch.cat([self.row_request, new])
        self.last = torch.cat([self.last, torch.zeros_like(new)])
        self.alive = torch.cat([self.alive, torch.ones_like(new, dtype=torch.bool)])
        self.reported, self.kept = (torch.cat([each, torch.zeros(len(new), dtype=torch.bool)])
                                    for each in (self.reported, self.kept))  # fmt: skip
        first = self.state.num_rows - len(new)
        self._draw(logits.index_select(0, prompt_of_row), slice(first, None))
        self._retire()

    def _draw(self, logits: Tensor, rows: slice | Tensor) -> None:
        """Sample the next token of some rows, in place."""
        request, position = self.row_request[rows], self.state.lengths[rows]
        places = self.offset[request] + position
        token, logprob = self.draw(logits, self.keys[request], places, self.sampling, self.rules)
        self.take(rows, request, position, token, logprob)

    def take(self, rows: slice | Tensor, request: Tensor, position: Tensor, token: Tensor, logprob: Tensor) -> None:
        """Take in the newest token of some rows, in place; `position` is its place among the row's own tokens."""
        self.tokens[request, position] = token
        self.logprobs[request, position] = logprob
        self.last[rows] = token
        ends = self.rules.ended(token, request, self.offset[request] + position)
        over = (ends & self.may_end[request]) | (position + 1 >= self.limit[request])
        ends_now = self.alive[rows] & over
        self.ended_at[request] = torch.where(ends_now, position + 1, self.ended_at[request])
        self.alive[rows] &= ~over

    def _retire(self) -> None:
        """Collect the trajectories that have ended, and drop their rows when there are enough of them."""
        alive = self.alive.cpu()
        new = (~alive & ~self.reported).nonzero()[:, 0]
        if len(new):
            self._finish(new, self.row_request[new.to(self.device)])
            self.reported |= ~alive
        count = int((alive | self.kept).sum())
        if count == self.state.num_rows or (count and count > self.compact_below * self.state.num_rows):
            return
        rows = (alive | self.kept).nonzero()[:, 0]
        self.reported, self.kept = self.reported[rows], self.kept[rows]
        rows = rows.to(self.device)
        self.state.keep(rows)
        self.row_request, self.last, self.alive = self.row_request[rows], self.last[rows], self.alive[rows]

    def _finish(self, rows: Tensor, ended: Tensor) -> None:
        """Collect the trajectories of `rows` (on the host) that have ended, and of their requests `ended`."""
        starts, lengths = self.start[ended], self.ended_at[ended]
        longest = int(lengths.max())
        ids, logprobs = self.tokens[ended, :longest].tolist(), self.logprobs[ended, :longest].tolist()
        routes = self.routes.of(self.routes.of_prompts(ended.tolist()), lengths.tolist(), self.routes.of_drawn(ended))
        columns = [column.tolist() for column in (rows, ended, starts, lengths)]
        for row, n, start, length, drawn, values, taken in zip(*columns, ids, logprobs, routes, strict=True):
            request, own = self.requests[n], slice(start, length)
            answer = trajectory(request, drawn[own], values[own], self.engine.end_ids, self.sampling, taken)
            self.finished.append(answer)
            if self.engine.drafts:
                self.engine.drafts.add(request, start, answer.ids)
            if self.keeping and request.keeps and answer.finished:
                self.keeping.keep(row, n, answer.ids)
