"""Completions are written as pyarrow would write them by itself, only sooner."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

from grpo_dist.monitoring.recorder import _arrow


@pytest.mark.parametrize(
    "values", [["a", "é", "", "𝄞\n"], [3, -1, 1 << 40], [0.5, -1e300, float("inf")], [True, False, True] * 7,
               [1, 2.5, None], [None, "a"], []],
)  # fmt: skip
def test_a_column_is_what_pyarrow_makes_of_it(values: list[Any]) -> None:
    made, expected = _arrow(values), pa.array(values)
    made.validate(full=True)
    assert made.equals(expected) and made.type == expected.type


@pytest.mark.parametrize(
    ("values", "expected"),
    [([True, 2], [1.0, 2.0]), ([False, 0.5, None], [0.0, 0.5, None]), ([(1 << 60) + 1, 0.5], [float(1 << 60), 0.5]),
     (["a", 1, None, True], ["a", "1", None, "True"])],
)  # fmt: skip
def test_what_rewards_log_may_be_of_several_kinds(values: list[Any], expected: list[Any]) -> None:
    assert _arrow(values).equals(pa.array(expected))


def test_no_step_waits_for_pandas() -> None:
    code = (
        "import sys; from grpo_dist.monitoring.recorder import _arrow as a; [a(v) for v in (['a'], [1], [1.0], [True])]"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('pandas' in sys.modules)"], check=False)
    assert done.returncode == 0
