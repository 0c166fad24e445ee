"""The native engine: each prompt is computed once for its whole group, and nothing that has ended is computed at all.

Keys and values of a prompt are held once, whatever the size of its group; each sequence adds only its own. A step of
decoding attends to both parts and joins them under one softmax. Sequences leave the batch as they end, and waiting
prompts enter as room is freed, so that memory is bounded by `max_tokens_in_flight` and not by the size of the step.

Shapes: R sequences in flight, P prompts in flight, Lp the longest of them, S slots for sampled tokens, Hq query heads,
Hk key heads, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn

from ..attention import BlockLayout, block_layout
from ..batch import Completion
from .engine import Request, finished_completion
from .sampling import Sampling, draw

COMPACT_BELOW = 0.85
"""Ended sequences are dropped when fewer than this share of those computed are alive: dropping copies the cache."""
SLOT_CHUNK = 32
"""Slots for sampled tokens are added this many at a time."""


class PrefillLayout:
    """A row of whole prompts that keeps the keys and values it sees."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.blocks: BlockLayout = block_layout([(length, []) for length in lengths]).to(device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`."""
        if layer in self.keys:
            raise ValueError(f"layer {layer} attends more than once")
        self.keys[layer], self.values[layer] = key[0], value[0]
        return self.blocks.attend(layer, query, key, value, scale)


