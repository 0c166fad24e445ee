"""A calculator as a tool."""

from __future__ import annotations

import ast
import operator

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MOST_CHARACTERS = 200


def calculator(expression: str) -> str:
    """
    Work out an arithmetic expression.

    Args:
        expression: Numbers with + - * / and parentheses, such as "12 * (3 + 4)".
    """
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"an expression has at most {MOST_CHARACTERS} characters")
    value = evaluated(ast.parse(expression, mode="eval").body)
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def evaluated(node: ast.expr) -> float:
    """The value of an expression of numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](evaluated(node.left), evaluated(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluated(node.operand)
    raise ValueError("numbers, + - * / and parentheses are expected")
