"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    """Hear the signals that `nohup` and a script's `&` ignore, and do nothing: what tests start would inherit that."""
    for name in ("SIGHUP", "SIGINT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m quick`, leave files without such tests alone: importing all takes longer than the tests do."""
    if config.option.markexpr == "quick" and collection_path.match("test_*.py"):
        return "mark.quick" not in collection_path.read_text() or None
    return None


def pytest_unconfigure() -> None:
    """Undo what `what_lasts_is_not_collected` does: Triton would report at the exit that its functions have leaked."""
    gc.unfreeze()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import its libraries while tests of functions run."""
    starts_runs = any(item.path.parent.name in ("distributed", "fault") for item in session.items)
    if starts_runs and not session.config.option.collectonly:
        import resident

        resident.prepare()


def same_environment() -> Iterator[None]:
    """Undo whatever a test, a fixture, or a library that it imports sets in it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


the_next_test_has_the_same_environment = pytest.fixture(autouse=True)(same_environment)
the_next_module_has_the_same_environment = pytest.fixture(autouse=True, scope="module")(same_environment)
"""Runs are forks only where no variable is in their way (see resident.py): wandb leaves one behind."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on two threads than on one, and much slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def what_lasts_is_not_collected() -> Iterator[None]:
    """Libraries ask for collections often, and each would read all that importing has left."""
    gc.collect()
    gc.freeze()
    yield