class DecodeState:
    """Keys and values of everything in flight, and the attention over them: the layout of a decoding step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.prompt_keys: dict[int, Tensor] = {}  # layer -> (P, Hk, Lp, D)
        self.prompt_values: dict[int, Tensor] = {}
        self.own_keys: dict[int, Tensor] = {}  # layer -> (R, Hk, S, D)
        self.own_values: dict[int, Tensor] = {}
        self.prompt_lengths = torch.zeros(0, dtype=torch.int64, device=device)  # (P,)
        self.prompt = torch.zeros(0, dtype=torch.int64, device=device)  # (R,) each sequence's prompt
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)  # (R,) own tokens held

    @property
    def num_rows(self) -> int:
        """Sequences in flight."""
        return len(self.prompt)

    def admit(self, prefill: PrefillLayout, lengths: list[int], sizes: list[int]) -> None:
        """Add prompts of `lengths` tokens with `sizes` sequences each, from the row that computed them."""
        if not prefill.keys:
            raise ValueError("the model's attention never came to the layout it was given")
        held, longest = len(self.prompt_lengths), max([*self.prompt_lengths.tolist(), *lengths])
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        for layer in prefill.keys:
            for store, row in ((self.prompt_keys, prefill.keys), (self.prompt_values, prefill.values)):
                heads, _, size = row[layer].shape
                grown = row[layer].new_zeros((held + len(lengths), heads, longest, size))
                if held:
                    grown[:held, :, : store[layer].shape[2]] = store[layer]
                for place, (start, length) in enumerate(zip(starts, lengths, strict=True), held):
                    grown[place, :, :length] = row[layer][:, start : start + length]
                store[layer] = grown
            for store, row in ((self.own_keys, prefill.keys), (self.own_values, prefill.values)):
                heads, _, size = row[layer].shape
                slots = store[layer].shape[2] if layer in store else SLOT_CHUNK
                fresh = row[layer].new_zeros((sum(sizes), heads, slots, size))
                store[layer] = torch.cat([store[layer], fresh]) if layer in store else fresh
        self.prompt_lengths = torch.cat([self.prompt_lengths, torch.tensor(lengths, device=self.device)])
        places = torch.arange(held, held + len(lengths), device=self.device)
        self.prompt = torch.cat([self.prompt, places.repeat_interleave(torch.tensor(sizes, device=self.device))])
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(sum(sizes))])

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows`, and the prompts nobody is left of."""
        alive, self.prompt = torch.unique(self.prompt[rows], return_inverse=True)
        self.lengths = self.lengths[rows]
        if len(alive) < len(self.prompt_lengths):
            self.prompt_lengths = self.prompt_lengths[alive]
            longest = int(self.prompt_lengths.max()) if len(alive) else 0
            for store in (self.prompt_keys, self.prompt_values):
                for layer in store:
                    store[layer] = store[layer][alive, :, :longest]
        for store in (self.own_keys, self.own_values):
            for layer in store:
                store[layer] = store[layer][rows]

    def begin_step(self) -> None:
        """Make room for one more token of each sequence, and lay out who attends to what."""
        self.used = int(self.lengths.max()) + 1
        for store in (self.own_keys, self.own_values):
            for layer, held in store.items():
                if held.shape[2] < self.used:
                    rows, heads, slots, size = held.shape
                    grown = held.new_zeros((rows, heads, max(slots + SLOT_CHUNK, slots * 3 // 2), size))
                    grown[:, :, :slots] = held
                    store[layer] = grown
        counts = torch.bincount(self.prompt, minlength=len(self.prompt_lengths))
        self.most = int(counts.max())
        first = torch.cumsum(counts, 0) - counts
        self.seat = self.prompt * self.most + torch.arange(self.num_rows, device=self.device) - first[self.prompt]
        places = torch.arange(next(iter(self.prompt_keys.values())).shape[2], device=self.device)
        hidden_prompt = places >= self.prompt_lengths[self.prompt][:, None]
        hidden_own = torch.arange(self.used, device=self.device) > self.lengths[:, None]
        self.hidden = torch.cat([hidden_prompt, hidden_own], 1)[:, None, None]  # (R, 1, 1, Lp + used)
        self.rows = torch.arange(self.num_rows, device=self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `attention.Layout`; the row's T tokens are the R sequences' newest ones, in order."""
        query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # (R, H, D)
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        own_keys[self.rows, :, self.lengths] = key
        own_values[self.rows, :, self.lengths] = value
        prompt_keys, prompt_values = self.prompt_keys[layer], self.prompt_values[layer]
        num_rows, num_queries, size = query.shape
        heads, longest = prompt_keys.shape[1], prompt_keys.shape[2]
        query = (query * (size**-0.5 if scale is None else scale)).view(num_rows, heads, -1, size)
        repeat = query.shape[2]

        # prompts: all sequences of a prompt against its keys in one product, each sequence on a seat of its own
        seats = query.new_zeros((len(prompt_keys) * self.most, heads, repeat, size)).index_copy_(0, self.seat, query)
        seats = seats.view(-1, self.most, heads, repeat * size).transpose(1, 2)
        seats = seats.reshape(-1, heads, self.most * repeat, size)
        to_prompt = (seats @ prompt_keys.transpose(2, 3)).view(-1, heads, self.most, repeat, longest)
        to_prompt = to_prompt.transpose(1, 2).reshape(-1, heads, repeat, longest)[self.seat]
        to_own = query @ own_keys[:, :, : self.used].transpose(2, 3)

        scores = torch.cat([to_prompt, to_own], -1).float().masked_fill_(self.hidden, -torch.inf)
        weights = torch.softmax(scores, -1).to(query.dtype)
        for_prompt, for_own = weights[..., :longest], weights[..., longest:]

        spread = query.new_zeros((len(prompt_keys) * self.most, heads, repeat, longest))
        spread = spread.index_copy_(0, self.seat, for_prompt).view(-1, self.most, heads, repeat, longest)
        spread = spread.transpose(1, 2).reshape(-1, heads, self.most * repeat, longest)
        from_prompt = (spread @ prompt_values).view(-1, heads, self.most, repeat, prompt_values.shape[3])
        from_prompt = from_prompt.transpose(1, 2).flatten(0, 1).view(-1, heads, repeat, prompt_values.shape[3])
        output = from_prompt[self.seat] + for_own @ own_values[:, :, : self.used]
        return output.reshape(1, num_rows, num_queries, -1)


class NativeEngine:
    """Decodes with shared prompts; needs a model loaded with `attn_implementation=attention.NAME`."""

    def __init__(self, end_ids: list[int], max_new_tokens: int, max_tokens_in_flight: int) -> None:
        self.end_ids, self.max_new_tokens = end_ids, max_new_tokens
        self.max_tokens_in_flight = max_tokens_in_flight

    @torch.no_grad()
    def generate(
        self, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None = None, check: Callable[[], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See `Engine`."""
        return _Decoding(self, model, requests, sampling, on_finish).run(check)

    def reserved(self, prompt_length: int, num_sequences: int) -> int:
        """Most tokens a prompt and its sequences can come to hold."""
        return prompt_length + num_sequences * self.max_new_tokens


class _Decoding:
    """One call of `generate`."""

    def __init__(
        self, engine: NativeEngine, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None,
    ) -> None:  # fmt: skip
        self.engine, self.model, self.sampling, self.on_finish = engine, model, sampling, on_finish
        self.device = next(model.parameters()).device
        self.requests = requests
        self.waiting = deque(self._admissible(requests))
        self.state = DecodeState(self.device)
        self.ends = torch.tensor(engine.end_ids, device=self.device)
        self.row_request = torch.zeros(0, dtype=torch.int64, device=self.device)  # (R,) place in `requests`
        self.last = torch.zeros(0, dtype=torch.int64, device=self.device)  # (R,) newest token
        self.alive = torch.zeros(0, dtype=torch.bool, device=self.device)  # (R,)
        total, most = len(requests), engine.max_new_tokens
        self.keys = torch.tensor([request.key for request in requests], device=self.device, dtype=torch.int64)
        self.tokens = torch.zeros((total, most), dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros((total, most), dtype=torch.float32, device=self.device)
        self.done: list[Completion | None] = [None] * total

    def _admissible(self, requests: list[Request]) -> list[list[int]]:
        """Requests in groups with one prompt that fit in flight by themselves."""
        groups = []
        for _, members in groupby(range(len(requests)), key=lambda n: requests[n].slot):
            group = list(members)
            prompt = len(requests[group[0]].prompt)
            most = max(1, (self.engine.max_tokens_in_flight - prompt) // self.engine.max_new_tokens)
            groups += [group[start : start + most] for start in range(0, len(group), most)]
        return groups

    def run(self, check: Callable[[], None] | None) -> list[Completion]:
        """Decode until every request is answered."""
        while self.waiting or self.state.num_rows:
            if check:
                check()
            self._admit()
            if not self.state.num_rows:  # every sequence of the prompts just admitted ended with its first token
                continue
            self.state.begin_step()
            output = self.model(
                input_ids=self.last[None], position_ids=self._positions()[None], use_cache=False, layout=self.state
            )
            self.state.lengths += 1
            self._draw(output.logits[0])
            self._retire()
        return [completion for completion in self.done if completion is not None]

    def _positions(self) -> Tensor:
        # ended rows that still wait to be dropped go on for nothing, but never past the model's last position
        own = self.state.lengths.clamp(max=self.engine.max_new_tokens - 1)
        return self.state.prompt_lengths[self.state.prompt] + own

    def _reserved(self) -> int:
        own = self.state.num_rows * self.engine.max_new_tokens
        return int(self.state.prompt_lengths.sum()) + own

    def _admit(self) -> None:
        """Prefill as many waiting prompts as there is room for, once enough room is free to be worth it."""
        room = self.engine.max_tokens_in_flight - self._reserved()
        if not self.waiting or (self.state.num_rows and room < self.engine.max_tokens_in_flight // 4):
            return
        groups: list[list[int]] = []
        while self.waiting:
            need = self.engine.reserved(len(self.requests[self.waiting[0][0]].prompt), len(self.waiting[0]))
            if need > room and (groups or self.state.num_rows):
                break
            room -= need
            groups.append(self.waiting.popleft())
        if not groups:
            return
        prompts = [self.requests[group[0]].prompt for group in groups]
        lengths = [len(prompt) for prompt in prompts]
        layout = PrefillLayout(lengths, self.device)
        row = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        last = torch.cumsum(torch.tensor(lengths), 0).to(self.device) - 1
        output = self.model(
            input_ids=row[None], position_ids=positions[None], use_cache=False, layout=layout, logits_to_keep=last
        )
        sizes = [len(group) for group in groups]
        self.state.admit(layout, lengths, sizes)
        new = torch.tensor([n for group in groups for n in group], device=self.device)
        self.row_request = torch.cat([self.row_request, new])
        self.last = torch.cat([self.last, torch.zeros_like(new)])
        self.alive = torch.cat([self.alive, torch.ones_like(new, dtype=torch.bool)])
        first = self.state.num_rows - len(new)
        logits = output.logits[0].repeat_interleave(torch.tensor(sizes, device=self.device), 0)
        self._draw(logits, slice(first, None))
        self._retire()

    def _draw(self, logits: Tensor, rows: slice = slice(None)) -> None:
        """Sample the next token of some rows; ended rows that still wait to be dropped draw too, unrecorded."""
        request, position = self.row_request[rows], self.state.lengths[rows]
        token, logprob = draw(logits, self.keys[request], position, self.sampling)
        alive = self.alive[rows]
        recorded = request[alive], position[alive]
        self.tokens[recorded] = token[alive]
        self.logprobs[recorded] = logprob[alive]
        self.last[rows] = token
        over = torch.isin(token, self.ends) | (position + 1 >= self.engine.max_new_tokens)
        ended = alive & over
        self.alive[rows] = alive & ~over
        if bool(ended.any()):
            self._finish(request[ended].tolist(), (position[ended] + 1).tolist())

    def _finish(self, ended: list[int], lengths: list[int]) -> None:
        finished = []
        for n, length in zip(ended, lengths, strict=True):
            ids, logprobs = self.tokens[n, :length].tolist(), self.logprobs[n, :length].tolist()
            completion = finished_completion(self.requests[n], ids, logprobs, ids[-1] in self.engine.end_ids)
            self.done[n] = completion
            finished.append(completion)
        if self.on_finish:
            self.on_finish(finished)

    def _retire(self) -> None:
        """Drop ended rows when there are enough of them."""
        count = int(self.alive.sum())
        if count == self.state.num_rows or (count and count > COMPACT_BELOW * self.state.num_rows):
            return
        rows = self.alive.nonzero()[:, 0]
        self.state.keep(rows)
        self.row_request, self.last, self.alive = self.row_request[rows], self.last[rows], self.alive[rows]
