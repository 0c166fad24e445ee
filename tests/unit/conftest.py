"""What all unit tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on two threads than on one, and much slower where cores are shared."""
    torch.set_num_threads(1)
