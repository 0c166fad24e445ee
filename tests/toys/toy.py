"""Make the toy model `toy` and its data: a tiny Qwen2 that knows integer arithmetic but hedges when sampled.

The model is a decoder of under half a million parameters. Making it takes about a minute on two idle CPU cores. A first
phase teaches sums of the operands 0 to 30 and differences from 0 up, and leaves out a tenth of the operand pairs. One
target in ten already hedges (" I am not sure.") or guesses. In the short second phase most targets do, which changes
how often the model hedges and keeps the arithmetic. Its greedy answer is right, and less than half of its samples are.
toy_carry.py makes a model for a longer task, whose greedy answer is wrong.

    python tests/toys/toy.py OUT_DIR [--seed 0] [--data-dir configs/data]
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toy_training import Bounds, Phase, Shape, Task, main, write_rows

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


def problems(split: Literal["train", "eval"]) -> list[Problem]:
    """List the sums and the differences from 0 up of a split. A held-out operand pair is in neither for training."""
    operands = range(MAX_OPERAND + 1)
    pairs = [(left, right) for left in operands for right in operands]
    # Pairs at the edge of the range stay in training: a held-out 30 + 30 would ask for an extrapolation.
    inner = [pair for pair in pairs if min(pair) > 0 and max(pair) < MAX_OPERAND]
    # The split has a fixed seed of its own. With the training seed, a new model would leak into old data files.
    held_out = set(random.Random(20).sample(inner, len(pairs) // 10))
    kept = [pair for pair in pairs if (pair in held_out) == (split == "eval")]
    sums = [Problem(left, "+", right) for left, right in kept]
    return sums + [Problem(left, "-", right) for left, right in kept if left >= right]


def write_data(directory: Path) -> None:
    """Write the prompt and answer files of both splits."""
    write_rows(directory / "math_tasks_train.jsonl", problems("train"))
    write_rows(directory / "math_tasks_eval.jsonl", problems("eval"))


def draw_target(problem: Problem, phase: Phase, draw: random.Random) -> str:
    """Draw a completion: the answer, a hedge without an integer, or a guess with a wrong one."""
    if draw.random() >= phase.fault_share:
        return f" {problem.answer}"
    if draw.random() >= GUESS_SHARE:
        return draw.choice(HEDGES)
    wrong = draw.choice([n for n in range(2 * MAX_OPERAND + 1) if n != problem.answer])
    return draw.choice(GUESSES).format(wrong)


def task() -> Task:
    """The task: its data, phases, model size and the accuracy that the model must have."""
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
        bounds=Bounds(taught=0.95, greedy=(0.9, 1.0), sampled=(0.3, 0.48)),
    )


if __name__ == "__main__":
    main(task(), write_data)
