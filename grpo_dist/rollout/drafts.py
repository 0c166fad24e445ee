"""Drafts: the tokens that a row will probably draw next, copied from other completions of its prompt.

Several tokens of a row are then computed in one pass. The token at each place is drawn with the noise of that place, as
without drafts. As long as the draws equal the drafts, the next ones are valid too; what was computed behind the first
other draw is dropped. So drafts change the time alone, never a completion (unlike rejection sampling in
arXiv:2211.17192, which keeps only the distribution).

Drafts come from completions that have ended in this rollout and from those of earlier epochs: what followed the newest
place at which the row's last tokens occur. Whether they are worth their time follows from how often drafts were right
and from how long passes took. Pure.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from operator import neg

MATCHES = (16, 6, 2)
"""Numbers of last tokens that are searched for, one after another."""
MOST_AHEAD = 32
"""Most tokens drafted for a row in one pass."""
REACHED = [max((each for each in MATCHES if each <= n), default=0) for n in range(MATCHES[0] + MOST_AHEAD)]
"""The longest of MATCHES among so many tokens in common."""
PROMPT_CHARACTERS = 1 << 15
"""Characters kept of the completions of one prompt, the newest ones; a character is a token."""
MOST_CHARACTERS = 1 << 22
"""Characters kept of all prompts; those of the prompt that was used longest ago are dropped first."""
LOOK_EVERY = 8
"""Steps between two looks for drafts that do not save time, at least."""
BEGIN = "\0"
"""Stands before a completion."""


def text_of(ids: Sequence[int]) -> str:
    """Token ids as a string, which can be searched fast: one character each, none of them BEGIN."""
    return "".join([chr(token + 1) for token in ids])


def ids_of(text: str) -> list[int]:
    """The token ids of `text_of`."""
    return [ord(character) - 1 for character in text]


class Completions:
    """The newest completions of each prompt, in bounded memory."""

    def __init__(
        self, end_ids: Sequence[int], most: int = MOST_CHARACTERS, most_of_prompt: int = PROMPT_CHARACTERS
    ) -> None:
        """`end_ids` end completions or turns: nothing is proposed beyond them."""
        self._most, self._most_of_prompt = most, most_of_prompt
        self._stop = re.compile(f"[{re.escape(BEGIN + text_of(end_ids))}]")
        self._texts: OrderedDict[int, str] = OrderedDict()
        self.characters = self.added = 0

    def add(self, prompt: int, text: str) -> None:
        """Keep a completion's text behind the others of the prompt with this key."""
        old = self._texts.pop(prompt, "")
        new = (old + BEGIN + text)[-self._most_of_prompt :]
        self._texts[prompt] = new
        self.characters += len(new) - len(old)
        self.added += 1
        while self.characters > self._most:
            self.characters -= len(self._texts.popitem(last=False)[1])

    def knows(self, prompt: int) -> bool:
        """Whether there are completions of the prompt."""
        return prompt in self._texts

    def ahead(self, prompt: int, text: str) -> tuple[str, int]:
        """What came after the last tokens of `text`, a completion so far, up to an end, and how many tokens those are;
        "" and 0 where they never occurred."""
        known, row = self._texts.get(prompt), BEGIN + text
        if known is None:
            return "", 0
        for match in MATCHES:
            end = row[-match:]  # shorter, and with the beginning, where the row is
            place = known.rfind(end, 0, len(known) - 1)
            if place >= 0:
                first = place + len(end)
                return self._stop.split(known[first : first + MOST_AHEAD], maxsplit=1)[0], match
        return "", 0


