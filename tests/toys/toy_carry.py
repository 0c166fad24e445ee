"""Make the toy model `toy-carry` and its data: column addition in writing, which goes wrong at the carries.

Numbers of 3 to 8 digits are added from the right, one column at a time, each with the carry of the column before:

    What is 368 + 275? Write out each column.
     8+5+0=13;6+7+1=14;3+2+1=06 so 643

A completion has 30 to 85 tokens and is right only if it has every carry. The model forgets most carries, and more often
before larger digits. Sometimes it guesses (" Maybe 712") and writes no columns. Its greedy answer is right only where
a sum has almost no carries. In a sum with many carries usually all samples of a group are wrong. It adds the columns
themselves without errors, also in sums that it has never seen. Making it takes three minutes on one CPU core.

    python tests/toys/toy_carry.py OUT_DIR [--seed 0] [--data-dir configs/data]
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toy_training import Bounds, Phase, Shape, Task, distinct, main, unseen, write_rows

DIGITS = range(3, 9)
NUM_TRAIN, NUM_EVAL = 1200, 120
GUESS = " Maybe {}"
GUESS_SHARE = 0.4  # of the fault share; the other targets forget carries
MAX_FORGET_SHARE = 0.95  # sampling cannot find what the model never saw

COLUMNS = Phase("columns", 420, matrix_learning_rate=0.01, other_learning_rate=0.01, fault_share=0.1)
CARELESS = Phase("careless", 80, matrix_learning_rate=0.001, other_learning_rate=0.001, fault_share=0.6)


@dataclass(frozen=True)
class Problem:
    """Two numbers with equally many digits."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"What is {self.left} + {self.right}? Write out each column."

    @property
    def answer(self) -> int:
        return self.left + self.right


def draw_problem(num_digits: int, draw: random.Random) -> Problem:
    """Draw two numbers."""
    least, end = 10 ** (num_digits - 1), 10**num_digits
    return Problem(draw.randrange(least, end), draw.randrange(least, end))


def problems(split: Literal["train", "eval"]) -> list[Problem]:
    """List the problems of a split, equally many of each number of digits. No problem is in both splits."""
    draw = random.Random(20)  # its own fixed seed, as in toy.py
    rows = distinct(lambda number: draw_problem(DIGITS[number % len(DIGITS)], draw), NUM_TRAIN + NUM_EVAL)
    return rows[:NUM_EVAL] if split == "eval" else rows[NUM_EVAL:]


def write_data(directory: Path) -> None:
    """Write the prompt and answer files of both splits."""
    write_rows(directory / "carry_train.jsonl", problems("train"))
    write_rows(directory / "carry_eval.jsonl", problems("eval"))


def forget_share(digit: int, fault_share: float) -> float:
    """The probability to forget a carry: a fifth of the fault share before digit 0, twice the fault share before 9."""
    return min(MAX_FORGET_SHARE, fault_share * (1 + digit) / 5)


def written_out(problem: Problem, fault_share: float, draw: random.Random) -> str:
    """Write out a sum and sometimes forget a carry. The answer follows from the columns."""
    columns, answer, carry = [], "", 0
    for upper, lower in zip(str(problem.left)[::-1], str(problem.right)[::-1], strict=True):
        carry = 0 if carry and draw.random() < forget_share(int(upper), fault_share) else carry
        total = int(upper) + int(lower) + carry
        columns.append(f"{upper}+{lower}+{carry}={total:02d}")
        carry, answer = total // 10, f"{total % 10}{answer}"
    return f" {';'.join(columns)} so {carry or ''}{answer}"


def draw_target(problem: Problem, phase: Phase, draw: random.Random) -> str:
    """Draw a completion: a guess, or the columns with some carries forgotten."""
    if draw.random() >= GUESS_SHARE * phase.fault_share:
        return written_out(problem, phase.fault_share, draw)
    digits = len(str(problem.left))
    return GUESS.format(draw_problem(digits, draw).answer)


def task() -> Task:
    """The task: its data, phases, model size and the accuracy that the model must have."""
    held_out = problems("eval")
    known = set(held_out)

    def draw_batch(phase: Phase, draw: random.Random) -> list[tuple[str, str]]:
        rows = unseen(lambda: draw_problem(draw.choice(DIGITS), draw), known, phase.batch_size)
        return [(row.prompt, draw_target(row, phase, draw)) for row in rows]

    example = Problem(368, 275)
    return Task(
        texts=[example.prompt, written_out(example, 0.0, random.Random(0)), GUESS.format(1)],
        draw=draw_batch,
        held_out=held_out,
        max_completion_tokens=96,
        phases=(COLUMNS, CARELESS),
        shape=Shape(hidden_size=96, intermediate_size=192),
        bounds=Bounds(taught=0.97, greedy=(0.0, 0.3), sampled=(0.1, 0.25)),
    )


if __name__ == "__main__":
    main(task(), write_data)
