"""The engine that samples on vLLM servers."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ...distributed.watch import Interrupted
from ...types import Trajectory
from ..engine import Request, limit_of, trajectory
from ..sampling import Sampling
from .client import ServerError
from .messages import COMPLETIONS, Answer, completion_message, read_answer
from .policy import ServedPolicy
from .server import OwnServer

_POLL_SECONDS = 0.02


class VllmEngine:
    """Asks servers for what it is asked for, while the trainer does something else.

    The draw is vLLM's: a function of the request's seed, of the policy, and of the server's rounding.
    """

    decoding: dict[str, str | None] = {"engine": "vllm", "decoding": None}

    def __init__(
        self, served: ServedPolicy, own: OwnServer | None, shares_memory: Callable[[str], None] | None
    ) -> None:
        """`own` is the server that this rank has started; `shares_memory` lets it `wake_up` or `sleep` where it lives
        on the trainer's devices, a collective."""
        self._served, self._servers, self._own = served, served.servers, own
        self._run, self._end_ids, self._shares_memory = served.run, served.run.end_ids, shares_memory
        self._most = served.run.config.rollout.max_completion_length
        # a server that shares the trainer's devices cannot draw while these update
        self.is_elsewhere = shares_memory is None
        self._ended: queue.SimpleQueue[tuple[Request, Future[Answer]]] = queue.SimpleQueue()
        self._waiting: set[Future[Answer]] = set()
        self._sampling = Sampling()
        self._retried = 0

    def update_weights(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Engine`. Raises Interrupted on all ranks where no server has the policy."""
        self.wake()
        self._served.update(check)
        self.sleep()

    def wake(self) -> None:
        """See `Engine`."""
        if self._shares_memory is not None:
            self._shares_memory("wake_up")

    def sleep(self) -> None:
        """See `Engine`."""
        self._drop()
        if self._shares_memory is not None:
            self._shares_memory("sleep")

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """See `Engine`."""
        if self._waiting and sampling != self._sampling:
            raise ValueError(f"{sampling} given while requests with {self._sampling} wait, expected the same")
        assert self._served.loaded is not None, "requests follow an update"
        self._sampling, ended = sampling, self._ended
        for request in requests:
            message = completion_message(self._served.loaded.model, request, sampling, self._end_ids, self._most)
            future = self._servers.start(self._ask(request, message, sampling))
            self._waiting.add(future)
            future.add_done_callback(partial(_put, ended, request))

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """Do nothing: servers keep the prefixes that they have room for."""

    def poll(self) -> list[Trajectory]:
        """See `Engine`. Raises Interrupted where no server answers."""
        done: list[Trajectory] = []
        while self._waiting:
            try:
                request, future = self._ended.get(timeout=0 if done else _POLL_SECONDS)
            except queue.Empty:
                break
            self._waiting.discard(future)
            try:
                answer = future.result()
            except ServerError as error:
                raise Interrupted(f"rollout.vllm: {error}", failed=True) from error
            done.append(trajectory(request, answer.ids, answer.logprobs, self._end_ids, self._sampling,
                                   answer.routes))  # fmt: skip
        return done

    def update_share(self) -> float | None:
        """See `Engine`: the probe compares what servers compute."""
        return None

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        assert self._served.loaded is not None
        retried, self._retried = self._servers.retried - self._retried, self._servers.retried
        return {"rollout/probe_gap": self._served.loaded.gap, "rollout/retried": float(retried)}

    def close(self) -> None:
        """See `Engine`."""
        self._drop()
        self._served.close()
        if self._own is not None:
            self._own.close()
        self._servers.close()

    def _drop(self) -> None:
        for future in self._waiting:
            future.cancel()  # which closes the connection, and so ends the work on the server
        self._waiting.clear()
        self._ended = queue.SimpleQueue()

    async def _ask(self, request: Request, message: dict[str, Any], sampling: Sampling) -> Answer:
        return await self._servers.post(
            COMPLETIONS, message,
            lambda content: read_answer(content, message, sampling, request.offset, self._run.routers),
            tokens=len(request.prompt) + limit_of(request, self._most), home=request.group,
        )  # fmt: skip


def _put(ended: queue.SimpleQueue[tuple[Request, Future[Answer]]], request: Request, answer: Future[Answer]) -> None:
    ended.put((request, answer))
