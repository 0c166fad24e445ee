"""The `code` reward: whether the completion's program passes the row's tests, run in the sandbox.

The program is the last block fenced by three backticks (its language tag is ignored; an open block ends with the
completion), or the completion itself where there is no block. The tests are the row's answer: a list, or its JSON, of

- `{"input": …, "output": …}`: the program, given the input, has to exit with 0 and print the output. White space at the
  ends of lines and empty lines at the end do not count.
- `assert EXPRESSION == LITERAL`, or `assert EXPRESSION` and `assert not EXPRESSION` for a call's truth: the expression
  is evaluated after the program; a float may be off by one in a million.

Expected values never enter the sandbox, and every comparison is made outside. A program has to compute the right value:
the sandbox has no verdict that it could forge. A test of another form would need a verdict inside, and is refused.
A program that crashes, hangs or exceeds a limit is wrong; a sandbox that fails leaves the completion unscored.
"""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .placement import runs_in
from .sandbox import Limits, Sandbox
from .text import LogMetric, TextOrMessages, completion_text

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
_HARNESS = """
import json, sys
_out = sys.stdout
_space = {{"__name__": "program"}}
exec(compile({source!r}, "program", "exec"), _space)
for _number, _expression in enumerate({expressions!r}):
    try:
        _value = repr(eval(_expression, _space))
    except Exception as _error:
        _value = None
    _out.write("\\n" + json.dumps([{mark!r}, _number, _value]) + "\\n")
    _out.flush()
"""


@dataclass(frozen=True)
class PrintTest:
    """A run of the program with an input."""

    given: str
    expected: str


@dataclass(frozen=True)
class ValueTest:
    """An expression that is evaluated after the program."""

    expression: str
    expected: Any
    """Its value, or only its truth value where `truth` is set."""
    truth: bool = False


Test = PrintTest | ValueTest


@runs_in("worker", most_items=1)
class CodeReward:
    """Reward a completion whose program passes the tests; with `partial`, by the share of tests that it passes."""

    def __init__(
        self,
        correct_reward: float = 1.0,
        wrong_reward: float = 0.0,
        partial: bool = False,
        allow_unisolated: bool = False,
        **limits: Any,
    ) -> None:
        """Check that programs can be isolated; `limits` are those of `sandbox.Limits`, `seconds` for each run.

        Raises SandboxError where programs cannot be isolated and `allow_unisolated` is not set.
        """
        self.correct_reward, self.wrong_reward, self.partial = float(correct_reward), float(wrong_reward), partial
        self.sandbox = Sandbox(Limits(**limits), allow_unisolated)

    def __call__(
        self, completions: Sequence[TextOrMessages], answer: Sequence[object], log_metric: LogMetric | None = None
    ) -> list[float]:
        """Score completions (texts, or conversations whose last message counts) against one list of tests each."""
        rewards = []
        for completion, given in zip(completions, answer, strict=True):
            tests = read_tests(given)
            num_passed = self.count_passed(extract_program(completion_text(completion)), tests)
            share = num_passed / len(tests) if self.partial else float(num_passed == len(tests))
            rewards.append(self.wrong_reward + share * (self.correct_reward - self.wrong_reward))
            if log_metric:
                log_metric("tests_passed", num_passed / len(tests))
        return rewards

    def count_passed(self, program: str, tests: Sequence[Test]) -> int:
        """Return how many tests a program passes; without `partial`, the first failure ends the runs."""
        values = [test for test in tests if isinstance(test, ValueTest)]
        num_passed = self._passed_values(program, values) if values else 0
        for test in tests:
            if isinstance(test, PrintTest) and (self.partial or num_passed >= len(values)):
                outcome = self.sandbox.run(program, test.given)
                passed = outcome.ending == "exited" and outcome.exit_code == 0
                num_passed += passed and _lines(outcome.stdout) == _lines(test.expected)
        return num_passed

    def _passed_values(self, program: str, tests: Sequence[ValueTest]) -> int:
        mark = secrets.token_hex(8)  # so that the program's own output is not read as a value by accident
        harness = _HARNESS.format(source=program, expressions=[test.expression for test in tests], mark=mark)
        values: dict[int, object] = {}
        for line in self.sandbox.run(harness).stdout.splitlines():
            try:
                line_mark, number, shown = json.loads(line)
                if line_mark == mark and number not in values:
                    values[number] = ast.literal_eval(shown)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue  # the program's own output, or a value that is no literal and so equals no expected value
        return sum(number in values and _passes(values[number], test) for number, test in enumerate(tests))

    @staticmethod
    def check_answer(answer: object) -> None:
        """Raise ValueError for tests that this reward cannot run; data loading calls it for every row."""
        read_tests(answer)


def extract_program(completion: str) -> str:
    """Return the program of a completion."""
    blocks = _FENCE.findall(completion)
    return blocks[-1] if blocks else completion


def read_tests(answer: object) -> list[Test]:
    """Return the tests of a gold answer. Raises ValueError where one cannot be run, or there is none."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the answer is no JSON list of tests: {error}") from error
    if not isinstance(answer, (list, tuple)) or not answer:
        raise ValueError(f"the answer is {answer!r:.80}, expected a list of at least one test")
    return [_read_test(test) for test in answer]


def _read_test(test: object) -> Test:
    if isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        return PrintTest(test["input"], test["output"])
    if not isinstance(test, str):
        raise ValueError(f"the test {test!r:.80} is neither an assertion nor an object with the texts input and output")
    try:
        statements = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the test {test!r:.80} is no Python: {error}") from error
    if len(statements) == 1 and isinstance(statements[0], ast.Assert):
        assertion = _read_assertion(statements[0].test)
        if assertion is not None:
            return assertion
    raise ValueError(
        f"the test {test!r:.80} is not of the form assert EXPRESSION == LITERAL or assert CALL(…): the "
        "completion could change the code that decides it"
    )


def _read_assertion(claim: ast.expr) -> ValueTest | None:
    if isinstance(claim, ast.Compare) and len(claim.ops) == 1 and isinstance(claim.ops[0], (ast.Eq, ast.Is)):
        for one, other in ((claim.left, claim.comparators[0]), (claim.comparators[0], claim.left)):
            try:
                return ValueTest(ast.unparse(one), ast.literal_eval(other))
            except ValueError:  # this side is not a literal
                continue
    if isinstance(claim, ast.Call):
        return ValueTest(ast.unparse(claim), True, truth=True)
    if isinstance(claim, ast.UnaryOp) and isinstance(claim.op, ast.Not) and isinstance(claim.operand, ast.Call):
        return ValueTest(ast.unparse(claim.operand), False, truth=True)
    return None


def _passes(value: object, test: ValueTest) -> bool:
    return bool(value) is test.expected if test.truth else _equal(value, test.expected)


def _equal(value: Any, expected: Any) -> bool:
    """Python's equality, with a tolerance for floats, also inside lists, tuples and dictionaries."""
    numbers = (int, float)
    if isinstance(expected, float) and isinstance(value, numbers):
        try:
            return math.isclose(value, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        except OverflowError:
            return False
    if isinstance(expected, (list, tuple)) and type(value) is type(expected):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(_equal(value[key], expected[key]) for key in expected)
    return bool(value == expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
