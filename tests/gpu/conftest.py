"""Tests of what a GPU alone runs. They skip without one.

python -m pytest tests/gpu                                  on a machine with a CUDA device
GRPO_DIST_SIMULATED_CUDA=1 python -m pytest tests/gpu       on a simulated one, with smaller cases
"""

from __future__ import annotations

import os

import pytest
import torch
from simulated_cuda import install

SIMULATED = os.environ.get("GRPO_DIST_SIMULATED_CUDA") == "1"
if SIMULATED:
    install()  # before grpo_dist is imported


@pytest.fixture(scope="session", autouse=True)
def simulated() -> bool:
    """Whether the device is simulated. Skips each test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return SIMULATED


@pytest.fixture(autouse=True)
def _defaults() -> None:
    torch.cuda.set_sync_debug_mode("default")
