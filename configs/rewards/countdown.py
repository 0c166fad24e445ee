"""Countdown: an equation that uses each given number once and equals the target. A custom reward.

The completion's last `<answer>…</answer>` counts. It is read as an arithmetic expression and never run as code.
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MOST_CHARACTERS = 200


def countdown(completions: list[str], answer: list[int], numbers: list[list[int]], **_: object) -> list[float]:
    """1 for a right equation, 0.1 for a wrong one, 0 without one."""
    return [score(text, target, given) for text, target, given in zip(completions, answer, numbers, strict=True)]


def score(text: str, target: int, given: list[int]) -> float:
    """Score one completion."""
    equations = ANSWER.findall(text)
    if not equations or len(equations[-1]) > MOST_CHARACTERS:
        return 0.0
    used: list[int] = []
    try:
        value = evaluate(ast.parse(equations[-1].strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return 0.1
    return 1.0 if value == target and sorted(used) == sorted(given) else 0.1


def evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """Return the exact value of an expression, and add its numbers to `used`. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](evaluate(node.left, used), evaluate(node.right, used))
    raise ValueError(f"{ast.dump(node):.40} is not arithmetic")
