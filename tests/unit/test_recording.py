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
               [1, 2.5, None], [None, "a"], [True, 1], []],
)  # fmt: skip
def test_a_column_is_what_pyarrow_makes_of_it(values: list[Any]) -> None:
    try:
        expected = pa.array(values)
    except pa.ArrowInvalid as error:
        with pytest.raises(pa.ArrowInvalid, match=str(error)):
            _arrow(values)
        return
    made = _arrow(values)
    made.validate(full=True)
    assert made.equals(expected) and made.type == expected.type


def test_no_step_waits_for_pandas() -> None:
    code = (
        "import sys; from grpo_dist.monitoring.recorder import _arrow as a; [a(v) for v in (['a'], [1], [1.0], [True])]"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('pandas' in sys.modules)"], check=False)
    assert done.returncode == 0
