"""The Triton kernels of decoding and of the head, in Triton's interpreter: what a GPU computes, without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SOME = [[4, 0, 0], *[[2, 0, 0]] * 4]
"""What the rollouts of every run return."""
ALL = [[6, 0, 0]] * 6 + [[2, 0, 0]]
"""What those of a run with `all` return beside them; the last one is Granite's."""


@pytest.fixture(scope="module", params=[[], pytest.param(["all"], marks=pytest.mark.slow)], ids=["some", "all"])
def interpreted(request: pytest.FixtureRequest) -> Any:
    """What `interpreted_kernels.py` prints: the interpreter has to be chosen before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install --no-deps triton")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_kernels.py")), *request.param],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_attention_over_pages_is_a_softmax_over_all_keys(interpreted: Any) -> None:
    assert max(interpreted["attention"]) < 2e-6 and interpreted["two rows"] < 2e-6


def test_the_engine_on_pages_draws_what_the_other_draws(interpreted: Any) -> None:
    """With every place for rows and pages taken and given back, too, with routes of experts, with adapters on some
    layers, and with windows, soft caps and sinks."""
    assert interpreted["completions"] in (SOME, SOME + ALL), "ended rows, other tokens, other numbers"


def test_rows_of_several_turns_go_on_in_their_pages(interpreted: Any) -> None:
    """Beside rows that are drawn, with stop texts and routes too; only after a long answer a row is computed again."""
    some = [[3, 0, 8, 2, 0]]
    assert interpreted["turns"] in (some, some + [[3, 0, 5, 2, 0], [2, 0, 4, 3, 0], [3, 0, 6, 2, 0]])


def test_the_fused_draw_is_the_plain_one(interpreted: Any) -> None:
    differ, gap = interpreted["draws"]
    assert differ == 0 and gap < 1e-5


def test_the_fused_draw_bans_tokens_where_they_are_banned(interpreted: Any) -> None:
    assert interpreted["banned"] == 0 and interpreted["early"] == 3, "after two tokens nothing else is likely"


def test_a_threshold_without_sorting_leaves_the_tokens_that_sorting_leaves(interpreted: Any) -> None:
    """With equal logits, and with tokens that cannot be drawn."""
    assert interpreted["floors"] == 0


def test_the_fused_head_is_the_plain_one(interpreted: Any) -> None:
    assert interpreted["head"] < 2e-5


def test_the_kernels_of_an_update_are_torchs_operations(interpreted: Any) -> None:
    assert max(interpreted["update"]) < 1e-5
