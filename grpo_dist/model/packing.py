"""Divide the global batch into packs: each prompt once, then its completions, without padding. Pure.

A pack is one row of tokens with pieces `prompt, completion 1, …, completion n`. A completion attends only to its prompt
and to itself, and its positions continue from the end of the prompt. Its last token is not in the row: nothing is
predicted after it, and no other token attends to it. The plan depends on lengths alone, so that every rank computes the
same plan and takes its part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
from torch import Tensor

from ..distributed.transfer import to_device
from ..types import Batch, integers, no_routes, repeated, token_places
from .attention import PackLayout, RowLayout
from .shared_prefix import segments

FILLER = torch.iinfo(torch.int64).min
"""The owner of a token that belongs to no sequence."""
PAIRS_PER_TOKEN = 4096
"""Attended pairs of tokens that cost about as much as the matrix products of one token. Only the balance uses it."""


@dataclass(frozen=True)
class Piece:
    """One prompt and some of its completions."""

    prompt: int
    """Place in batch.prompts."""
    completions: list[int]
    """Places in the batch's completions."""


@dataclass(frozen=True)
class Pack:
    """One forward and backward pass: T tokens in a row, M of them sampled.

    An empty pack (M = 0 in `token`, one or two tokens in `ids`) only keeps the number of packs equal on all ranks.
    """

    ids: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 position of each token in its own sequence."""
    predictor: Tensor
    """(M,) int64: place in the row of the token that predicts each sampled token."""
    targets: Tensor
    """(M,) int64: the sampled tokens themselves."""
    token: Tensor
    """(M,) int64: place of each sampled token in the batch's flat (T,) tensors."""
    sequence: Tensor
    """(M,) int64: the pack's completions, numbered from 0."""
    owner: Tensor
    """(T,) int64: the sequence of each token: `n` for completion n of the batch, `-1 - p` for its prompt p, or
    FILLER."""
    layout: PackLayout | None
    """Which tokens attend to which; None for a plain causal row of one prompt and one completion."""
    useful: int
    """Tokens of the row that belong to a sequence: all of them, or none in an empty pack."""
    routes: Tensor | None = None
    """(T, J, K): the experts that each token took in the rollout, see `routing`; None where nobody replays them."""

    def to(self, device: torch.device) -> Pack:
        """The pack with all tensors on `device`, in one asynchronous copy."""
        return self.to_with([], device)[0]

    def to_with(self, others: Sequence[Tensor], device: torch.device) -> tuple[Pack, list[Tensor]]:
        """The pack on `device`, and other tensors in the same copy."""
        names = ["ids", "positions", "predictor", "targets", "token", "sequence", "owner"]
        names += [] if self.routes is None else ["routes"]
        bounds = segments(self.layout.pieces) if self.layout and device.type == "cuda" else None
        tensors = [*(getattr(self, name) for name in names), *(bounds.tensors if bounds else [])]
        moved = to_device([*tensors, *others], device)
        there = moved[len(names) : len(tensors)]
        layout = self.layout and self.layout.to(device, bounds.with_tensors(there) if bounds else None)
        pack = Pack(**dict(zip(names, moved, strict=False)), layout=layout, useful=self.useful)
        return pack, moved[len(tensors) :]


def computed_lengths(row_lengths: Tensor) -> Tensor:
    """Of completions of these lengths (N,), the tokens that are in a pack: all but the last one."""
    return (row_lengths - 1).clamp(min=0)


def piece_cost(prompt_length: int, lengths: list[int]) -> float:
    """Cost of a piece in tokens: each token's matrix products, plus attention, which is quadratic."""
    pairs = prompt_length**2 / 2 + sum(length * (prompt_length + length / 2) for length in lengths)
    return prompt_length + sum(lengths) + pairs / PAIRS_PER_TOKEN


def _cut(prompt: int, prompt_length: int, completions: list[int], lengths: list[int], most: int) -> list[Piece]:
    """Pieces of one group with at most `most` tokens each, unless a single completion has more."""
    pieces: list[Piece] = []
    size = most + 1
    for n in completions:
        if size + lengths[n] > most:
            pieces.append(Piece(prompt, []))
            size = prompt_length
        pieces[-1].completions.append(n)
        size += lengths[n]
    return pieces


def plan(
    prompt_lengths: list[int],
    group: list[int],
    lengths: list[int],
    keep: list[bool],
    *,
    max_tokens: int,
    num_ranks: int,
    share_prompts: bool = True,
) -> list[list[list[Piece]]]:
    """Divide the kept completions among ranks and packs: `plan(...)[rank][pack]` is a list of pieces.

    `prompt_lengths` (P,), `group`, `lengths` (as `computed_lengths` has them) and `keep` (N,). Every rank gets the same
    number of packs, of nearly equal cost and at most `max_tokens` tokens each (a longer single sequence has its own
    pack). Without `share_prompts` each pack is one prompt with one completion. Every completion is in exactly one pack.
    """
    members: dict[int, list[int]] = {}
    for n, kept in enumerate(keep):
        if kept:
            members.setdefault(group[n], []).append(n)
    if not members:
        return [[] for _ in range(num_ranks)]
    if share_prompts:
        total = sum(prompt_lengths[g] + sum(lengths[n] for n in ns) for g, ns in members.items())
        most = min(max_tokens, math.ceil(total / num_ranks))  # no piece may exceed a rank's fair share
        pieces = [piece for g, ns in members.items() for piece in _cut(g, prompt_lengths[g], ns, lengths, most)]
    else:
        pieces = [Piece(g, [n]) for g, ns in members.items() for n in ns]

    costs = [piece_cost(prompt_lengths[p.prompt], [lengths[n] for n in p.completions]) for p in pieces]
    packs = [[place] for place in range(len(pieces))]
    if share_prompts:
        sizes = [prompt_lengths[p.prompt] + sum(lengths[n] for n in p.completions) for p in pieces]
        packs = _full_packs(sizes, max_tokens, num_ranks)
    dealt = _deal(packs, [sum(costs[place] for place in pack) for pack in packs], num_ranks)
    return [[[pieces[place] for place in pack] for pack in rank] for rank in dealt]


