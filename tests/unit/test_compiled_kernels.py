"""The Triton kernels compile for the cards that runs use, and fit into their registers and shared memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, launch

SHARED = 99 << 10
"""Bytes of shared memory that a program has on the smallest of the cards (8.9)."""
STACK = 64
"""Bytes of a thread's numbers that may lie outside its registers; what a loop spills is more."""
KERNELS = {"sum_blocks", "find_floors", "draw_token", "_score", "_join", "_gated", "_gated_backward", "_rotate",
           "attend_prompts", "attend_own", "join", "rotate_and_store", "add_and_normalise",
           "multiply_by_gate"}  # fmt: skip
CASES = [
    pytest.param(["90"], id="H100"),
    *[pytest.param([capability, "all"], marks=pytest.mark.slow, id=f"{capability} all")
      for capability in ("80", "89", "90", "100")],
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `compiled_kernels.py` prints: Triton's driver is replaced for its process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install --no-deps triton")
    done = launch(
        None, 1, *request.param, program=[str(Path(__file__).with_name("compiled_kernels.py"))], timeout_seconds=3600,
        environment={"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_and_fits(compiled: Any) -> None:
    assert {each["kernel"] for each in compiled} == KERNELS
    assert [each for each in compiled if each["stack"] > STACK or each["shared"] > SHARED] == []


def test_nothing_is_computed_less_exactly_than_it_is_written(compiled: Any) -> None:
    """No product of float32 is one of tf32, no kernel but the draws needs float64, and none calls a function."""
    assert [each for each in compiled if each["tf32"] or each["calls"]] == []
    assert {each["kernel"] for each in compiled if each["float64"]} <= {"draw_token", "find_floors"}
