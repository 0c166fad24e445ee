"""The `reasoning_gym` reward: a completion's answer, scored by the reasoning-gym data set that its prompt comes from.

The library (the extra `reasoning`) has some hundred data sets, each with scoring of its own: 1 for a right answer,
often less for one that is nearly right, 0 for a wrong one.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any

from .placement import runs_in
from .text import LogMetric, TextOrMessages, completion_text

_MOST_NAMES = 3
_SHOWN = 60


def library() -> Any:
    """Import reasoning-gym. Raises ImportError, with the command to install it, where it is missing."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"reasoning_gym needs the library reasoning-gym ({error}): pip install 'grpo_dist[reasoning]'"
        ) from error
    return reasoning_gym


def check_name(name: str) -> None:
    """Raise ValueError where the library has no data set of this name."""
    known = library().factory.DATASETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=_MOST_NAMES)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"reasoning-gym has no data set {name!r} among its {len(known)}{hint}")


@runs_in("worker")
class ReasoningGymReward:
    """Score answers as their data set does: the share in [0, 1] that the library gives."""

    def __init__(self, dataset: str | None = None) -> None:
        """`dataset` scores rows without a column `entry`, as from a file with prompts of one data set.

        Raises ImportError where the library is missing, ValueError for an unknown data set.
        """
        self._scoring = functools.cache(library().get_score_answer_fn)
        self._dataset = dataset
        if dataset is not None:
            check_name(dataset)

    def __call__(
        self,
        prompts: Sequence[TextOrMessages],
        completions: Sequence[TextOrMessages],
        answer: Sequence[object] | None = None,
        entry: Sequence[dict[str, Any] | None] | None = None,
        log_metric: LogMetric | None = None,
    ) -> list[float]:
        """Return one score a completion; one whose answer the library cannot read scores 0 and is counted.

        Raises ValueError for a row by which the data set cannot score any answer: that is no fault of a completion.
        """
        rewards, num_unreadable = [], 0
        scorable: list[dict[str, Any]] = []
        for number, completion in enumerate(completions):
            row = entry[number] if entry is not None else None
            if row is None:
                gold = None if answer is None else answer[number]
                row = self._entry(completion_text(prompts[number]), gold)
                if row not in scorable:
                    self._require_scorable(row)
                    scorable.append(row)
            score, readable = self._score(completion_text(completion), row)
            if not readable and row not in scorable:
                self._require_scorable(row)
                scorable.append(row)
            rewards.append(score)
            num_unreadable += not readable
        if log_metric:
            log_metric("unreadable", num_unreadable / len(completions))
        return rewards

    @staticmethod
    def read_completion(text: str) -> str | None:
        """Return what the last pair of `<answer>` tags encloses, or the text itself; None where it is empty."""
        closed = [piece.partition("<answer>") for piece in text.split("</answer>")[:-1]]
        tagged = [inside for _, tag, inside in closed if tag]
        return (tagged[-1] if tagged else text).strip() or None

    def _entry(self, question: str, answer: object) -> dict[str, Any]:
        if self._dataset is None:
            raise ValueError("the data has no column `entry`: read it with data.train_file: reasoning_gym:NAME, or "
                             "give the reward args: {dataset: NAME}")  # fmt: skip
        return {"question": question, "answer": None if answer is None else str(answer),
                "metadata": {"source_dataset": self._dataset}}  # fmt: skip

    def _score(self, completion: str, entry: dict[str, Any]) -> tuple[float, bool]:
        """Return the best score of the answer with and without its full stop, and whether the library can read it."""
        answer = self.read_completion(completion)
        if answer is None:
            return 0.0, True
        scores = []
        for text in {answer, answer.removesuffix(".")} - {""}:
            try:
                scores.append(self._score_of(text, entry))
            except (MemoryError, ImportError, OSError):  # of the machine, not of the answer
                raise
            # A data set's scoring may raise anything at an answer that is not of the form it expects.
            except Exception as error:
                if isinstance(error, KeyError) and set(entry["metadata"]) == {"source_dataset"}:
                    raise _unscorable(entry, f"raises {error!r}") from error
        return max(scores, default=0.0), bool(scores)

    def _score_of(self, answer: str, entry: dict[str, Any]) -> float:
        return float(self._scoring(entry["metadata"]["source_dataset"])(answer=answer, entry=entry))

    def _require_scorable(self, entry: dict[str, Any]) -> None:
        """Raise ValueError where the data set does not give full marks to the row's own answer, if there is one.

        Many data sets read more of a row than its question and answer. Without that some raise, and some give 0.
        """
        gold = str(entry["answer"] or "")
        if not gold:
            return
        try:
            score = self._score_of(gold, entry)
        except Exception as error:
            raise _unscorable(entry, f"raises {error!r} for its answer {gold[:_SHOWN]!r}") from error
        if score < 1:
            raise _unscorable(entry, f"gives {score:.2g} to its answer {gold[:_SHOWN]!r}, expected 1")


def _unscorable(entry: dict[str, Any], what: str) -> ValueError:
    name = entry["metadata"]["source_dataset"]
    return ValueError(f"the data set {name} cannot score the row {str(entry['question'])[:_SHOWN]!r}: it {what}. Rows "
                      f"of data.train_file: reasoning_gym:{name} have all that it reads, in their column `entry`"
                      )  # fmt: skip
