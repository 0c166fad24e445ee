r"""The `math_verify` reward: mathematical equality, decided by the library Math-Verify (the extra `math`).

First comes the exact match: the completion's last `\boxed{…}` is compared with the gold answer as the `boxed` reward
does, which decides most completions in microseconds. The others go to the library, which reads LaTeX and plain
expressions and compares symbolically (`1/2` is `0.5`, `x+1` is `1+x`). Five outcomes, logged as shares:

- `right` and `wrong`;
- `unparsable_answer`: the library reads no mathematics in the completion. Its reward is `wrong_reward`;
- `unparsable_gold`: the row's gold answer cannot be read. The completion stays unscored;
- `scorer_failure`: the library raised or took longer than `seconds`. The completion stays unscored.

The value of an expression such as `9^{9^{9}}` takes too long, so its completion has no reward. Each call handles one
completion, in a process that can be killed: the library's own time limit is a signal, which some computations ignore.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .extraction import clean, last_boxed
from .placement import runs_in
from .text import LogMetric, TextOrMessages, completion_text

OUTCOMES = ("right", "wrong", "unparsable_answer", "unparsable_gold", "scorer_failure")
_MARKED = re.compile(r"\\|\$")


@runs_in("worker", most_items=1)
class MathVerifyReward:
    """Reward completions whose answer equals the gold answer mathematically."""

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0, seconds: int = 5) -> None:
        """Raises ImportError, with the command to install it, where the library is missing.

        `seconds` is the limit of reading and of comparing; keep it below the time limit of scoring.
        """
        try:
            import math_verify
        except ImportError as error:
            raise ImportError("math_verify needs the library Math-Verify: pip install 'grpo_dist[math]'") from error
        self._library: Any = math_verify
        self.correct_reward, self.wrong_reward, self.seconds = float(correct_reward), float(wrong_reward), seconds

    def __call__(
        self, completions: Sequence[TextOrMessages], answer: Sequence[object], log_metric: LogMetric | None = None
    ) -> list[float | Exception]:
        """Score completions against one gold answer each; an exception stands for one that stays unscored."""
        rewards: list[float | Exception] = []
        counts = dict.fromkeys(OUTCOMES, 0)
        for completion, gold in zip(completions, answer, strict=True):
            try:
                outcome, detail = self.outcome_of(completion_text(completion), gold)
            # The library's time limit raises its own BaseException; nothing else here interrupts a worker.
            except BaseException as error:
                outcome, detail = "scorer_failure", f"{type(error).__name__}: {error}"
            counts[outcome] += 1
            if outcome in ("unparsable_gold", "scorer_failure"):
                rewards.append(RuntimeError(f"{outcome}: {detail}"))
            else:
                rewards.append(self.correct_reward if outcome == "right" else self.wrong_reward)
        if log_metric:
            for outcome, count in counts.items():
                log_metric(outcome, count / len(completions))
        return rewards

    def outcome_of(self, completion: str, gold: object) -> tuple[str, str]:
        """Return one of the five outcomes and its details; raises what the library raises."""
        boxed, gold_text = last_boxed(completion), str(gold)
        expected = last_boxed(gold_text) or gold_text.rpartition("####")[2].strip()
        if not expected:
            return "unparsable_gold", f"{gold!r:.80}"
        if boxed is not None and clean(boxed) == clean(expected):
            return "right", ""
        parsed_gold = self._parse(expected if _MARKED.search(expected) else f"${expected}$", self.seconds)
        if not parsed_gold:
            return "unparsable_gold", f"{gold!r:.80}"
        parsed = self._parse(completion, self.seconds)
        if not parsed:
            return "unparsable_answer", ""
        same = self._library.verify(parsed_gold, parsed, timeout_seconds=self.seconds, raise_on_error=True)
        return ("right" if same else "wrong"), ""

    def _parse(self, text: str, seconds: int) -> list[Any]:
        return self._library.parse(text, parsing_timeout=seconds, raise_on_error=True)

    @staticmethod
    def check_answer(answer: object) -> None:
        """Raise ValueError for a gold answer that is empty or no text or number; the workers parse it."""
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise ValueError(f"the answer is {answer!r:.80}, expected a text or a number")