def _full_packs(sizes: list[int], max_tokens: int, num_ranks: int) -> list[list[int]]:
    """Packs of about equal size for pieces of `sizes`: about as few as possible, and a multiple of `num_ranks`."""
    heaviest_first = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    fewest = min(math.ceil(sum(sizes) / max_tokens), len(sizes))
    num_packs, most = (num_ranks * math.ceil(count / num_ranks) for count in (fewest, len(sizes)))
    more = num_ranks
    while True:
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        emptiest = [(0, number) for number in range(num_packs)]  # a heap
        for place in heaviest_first:
            size, number = emptiest[0]
            packs[number].append(place)
            heapq.heapreplace(emptiest, (size + sizes[place], number))
        if all(size <= max_tokens or len(packs[number]) == 1 for size, number in emptiest):
            return packs
        num_packs = min(num_packs + more, most)
        more *= 2  # a few packs too many cost less than trying every number


def _deal(packs: list[list[int]], costs: list[float], num_ranks: int) -> list[list[list[int]]]:
    """Packs of each rank, equally many. In turns of similar packs, the least loaded rank gets the heaviest one."""
    order = sorted(range(len(packs)), key=lambda number: -costs[number])
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for turn in range(0, len(order), num_ranks):
        least_loaded_first = sorted(range(num_ranks), key=load.__getitem__)
        for rank, number in zip_longest(least_loaded_first, order[turn : turn + num_ranks]):
            ranks[rank].append([] if number is None else packs[number])
            load[rank] += 0.0 if number is None else costs[number]
    return ranks


def _empty_pack(batch: Batch, share_prompts: bool) -> Pack:
    empty, one = (torch.zeros(length, dtype=torch.int64) for length in (0, 1))
    layout = RowLayout([(1, [])]) if share_prompts else None
    routes = None if batch.routes is None else no_routes(1, like=batch.routes)
    return Pack(one, one, empty, empty, empty, empty, one + FILLER, layout, useful=0, routes=routes)


def make_pack(batch: Batch, pieces: list[Piece], *, share_prompts: bool = True) -> Pack:
    """The tensors of one pack; for no pieces, an empty pack of one token."""
    if not pieces:
        return _empty_pack(batch, share_prompts)
    chosen = integers([n for piece in pieces for n in piece.completions])
    whole = batch.row_lengths[chosen]
    lengths = computed_lengths(whole)
    left = iter(lengths.tolist())
    shapes = [(len(batch.prompts[p.prompt].ids), [next(left) for _ in p.completions]) for p in pieces]
    # segments of the row: the prompt of each piece, then its completions
    sizes = integers([size for prompt, completions in shapes for size in (prompt, *completions)])
    is_prompt = torch.tensor([n == 0 for _, completions in shapes for n in range(1 + len(completions))])
    segment_starts = torch.cumsum(sizes, 0) - sizes
    starts, prompt_starts, prompt_lengths = segment_starts[~is_prompt], segment_starts[is_prompt], sizes[is_prompt]
    piece = (torch.cumsum(is_prompt, 0) - 1)[~is_prompt]  # of each completion
    sequence = repeated(torch.arange(len(chosen)), lengths)  # of each completion token
    row, source = token_places(starts, lengths), token_places(batch.row_starts[chosen], lengths)
    prompt_row = token_places(prompt_starts, prompt_lengths)
    ids = torch.empty(int(sizes.sum()), dtype=torch.int64)
    positions, owner = torch.empty_like(ids), torch.empty_like(ids)
    ids[prompt_row] = integers(list(chain.from_iterable(batch.prompts[p.prompt].ids for p in pieces)))
    positions[prompt_row] = token_places(torch.zeros_like(prompt_starts), prompt_lengths)
    ids[row] = batch.ids[source]
    positions[row] = (prompt_lengths[piece] - starts)[sequence] + row
    owner[row] = chosen[sequence]
    prompts = integers([p.prompt for p in pieces])
    owner[prompt_row] = repeated(-1 - prompts, prompt_lengths)
    # what predicts each token of a completion: the last one of its prompt, and then its own
    predicted = repeated(torch.arange(len(chosen)), whole)
    predictor = token_places(starts - 1, whole)
    first = torch.cumsum(whole, 0) - whole
    predictor[first[whole > 0]] = (prompt_starts + prompt_lengths - 1)[piece][whole > 0]
    layout = RowLayout(shapes) if share_prompts else None
    sampled = batch.sampled[token_places(batch.row_starts[chosen], whole)]
    token = token_places(batch.starts[chosen], batch.lengths[chosen])
    routes = None
    if batch.routes is not None and batch.prompt_routes is not None:
        routes = batch.routes.new_empty((len(ids), *batch.routes.shape[1:]))
        routes[row] = batch.routes[source]
        routes[prompt_row] = batch.prompt_routes[token_places(batch.prompt_starts[prompts], prompt_lengths)]
    return Pack(ids, positions, predictor[sampled], batch.tokens[token], token, predicted[sampled], owner, layout,
                useful=len(ids) if len(token) else 0, routes=routes)  # fmt: skip
