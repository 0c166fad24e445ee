r"""The `gsm8k` and `boxed` rewards: an answer written in an agreed place, compared as text.

- `gsm8k`: the text after the last `####`, up to the end of its line.
- `boxed`: the content of the last `\boxed{…}` (or `\fbox{…}`) with matched braces; an open box does not count.

Both sides are compared after the same clean-up: white space, `$`, a final full stop, thousands separators, LaTeX's
spaces (`\!`, `\,` and the like), `\left` and `\right`, a leading `+` and an integer's trailing `.0…` are removed;
`\dfrac` and `\tfrac` are read as `\frac`, `\text{x}` as `x`. Nothing is computed: `1/2` is not `0.5` here.
The gold answer is read from the same place where it has one; otherwise all of its text is the answer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from .placement import runs_in
from .text import LogMetric, TextOrMessages, completion_text

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_DROPPED = re.compile(r"\\[!, ;:]|\\left(?![a-z])|\\right(?![a-z])|[\s$]")
_INTEGER = re.compile(r"([+-]?[0-9]+)\.0+")


@runs_in("worker", most_items=32)
class ExtractedAnswer(ABC):
    """Reward a completion whose extracted answer equals the gold answer's; `missing_reward` where it has none."""

    @staticmethod
    @abstractmethod
    def extract(text: str) -> str | None:
        """Return the answer in a text, or None where there is none in the agreed place."""

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0, missing_reward: float = 0.0) -> None:
        self.correct_reward, self.wrong_reward = float(correct_reward), float(wrong_reward)
        self.missing_reward = float(missing_reward)

    def __call__(
        self, completions: Sequence[TextOrMessages], answer: Sequence[object], log_metric: LogMetric | None = None
    ) -> list[float]:
        """Score completions against one gold answer each, and log the share that has an answer in the right place."""
        answers = [self.read_completion(completion_text(completion)) for completion in completions]
        if log_metric:
            log_metric("found", sum(text is not None for text in answers) / len(answers))
        return [self._reward(text, gold) for text, gold in zip(answers, answer, strict=True)]

    def _reward(self, answer: str | None, gold: object) -> float:
        if answer is None:
            return self.missing_reward
        return self.correct_reward if answer == read_gold(gold, self.extract) else self.wrong_reward

    @classmethod
    def check_answer(cls, answer: object) -> None:
        """Raise ValueError for a gold answer that is empty or no text or number."""
        read_gold(answer, cls.extract)

    @classmethod
    def read_completion(cls, text: str) -> str | None:
        """Return the answer that a completion gives, in the form in which answers are compared; None where it gives
        none."""
        answer = cls.extract(text)
        return None if answer is None else clean(answer)


def after_hashes(text: str) -> str | None:
    """Return the text after the last `####` on its line, or None where there is none."""
    _, mark, rest = text.rpartition("####")
    line = rest.strip().partition("\n")[0].strip() if mark else ""
    return line or None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{…}`, or None."""
    end = len(text)
    for start in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, start.end(), end):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return text[start.end() : brace.start()].strip() or None
        end = start.start()  # a box with an open one in it is open: each text is read once
    return None


class Gsm8kReward(ExtractedAnswer):
    """Reward the answer after `####`."""

    extract = staticmethod(after_hashes)


class BoxedReward(ExtractedAnswer):
    r"""Reward the answer in the last `\boxed{…}`."""

    extract = staticmethod(last_boxed)


def clean(text: str) -> str:
    """Return an answer in the form in which answers are compared."""
    text = _TEXT.sub(r"\1", text.strip()).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
    text = _DROPPED.sub("", text).rstrip(".").removeprefix("+").replace("\u2212", "-")
    integer = _INTEGER.fullmatch(text)
    return integer.group(1) if integer else text


def read_gold(answer: object, extract: Callable[[str], str | None]) -> str:
    """Return a gold answer in comparable form; raises ValueError for one that is empty or no text or number."""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise ValueError(f"the answer is {answer!r:.80}, expected a text or a number")
    cleaned = clean(extract(answer) or answer)
    if not cleaned:
        raise ValueError(f"the answer {answer!r:.80} is empty")
    return cleaned
