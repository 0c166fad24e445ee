"""The global batch cut into packs: the prompt once, then its completions, and no padding anywhere. Pure.

A pack is one row of tokens made of pieces `prompt, completion 1, …, completion n`; each completion attends to its
prompt and to itself only, and its positions go on from the prompt's end. The plan is a function of lengths alone, so
every rank computes the same one and takes its own part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import BlockLayout, block_layout
from .batch import Batch

PAIRS_PER_TOKEN = 4096
"""Attended pairs of tokens that cost about as much as one token's matrix products; only balance depends on it."""


@dataclass(frozen=True)
class Piece:
    """One prompt and some of its completions."""

    prompt: int
    """Place in batch.prompts."""
    completions: list[int]
    """Places in the batch's order of completions."""


@dataclass(frozen=True)
class Pack:
    """One forward and backward pass: T tokens in a row, M of them completion tokens.

    An empty pack (M = 0 in `token`, a token or two in `ids`) only keeps the number of packs equal on all ranks.
    """

    ids: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 position of each token in its own sequence."""
    predictor: Tensor
    """(M,) int64: the row's token whose output predicts each completion token."""
    targets: Tensor
    """(M,) int64: the completion tokens themselves."""
    token: Tensor
    """(M,) int64: place of each completion token in the batch's flat tensors."""
    sequence: Tensor
    """(M,) int64: the pack's completions, numbered from 0."""
    layout: BlockLayout | None
    """Who attends to whom; None for a plain causal row of one prompt and one completion."""

    @property
    def useful(self) -> int:
        """Tokens of the row that are part of a sequence: all of them, or none of an empty pack's."""
        return len(self.ids) if len(self.token) else 0

    def to(self, device: torch.device) -> Pack:
        """The pack with all its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in
                 ("ids", "positions", "predictor", "targets", "token", "sequence")}  # fmt: skip
        return Pack(**moved, layout=self.layout.to(device) if self.layout else None)


def piece_cost(prompt_length: int, lengths: list[int]) -> float:
    """Cost of a piece in tokens: each token's matrix products, plus attention, which is quadratic."""
    pairs = prompt_length**2 / 2 + sum(length * (prompt_length + length / 2) for length in lengths)
    return prompt_length + sum(lengths) + pairs / PAIRS_PER_TOKEN


def _cut(prompt: int, prompt_length: int, completions: list[int], lengths: list[int], most: int) -> list[Piece]:
    """Pieces of one group, none above `most` tokens unless a single completion is."""
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

    `prompt_lengths` (P,), `group`, `lengths` and `keep` (N,). Every rank gets the same number of packs, of nearly equal
    cost and at most `max_tokens` tokens each (a longer single sequence stands alone). Without `share_prompts` each pack
    is one prompt with one completion. No completion is left out, and none stands twice.
    """
    members: dict[int, list[int]] = {}
    for n, kept in enumerate(keep):
        if kept:
            members.setdefault(group[n], []).append(n)
    if not members:
        return [[] for _ in range(num_ranks)]
    if share_prompts:
        total = sum(prompt_lengths[g] + sum(lengths[n] for n in ns) for g, ns in members.items())
        most = min(max_tokens, math.ceil(total / num_ranks))  # no piece may outweigh a rank's fair share
        pieces = [piece for g, ns in members.items() for piece in _cut(g, prompt_lengths[g], ns, lengths, most)]
    else:
        pieces = [Piece(g, [n]) for g, ns in members.items() for n in ns]

    def tokens(piece: Piece) -> int:
        return prompt_lengths[piece.prompt] + sum(lengths[n] for n in piece.completions)

    def cost(piece: Piece) -> float:
        return piece_cost(prompt_lengths[piece.prompt], [lengths[n] for n in piece.completions])

    pieces.sort(key=lambda piece: (-cost(piece), piece.completions[0]))
    if share_prompts:
        packs = _balanced_packs(pieces, [tokens(p) for p in pieces], [cost(p) for p in pieces], max_tokens, num_ranks)
    else:
        packs = [[piece] for piece in pieces]
    # Dealt out heaviest first, back and forth, so that ranks end together and equal packs meet in the same turn.
    packs.sort(key=lambda pack: -sum(map(cost, pack)))
    packs += [[] for _ in range(-len(packs) % num_ranks)]
    ranks: list[list[list[Piece]]] = [[] for _ in range(num_ranks)]
    for turn in range(len(packs) // num_ranks):
        dealt = packs[turn * num_ranks : (turn + 1) * num_ranks]
        for rank, pack in enumerate(dealt if turn % 2 == 0 else reversed(dealt)):
            ranks[rank].append(pack)
    return ranks


def _balanced_packs(
    pieces: list[Piece], sizes: list[int], costs: list[float], max_tokens: int, num_ranks: int
) -> list[list[Piece]]:
    """The fewest packs, a multiple of `num_ranks`, that hold all pieces: each piece goes where the load is least."""
    fewest = min(math.ceil(sum(sizes) / max_tokens), len(pieces))
    num_packs = num_ranks * math.ceil(fewest / num_ranks)
    while True:
        packs: list[list[Piece]] = [[] for _ in range(num_packs)]
        load, room = [0.0] * num_packs, [max_tokens] * num_packs
        for piece, size, cost in zip(pieces, sizes, costs, strict=True):
            fitting = [b for b in range(num_packs) if room[b] >= size or not packs[b]]
            if not fitting:
                break
            best = min(fitting, key=load.__getitem__)
            packs[best].append(piece)
            load[best] += cost
            room[best] -= size
        else:
            return packs
        num_packs += num_ranks


def make_pack(batch: Batch, pieces: list[Piece], *, share_prompts: bool = True) -> Pack:
    """The tensors of one pack; for no pieces, an empty pack of one token."""
    if not pieces:
        empty = torch.zeros(0, dtype=torch.int64)
        layout = block_layout([(1, [])]) if share_prompts else None
        one = torch.zeros(1, dtype=torch.int64)
        return Pack(one, one, empty, empty, empty, empty, layout)
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    ids, positions, predictor, token, sequence = [], [], [], [], []
    offset = count = 0
    for piece in pieces:
        prompt = torch.tensor(batch.prompts[piece.prompt].ids, dtype=torch.int64)
        ids.append(prompt)
        positions.append(torch.arange(len(prompt)))
        last = offset + len(prompt) - 1
        offset += len(prompt)
        for n in piece.completions:
            length = lengths[n]
            places = torch.arange(length)
            ids.append(batch.tokens[starts[n] : starts[n] + length])
            positions.append(len(prompt) + places)
            predictor.append(torch.where(places == 0, last, offset + places - 1))
            token.append(starts[n] + places)
            sequence.append(torch.full((length,), count))
            offset += length
            count += 1
    layout = None
    if share_prompts:
        layout = block_layout([(len(batch.prompts[p.prompt].ids), [lengths[n] for n in p.completions]) for p in pieces])
    flat = torch.cat(token)
    return Pack(torch.cat(ids), torch.cat(positions), torch.cat(predictor), batch.tokens[flat], flat,
                torch.cat(sequence), layout)  # fmt: skip