class Acceptance:
    """How often drafts were drawn, by the longest of MATCHES that they follow; old draws count less."""

    def __init__(self, memory: float = 1000.0) -> None:
        self._memory = memory
        # three of four, so that drafts are tried at first
        self._tried, self._drawn = dict.fromkeys(MATCHES, 4.0), dict.fromkeys(MATCHES, 3.0)

    def count(self, match: int, tried: int, drawn: int) -> None:
        """Take in drafts one after another, the first of them behind `match` tokens in common: `tried` of them were
        compared with a draw, and the first `drawn` were drawn."""
        longest = MATCHES[0]
        while tried:
            number = tried if match >= longest else 1
            reached = REACHED[match]
            self._tried[reached] += number
            self._drawn[reached] += min(number, drawn)
            tried, drawn, match = tried - number, max(0, drawn - number), match + number
            if self._tried[reached] > self._memory:
                self._tried[reached] /= 2
                self._drawn[reached] /= 2

    def share(self, match: int) -> float:
        """Share of the drafts behind `match` tokens in common, one of MATCHES, that were drawn."""
        return self._drawn[match] / self._tried[match]

    def chances(self, least: float) -> dict[int, list[float]]:
        """For each of MATCHES, the chances that one draft, two, … behind so many tokens are all drawn; those above
        `least`."""
        of: dict[int, list[float]] = {0: []}
        shares = {match: self.share(match) for match in MATCHES}
        for match in MATCHES:
            chances, chance = [], 1.0
            for reached in REACHED[match : match + MOST_AHEAD]:
                chance *= shares[reached]
                if chance <= least:
                    break
                chances.append(chance)
            of[match] = chances
        return of


class PassTime:
    """Seconds of a pass, `start + each * tokens`: a line through the passes so far, of which old ones count less."""

    def __init__(self, memory: float = 50.0) -> None:
        self._decay = 1 - 1 / memory
        self._sums: tuple[float, ...] = (0.0,) * 5
        self.start, self.each = 0.0, 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Take in a pass; one that took far longer than expected was interrupted by something else."""
        if self.each:
            seconds = _believed(seconds, self.of(tokens))
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = tuple(self._decay * old + value for old, value in zip(self._sums, new, strict=True))
        count, total, squares, time, products = self._sums
        mean, spread = total / count, squares / count - (total / count) ** 2
        if spread > 0.01 * mean**2 + 1:
            slope = (products / count - mean * time / count) / spread
            self.each = max(slope, 0.01 * time / total)
        elif not self.each:
            self.each = time / count / (mean + 32)  # until passes of different sizes show it
        self.each = min(self.each, time / total)  # passes of one size may have become faster
        self.start = time / count - self.each * mean

    def of(self, tokens: float) -> float:
        """Seconds of a pass that computes so many tokens."""
        return self.start + self.each * tokens

    def least_chance(self, tokens: float, computed: int) -> float:
        """The chance above which another draft makes a pass faster that computes so many tokens and yields `tokens`."""
        return tokens * self.each / self.of(computed) if self.each else 1.0


class Gain:
    """Whether passes for which drafts were looked for took less time than their tokens take without; old passes count
    less. Of a small model, a step may take no longer than looking for drafts of many rows."""

    def __init__(self, memory: float = 50.0) -> None:
        self._decay = 1 - 1 / memory
        self._spent = self._plain = 0.0

    def add(self, spent_seconds: float, plain_seconds: float) -> None:
        """Take in a pass; one that took far longer than without drafts may have been interrupted by something else."""
        self._spent = self._decay * self._spent + _believed(spent_seconds, plain_seconds)
        self._plain = self._decay * self._plain + plain_seconds

    @property
    def is_none(self) -> bool:
        """Whether looking has cost time."""
        return self._spent > self._plain


class Looks:
    """When drafts are looked for that may not be worth their time, in steps of the run."""

    def __init__(self) -> None:
        self.next = 0

    def add(self, step: int, spent_seconds: float, plain_seconds: float) -> None:
        """Take in a look at a step, which took so long for tokens that take `plain_seconds` without. The next one comes
        when looking has cost a hundredth of the time."""
        lost = _believed(spent_seconds, plain_seconds) - plain_seconds
        self.next = step + max(LOOK_EVERY, math.ceil(100 * lost / plain_seconds))


def _believed(seconds: float, expected_seconds: float) -> float:
    """The time of a pass, without most of an interruption by something else."""
    return min(seconds, 3 * expected_seconds)


def numbers_of_drafts(chances: Sequence[Sequence[float]], time: PassTime) -> list[int]:
    """How many drafts of each row make a pass yield the most tokens a second.

    `chances` of a row are those that its first draft, its first two, … are drawn. The drafts that are worth their time
    at one speed give a higher speed, until it stays (Dinkelbach, Management Science 13, 1967).
    """
    rows = len(chances)
    least = time.least_chance(rows, rows)
    while True:
        numbers = [bisect_left(row, -least, key=neg) for row in chances]
        tokens = rows + sum(sum(row[:number]) for row, number in zip(chances, numbers, strict=True))
        higher = time.least_chance(tokens, rows + sum(numbers))
        if higher <= least:
            return numbers
        least = higher
