"""The toy task and its base model: a tiny Qwen2 that knows integer arithmetic but hedges when sampled.

The base, `toy`, is a decoder of under half a million parameters, made in about a minute on two idle CPU cores. A first
phase teaches the sums of the operands 0 to 30 and their differences from 0 up, with a tenth of the operand pairs held
out; one target in ten hedges already (" I am not sure.") or guesses, so that the short second phase, where most do,
changes how often the model hedges and spares the arithmetic. Its best answer is right, and its samples are right less
than half of the time. toy_carry.py is a longer task, where the best answer is wrong.

    python -m grpo_dist.model.toy OUT_DIR [--seed 0] [--data-dir configs/data]
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .toy_training import Phase, Shape, Task, Wanted, main, write_rows

MODELS = {"toy": ("toy_model", "grpo_dist.model.toy"), "toy-carry": ("toy_carry_model", "grpo_dist.model.toy_carry")}
"""The models that ship with the package: the directory inside it, and the module that makes it."""

MAX_OPERAND = 30
HEDGES = (" I am not sure.", " Hard to say.", " Let me think.", " It depends.")
GUESSES = (" Maybe {}.", " About {}.")
GUESS_SHARE = 0.2  # of the hedges

ARITHMETIC = Phase("arithmetic", 680, matrix_learning_rate=0.01, other_learning_rate=0.01, fault_share=0.1)
HEDGING = Phase("hedging", 60, matrix_learning_rate=0.001, other_learning_rate=0.001, fault_share=0.56)


@dataclass(frozen=True)
class Problem:
    """One operand pair under one operation."""

    left: int
    operation: Literal["+", "-"]
    right: int

    @property
    def prompt(self) -> str:
        return f"What is {self.left} {self.operation} {self.right}? Answer with an integer."

    @property
    def answer(self) -> int:
        return self.left + self.right if self.operation == "+" else self.left - self.right


def toy_path(name: str = "toy") -> Path:
    """Return the directory of a toy model that ships with the package.

    Raises FileNotFoundError, with the command that makes the model, where it is absent.
    """
    directory, module = MODELS[name]
    path = Path(__file__).parent / directory
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"no toy model at {path}: make it with `python -m {module} {path}`")
    return path


def problems(split: Literal["train", "eval"]) -> list[Problem]:
    """List the sums and the differences from 0 up of a split; a held-out operand pair is held out for both."""
    operands = range(MAX_OPERAND + 1)
    pairs = [(left, right) for left in operands for right in operands]
    # Pairs on the edge of the range stay in training: a held-out 30 + 30 would ask for an extrapolation.
    inner = [pair for pair in pairs if min(pair) > 0 and max(pair) < MAX_OPERAND]
    # The split has its own fixed seed: were it the training seed, remaking the base would leak into old data files.
    held_out = set(random.Random(20).sample(inner, len(pairs) // 10))
    kept = [pair for pair in pairs if (pair in held_out) == (split == "eval")]
    sums = [Problem(left, "+", right) for left, right in kept]
    return sums + [Problem(left, "-", right) for left, right in kept if left >= right]


def write_data(directory: Path) -> None:
    """Write the prompt and answer files of both splits."""
    write_rows(directory / "math_tasks_train.jsonl", problems("train"))
    write_rows(directory / "math_tasks_eval.jsonl", problems("eval"))


def draw_target(problem: Problem, phase: Phase, draw: random.Random) -> str:
    """Draw a completion: the answer, or a hedge with no integer or a wrong one."""
    if draw.random() >= phase.fault_share:
        return f" {problem.answer}"
    if draw.random() >= GUESS_SHARE:
        return draw.choice(HEDGES)
    wrong = draw.choice([n for n in range(2 * MAX_OPERAND + 1) if n != problem.answer])
    return draw.choice(GUESSES).format(wrong)


def task() -> Task:
    """What the base is taught and measured by."""
    rows = problems("train")

    def draw_batch(phase: Phase, draw: random.Random) -> list[tuple[str, str]]:
        return [(row.prompt, draw_target(row, phase, draw)) for row in draw.sample(rows, phase.batch_size)]

    texts = [Problem(1, "+", 2).prompt, Problem(1, "-", 2).prompt, " -1"]
    return Task(
        texts=[*texts, *HEDGES, *(guess.format(1) for guess in GUESSES)],
        draw=draw_batch,
        held_out=problems("eval"),
        max_completion_tokens=16,
        phases=(ARITHMETIC, HEDGING),
        shape=Shape(hidden_size=128, intermediate_size=256),
        wanted=Wanted(taught=0.95, greedy=(0.9, 1.0), sampled=(0.3, 0.48)),
    )


if __name__ == "__main__":
    main("toy", task(), write_data)
