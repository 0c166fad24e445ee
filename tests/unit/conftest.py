"""What all unit tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
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


@pytest.fixture
def all_threads() -> Iterator[None]:
    """Gives back the threads that a test takes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets a module's functions of these names note their calls: returns the list, in the order of the calls."""

    def note(module: ModuleType, *names: str) -> list[str]:
        calls: list[str] = []

        def put(name: str) -> None:
            function = getattr(module, name)

            def call(*given: Any, **options: Any) -> Any:
                calls.append(name)
                return function(*given, **options)

            monkeypatch.setattr(module, name, call)

        for name in names:
            put(name)
        return calls

    return note
