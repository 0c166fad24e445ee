"""Stop strings: a trajectory ends with the token whose text completes one of them.

The text of a trajectory is never looked at while it grows. All beginnings of the strings are states of an automaton
(Aho and Corasick, 1975), and every token of the vocabulary moves it as the token's bytes do, one after another. So the
next state is one look into a table: the same on a CPU, inside a CUDA graph and over a finished row. Bytes, because a
character may be split over tokens. Pure.

Shapes: S states, V vocabulary, C classes of tokens that move the automaton alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..distributed.transfer import to_device


@dataclass(frozen=True)
class StopStrings:
    """The strings that end a trajectory, for one tokenizer; equal where the strings are."""

    strings: tuple[str, ...]
    classes: np.ndarray = field(compare=False, repr=False)
    """(V,) int64: the class of each token."""
    moves: np.ndarray = field(compare=False, repr=False)
    """(S, C) int64: the state after a token of a class, and S more where a string was completed on the way."""

    def first(self, ids: Sequence[int], begin: int = 0) -> int | None:
        """How many of a trajectory's tokens there are with the first one that ends it, from place `begin` on; None
        where none does."""
        moves, state = self.moves.tolist(), 0
        for place, number in enumerate(self.classes[np.asarray(ids, dtype=np.int64)].tolist()):
            state = moves[state][number]
            if state >= len(moves):
                if place >= begin:
                    return place + 1
                state -= len(moves)
        return None


class Matching:
    """The states of requests, in place on a device."""

    def __init__(self, stop: StopStrings, device: torch.device) -> None:
        self._classes, self._moves = to_device([torch.from_numpy(each) for each in (stop.classes, stop.moves)], device)
        self._state = torch.zeros(0, dtype=torch.int64, device=device)

    def grow(self, count: int) -> None:
        """Take in `count` requests more."""
        self._state = torch.cat([self._state, self._state.new_zeros(count)])

    def restart(self, request: Tensor) -> None:
        """Begin again with each `request` (R,)."""
        self._state[request] = 0

    def step(self, tokens: Tensor, request: Tensor) -> Tensor:
        """Whether the newest `tokens` (R,) of each `request` (R,) complete a string: (R,) bool."""
        after = self._moves[self._state[request], self._classes[tokens]]
        completed = after >= len(self._moves)
        self._state[request] = torch.where(completed, after - len(self._moves), after)
        return completed


def stop_strings(strings: Sequence[str], spelled: Sequence[bytes]) -> StopStrings:
    """The automaton for strings, each of at least one character, and tokens that add the bytes `spelled` (V) to a
    text."""
    patterns = [string.encode() for string in strings]
    states = sorted({pattern[:length] for pattern in patterns for length in range(len(pattern) + 1)}, key=len)
    number = {state: place for place, state in enumerate(states)}
    following = np.zeros((len(states), 256), dtype=np.int64)
    for place, state in enumerate(states):
        for byte in range(256):
            text = state + bytes([byte])
            following[place, byte] = next(number[text[cut:]] for cut in range(len(text) + 1) if text[cut:] in number)
    completes = np.array([any(state.endswith(pattern) for pattern in patterns) for state in states])
    texts = sorted(set(spelled))
    moved = _moved(texts, following, completes)
    distinct, class_of = np.unique(moved, axis=0, return_inverse=True)
    class_by_text = dict(zip(texts, class_of.reshape(-1).tolist(), strict=True))
    classes = np.array([class_by_text[text] for text in spelled], dtype=np.int64)
    return StopStrings(tuple(strings), classes, np.ascontiguousarray(distinct.T))


def _moved(texts: list[bytes], following: np.ndarray, completes: np.ndarray) -> np.ndarray:
    """(len(texts), S) int64: from each state the state after a text, and S more where a string was completed."""
    num_states = len(following)
    states = np.tile(np.arange(num_states), (len(texts), 1))
    completed = np.zeros_like(states, dtype=bool)
    longest_first = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    lengths = np.array([len(texts[n]) for n in longest_first])
    for place in range(int(lengths[0]) if len(lengths) else 0):
        some = longest_first[: int((lengths > place).sum())]
        step = np.array([texts[n][place] for n in some])
        states[some] = following[states[some], step[:, None]]
        completed[some] |= completes[states[some]]
    return states + num_states * completed
