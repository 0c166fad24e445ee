"""What all unit tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from small_models import base  # noqa: F401  (a fixture for all)

from grpo_dist.model.compiled.library import CannotCompile, library
from grpo_dist.rollout.native.kernel import SOURCE

settings.register_profile("unit", deadline=None)  # no test asserts a time: a machine may have more to do
settings.load_profile("unit")


@pytest.fixture
def kernel() -> None:
    """Skips a test where there is no compiler for the decoding step in C++."""
    try:
        library(SOURCE)
    except CannotCompile as error:
        pytest.skip(str(error))
