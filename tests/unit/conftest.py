"""What all unit tests share."""

from __future__ import annotations

import pytest
import torch
from small_models import base  # noqa: F401  (a fixture for all)

from grpo_dist.rollout.native.compiled import CannotCompile, library
from grpo_dist.rollout.native.kernel import SOURCE


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on two threads than on one, and much slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture
def kernel() -> None:
    """Skips a test where there is no compiler for the decoding step in C++."""
    try:
        library(SOURCE)
    except CannotCompile as error:
        pytest.skip(str(error))
