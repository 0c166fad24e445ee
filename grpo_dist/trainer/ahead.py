"""The next step's batch, drawn by the policy before this step's update: rollout.lag 1."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from functools import partial

from ..checkpoint.state import TrainState
from ..types import Trajectory
from .collect import Draw, Drawn, collect, first_round, prepare_round
from .parts import Parts

LOOK_SECONDS = 0.1
"""Time between two looks at whether the run is to stop."""


@contextmanager
def drawn_ahead(parts: Parts, state: TrainState) -> Iterator[None]:
    """Around a step's updates: where rollout.lag is 1, the next step's batch is drawn by the policy as it is before
    them; a collective.

    An engine in this process draws it first. One elsewhere draws it while the updates go on; if the run is stopped
    meanwhile, the next run draws it anew.
    """
    step = state.step + 1
    if not parts.config.rollout.lag or state.ahead is not None or step == parts.config.train.num_train_steps:
        yield
    elif not parts.engine.is_elsewhere:
        state.ahead = collect(parts, state, step)
        yield
    else:
        drawing = _Drawing(parts, state, step)
        try:
            yield
            state.ahead = collect(parts, state, step, drawing.result)
        finally:
            drawing.give_up()


class _Drawing:
    """A first round that a thread draws."""

    def __init__(self, parts: Parts, state: TrainState, step: int) -> None:
        """Begin to draw; a collective."""
        self._parts, self._given_up = parts, threading.Event()
        self._future: Future[list[Trajectory]] = Future()
        self._started = time.perf_counter()
        self._seconds = 0.0
        parts.engine.wake()
        with parts.ranks.shared_errors("rollout"):
            draw, self._scoring = prepare_round(parts, state, first_round(parts, state, step))
        # a daemon: the end of a run that failed does not wait for it
        threading.Thread(target=partial(self._draw, draw), name="rollout", daemon=True).start()

    def _draw(self, draw: Draw) -> None:
        try:
            trajectories = draw(self._check)
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._seconds = time.perf_counter() - self._started
            self._future.set_result(trajectories)

    def _check(self) -> None:
        if self._given_up.is_set():
            raise CancelledError

    def result(self) -> Drawn:
        """Wait for the trajectories; a collective. Raises PhaseError and Interrupted as a rollout does."""
        begun = time.perf_counter()
        with self._parts.ranks.shared_errors("rollout"):
            while not self._future.done():
                self._parts.watch.check()
                wait([self._future], LOOK_SECONDS)
            trajectories = self._future.result()
        self._parts.engine.sleep()
        self._parts.phase.add("overlapped", max(0.0, self._seconds - (time.perf_counter() - begun)))
        return trajectories, self._scoring

    def give_up(self) -> None:
        """Let the thread end soon, if it has not ended."""
        self._given_up.set()
