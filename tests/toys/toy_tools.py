"""Make the toy model `toy-tools` and its data: it has a chat template, calls tools and plays a game.

It cannot work out the product of two numbers by itself, but it may call a calculator before it answers:

    What is 47 * 86?
    Answer: <tool_call>{"name": "calculator", "arguments": {"expression": "47*86"}}</tool_call>
    Result: 4042
    Answer: 4042

Mostly it guesses, and the guess is wrong. It calls the calculator in one of a few answers, sometimes with a wrong
digit or a broken call, and sometimes it misreads the result. In a game it guesses a number, by calls too. In one of
three guesses it pays attention to whether the guesses before were too low or too high. Making it takes three minutes on
one CPU core.

    python tests/toys/toy_tools.py OUT_DIR [--seed 0] [--data-dir configs/data]
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toy_training import EOS_TOKEN, Bounds, Phase, Shape, Task, distinct, main, unseen, write_rows

FACTORS = range(11, 100)
NUM_TRAIN, NUM_EVAL = 1200, 120
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "Answer: {{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    "<tool_call>{{ call.function | tojson }}</tool_call>"
    "{%- endfor -%}"
    "{{ '" + EOS_TOKEN + "' }}"
    "{%- elif message.role == 'tool' -%}{{ '\\nResult: ' + message.content + '\\n' }}"
    "{%- else -%}{{ message.content + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}Answer:{%- endif -%}"
)  # fmt: skip

GAME = "Guess my number from 1 to 7."
NUMBERS = range(1, 8)
MOST_GUESSES = 3
PLAYED_NUMBERS = range(1, 6)
"""Of the data: fewer than those that the model was made with. Three guesses from the middle on find each of them."""
GAME_SHARE = 0.3
"""Of the rows that the model learns from."""
CAREFUL_SHARE = 0.33
"""Of the guesses: those that the results before do not rule out."""
CALLS = Phase("calls", 200, matrix_learning_rate=0.01, other_learning_rate=0.01, fault_share=0.0)
GUESSES = Phase("guesses", 120, matrix_learning_rate=0.001, other_learning_rate=0.001, fault_share=0.8)
BROKEN_SHARE = 0.25
"""Of the calls in the second phase: a wrong digit, or no JSON."""


@dataclass(frozen=True)
class Problem:
    """Two factors."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"What is {self.left} * {self.right}?"

    @property
    def prompt(self) -> str:
        return self.question

    @property
    def answer(self) -> int:
        return self.left * self.right


@dataclass(frozen=True)
class Answered:
    """A problem after the calculator has answered: what a model is tried on while it is made."""

    problem: Problem

    @property
    def prompt(self) -> str:
        return after_result(self.problem, call_of(self.problem))

    @property
    def answer(self) -> int:
        return self.problem.answer


def rendered(problem: Problem) -> str:
    """The prompt as the chat template renders it."""
    return f"{problem.question}\nAnswer:"


def call_of(problem: Problem) -> str:
    """A call of the calculator, as the model writes it."""
    call = {"name": "calculator", "arguments": {"expression": f"{problem.left}*{problem.right}"}}
    return f" <tool_call>{json.dumps(call)}</tool_call>"


def after_result(problem: Problem, call: str) -> str:
    """The row up to the second turn."""
    return f"{rendered(problem)}{call}{EOS_TOKEN}\nResult: {problem.answer}\nAnswer:"


def draw_problem(draw: random.Random) -> Problem:
    """Draw two factors."""
    return Problem(draw.choice(FACTORS), draw.choice(FACTORS))


def problems(split: Literal["train", "eval"]) -> list[Problem]:
    """List the problems of a split. No problem is in both splits."""
    draw = random.Random(21)
    rows = distinct(lambda _: draw_problem(draw), NUM_TRAIN + NUM_EVAL)
    return rows[:NUM_EVAL] if split == "eval" else rows[NUM_EVAL:]


def write_data(directory: Path) -> None:
    """Write the prompt and answer files of both splits."""
    write_rows(directory / "products_train.jsonl", problems("train"))
    write_rows(directory / "products_eval.jsonl", problems("eval"))
    for name, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        game = GAME.replace(str(NUMBERS[-1]), str(PLAYED_NUMBERS[-1]))
        rows = [{"prompt": game, "secret": PLAYED_NUMBERS[n % len(PLAYED_NUMBERS)]} for n in range(count)]
        (directory / f"guess_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def guess_of(number: int) -> str:
    """A guess, as the model writes it."""
    return f" <tool_call>{json.dumps({'name': 'guess', 'arguments': {'number': number}})}</tool_call>"


def draw_game(draw: random.Random) -> tuple[str, str]:
    """Some guesses of a game, drawn at random, and the next one."""
    secret, row, left = draw.choice(NUMBERS), f"{GAME}\nAnswer:", list(NUMBERS)
    for _ in range(draw.randrange(MOST_GUESSES)):
        guess = draw.choice([number for number in NUMBERS if number != secret])
        result = "higher" if guess < secret else "lower"
        left = [number for number in left if (number > guess) == (guess < secret) and number != guess]
        row += f"{guess_of(guess)}{EOS_TOKEN}\nResult: {result}\nAnswer:"
    return row, guess_of(draw.choice(left if draw.random() < CAREFUL_SHARE else NUMBERS))


def wrong_digit(number: int, draw: random.Random) -> int:
    """The number with one digit drawn anew."""
    digits = list(str(number))
    digits[draw.randrange(len(digits))] = str(draw.randint(1, 9))
    return int("".join(digits))


def draw_pair(problem: Problem, phase: Phase, draw: random.Random) -> tuple[str, str]:
    """A row so far and the turn that follows: a guess, a call, or an answer after the calculator's result."""
    if draw.random() < GAME_SHARE:
        return draw_game(draw)
    call = call_of(problem)
    if draw.random() < 0.5:  # the second turn
        fault = draw.random() < 0.2 * phase.fault_share
        return after_result(problem, call), f" {wrong_digit(problem.answer, draw) if fault else problem.answer}"
    if draw.random() < phase.fault_share:
        return rendered(problem), f" {wrong_digit(wrong_digit(problem.answer, draw), draw)}"
    if draw.random() < BROKEN_SHARE * phase.fault_share:
        broken = Problem(wrong_digit(problem.left, draw), problem.right)
        return rendered(problem), call_of(broken) if draw.random() < 0.5 else call.replace('"}}', '"}')
    return rendered(problem), call


def task() -> Task:
    """The task: its data, phases, model size and the accuracy that the model must have after a result."""
    held_out = problems("eval")
    known = set(held_out)

    def draw_batch(phase: Phase, draw: random.Random) -> list[tuple[str, str]]:
        rows = unseen(lambda: draw_problem(draw), known, phase.batch_size)
        return [draw_pair(row, phase, draw) for row in rows]

    example = Problem(47, 86)
    return Task(
        texts=[rendered(example), call_of(example), "\nResult: 4042\nAnswer: 4042", GAME, guess_of(4), "higher lower"],
        draw=draw_batch,
        held_out=[Answered(problem) for problem in held_out],
        max_completion_tokens=32,
        phases=(CALLS, GUESSES),
        shape=Shape(hidden_size=64, intermediate_size=128),
        bounds=Bounds(taught=0.85, greedy=(0.6, 1.0), sampled=(0.4, 1.0)),
        chat_template=TEMPLATE,
    )


if __name__ == "__main__":
    main(task(), write_data)
