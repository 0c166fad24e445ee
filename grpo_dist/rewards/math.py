"""The `math` reward: the last integer of the completion against the integer of the gold answer.

What counts as an integer, in completions and answers alike:

- a run of the digits 0-9 (no other script's digits), of any length, leading zeros ignored;
- with thousands separators where every comma is followed by exactly three digits: `1,234` is one integer, `1,2` is two;
- negative where `-` or U+2212 is directly before it and no letter, digit or closing bracket before that: `-7` and
  `=-7` are -7, while `12-7` ends in 7. Minus zero is zero;
- never a part of a decimal number: `3.14`, `5.0` and `1,234.5` contain no integer. A full stop after an integer ends a
  sentence.

Integers are compared as digit strings, so length costs nothing and Python's limit on int conversion does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .placement import runs_in
from .text import TextOrMessages, completion_text

# Digits with separators between them. It ends in a digit, so a sentence's full stop stays outside; one greedy class
# keeps the scan linear in the length of the text, whatever a model writes.
_RUN = re.compile(r"[0-9](?:[0-9.,]*[0-9])?")
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_GROUPED_DECIMAL = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+\.[0-9]+")
_BETWEEN = re.compile(r",|\.{2,}")
_MINUS = "-\u2212"
_SHOWN_CHARACTERS = 80


@runs_in("worker", most_items=32)
class MathRewardModel:
    """Reward a completion whose last integer equals the integer of the gold answer.

    An instance is also a reward function with TRL's signature; `rewards: [{name: math}]` uses it so.
    """

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0) -> None:
        self.correct_reward = float(correct_reward)
        self.wrong_reward = float(wrong_reward)

    def compute_reward(self, sample: dict[str, Any], completion: str) -> float:
        """Return `correct_reward` where the completion's last integer is the answer's, `wrong_reward` otherwise.

        The answer is `sample["answer"]`; a completion without an integer is wrong. Raises ValueError where the answer
        is missing or cannot be read.
        """
        if "answer" not in sample:
            raise ValueError(f"the sample has no `answer`; it has {sorted(sample)}")
        gold = read_answer(sample["answer"])
        return self.correct_reward if last_integer(completion) == gold else self.wrong_reward

    def __call__(self, completions: Sequence[TextOrMessages], answer: Sequence[object]) -> list[float]:
        """Score completions (texts, or conversations whose last answer counts) against one gold answer each."""
        texts = map(completion_text, completions)
        return [self.compute_reward({"answer": gold}, text) for text, gold in zip(texts, answer, strict=True)]

    @staticmethod
    def read_completion(text: str) -> str | None:
        """Return the answer that a completion gives, for a majority vote; None where it gives none."""
        return last_integer(text)

    @staticmethod
    def check_answer(answer: object) -> None:
        """Raise ValueError for a gold answer that this reward cannot read; data loading calls it for every row."""
        read_answer(answer)


def last_integer(text: str) -> str | None:
    """Return the last integer of a text in normal form (`-7`, `0`, `1234`), or None where there is none."""
    return next((number for number in _numbers_from_the_end(text) if number is not None), None)


def read_answer(answer: object) -> str:
    """Return the integer of a gold answer in normal form.

    An answer is an int, a float of integral value, or a text with exactly one number in it, an integer. If the text has
    a `####` (GSM8K), only the part after the last one is read. Raises ValueError for anything else, and for a text with
    several numbers: it would have to guess one, and a wrong guess rewards wrong answers.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise ValueError(f"the answer is {_shown(answer)}, expected an integer or a text with one integer in it")
    numbers = list(_numbers_from_the_end(answer.rpartition("####")[2]))
    if len(numbers) > 1:
        raise ValueError(f"the answer {_shown(answer)} has {len(numbers)} numbers, expected one integer")
    if not numbers or numbers[0] is None:
        raise ValueError(f"the answer {_shown(answer)} has no integer")
    return numbers[0]


def _numbers_from_the_end(text: str) -> Iterator[str | None]:
    """Yield the numbers of a text, last first: integers in normal form, None for each decimal."""
    for run in reversed(list(_RUN.finditer(text))):
        digits = run.group()
        sign = _sign_before(text, run.start())
        if _GROUPED.fullmatch(digits):
            yield _normal(sign, digits.replace(",", ""))
        elif _GROUPED_DECIMAL.fullmatch(digits):
            yield None
        else:
            pieces = [piece for piece in _BETWEEN.split(digits) if piece.strip(".")]
            for place in range(len(pieces) - 1, -1, -1):
                piece = pieces[place].strip(".")
                yield _normal(sign if place == 0 else "", piece) if "." not in piece else None


def _sign_before(text: str, start: int) -> str:
    """Return `-` where the character before `start` is a minus sign rather than a subtraction or a hyphen."""
    if start == 0 or text[start - 1] not in _MINUS:
        return ""
    before = text[start - 2 : start - 1] if start >= 2 else ""
    return "" if before.isalnum() or before in (")", "]", "}") else "-"


def _normal(sign: str, digits: str) -> str:
    """Return an integer without leading zeros, and zero without a sign."""
    digits = digits.lstrip("0")
    return sign + digits if digits else "0"


def _shown(answer: object) -> str:
    shown = repr(answer)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
