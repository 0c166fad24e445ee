"""A lane of the scoring pool: rewards with the same placement, their queue, and the threads that serve it.

Each worker process has a thread that gives it one call at a time. After a call that fails, each of its completions is
called alone to find those that fail, and the others are then called again in one call: values only come from a call in
which a reward could compare completions. If the second call fails too, it fails for all its completions. A worker that
exceeds the time limit is killed with its children and replaced.
"""

from __future__ import annotations

import logging
import math
import pickle
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from ...config.schema import RewardConfig, ScoringConfig
from ..placement import Placement
from ..registry import KEYWORDS, Parameters
from ..scores import Item
from .pending import Pending
from .process import ThisProcess, WorkerProcess, no_further_worker

log = logging.getLogger(__name__)

_MOST_CHUNK_ITEMS = 32
_CHUNKS_PER_WORKER = 2  # so that a worker that is done early can take some of the rest
_CLOSE_SECONDS = 10.0
_NOT_TRIED = {
    "kind": "timeout", "traceback": "",
    "message": "not tried: too many calls of this reward have hung or ended their worker in this batch",
}  # fmt: skip

Worker = WorkerProcess | ThisProcess


@dataclass(frozen=True)
class _Job:
    """One call to make: some items of a submission under one reward."""

    pending: Pending
    reward: int
    places: list[int]
    search: _Search | None = None
    """The search that this call of one completion belongs to; its values are not used."""
    is_repeated: bool = False
    """Whether it repeats a failed call, without the completions that fail alone."""


class _Search:
    """A failed call, while its completions are called alone to find those that fail."""

    def __init__(self, job: _Job, failure: dict[str, Any]) -> None:
        self.job, self.failure = job, failure
        self._untried = len(job.places)
        self._sound: set[int] = set()
        self._lock = threading.Lock()

    def tried(self, place: int, is_sound: bool) -> list[int]:
        """Record a completion's own call; after the last, returns the completions that can be scored, in order."""
        with self._lock:
            self._untried -= 1
            if is_sound:
                self._sound.add(place)
            return [] if self._untried else [place for place in self.job.places if place in self._sound]


class Lane:
    """Workers for some of the pool's rewards; `reward` is a reward's number in the pool."""

    def __init__(
        self, rewards: Mapping[int, RewardConfig], names: Sequence[str], placement: Placement, scoring: ScoringConfig
    ) -> None:
        """Start the workers and wait until they have resolved the rewards.

        Raises ValueError where a reward cannot be resolved, a worker cannot be started, or one ends while it imports
        the rewards.
        """
        self.rewards = dict(rewards)
        self._names = names
        self._placement: Placement = placement
        self._scoring = scoring
        self._number_in_worker = {reward: place for place, reward in enumerate(self.rewards)}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[int, Worker] = {}
        started: queue.SimpleQueue[Worker | Exception] = queue.SimpleQueue()
        # The kernel kills a worker when the *thread* that started it ends: the thread that serves a worker starts it.
        self._threads = [
            threading.Thread(
                target=self._serve, args=(number, started), name=f"scorer-{placement}-{number}", daemon=True
            )
            for number in range(scoring.num_workers if placement == "worker" else 1)
        ]
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                del self._threads[number:]
                self.close()
                raise no_further_worker(error) from error
        for _ in self._threads:
            answer = started.get()
            if isinstance(answer, Exception):
                self.close()
                raise answer
            self.placements = dict(zip(self.rewards, answer.placements, strict=True))
            """Where each reward declares to run; this lane has those of its own placement."""
            self.parameters: dict[int, Parameters] = {
                reward: parameters
                for reward, parameters in zip(self.rewards, answer.parameters, strict=True)
                if parameters is not None
            }
            """The keywords that each of this lane's rewards takes."""

    def submit(self, pending: Pending, begun: int) -> None:
        """Queue the calls of a group, the items that have arrived since `begun`, for all rewards.

        In shared workers a call has one group. Rewards that declare `most_items`, and those with a process of their
        own, get as many groups as fit; a group is divided only where it alone has more than `most_items`.
        """
        group, count = pending.arrived[begun:], len(pending.items)
        share = min(math.ceil(count / (_CHUNKS_PER_WORKER * len(self._threads))), _MOST_CHUNK_ITEMS)
        for reward, parameters in self.parameters.items():
            if self._placement == "worker" and parameters.most_items is None:
                calls = [group]
            else:
                most = share if self._placement == "worker" else count
                calls = pending.fill(reward, group, max(1, min(most, parameters.most_items or most)))
            self._enqueue(_Job(pending, reward, call) for call in calls)

    def close(self) -> None:
        """Kill the workers. A caller that waits for scores gets a RuntimeError. A second call does nothing."""
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.signal_kill()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _serve(self, number: int, started: queue.SimpleQueue[Worker | Exception]) -> None:
        """Serve one worker; the target of a thread."""
        try:
            worker = self._start(number)
        except Exception as error:  # the constructor raises it
            started.put(error)
            return
        started.put(worker)
        while (job := self._jobs.get()) is not None:
            try:
                if number not in self._workers:
                    worker = self._start(number)
                self._run(number, worker, job)
            except Exception as error:
                # an error of the pool: the caller that waits for the result gets it, and does not hang
                job.pending.abort(error)
        if number in self._workers:
            self._stop(number)

    def _start(self, number: int) -> Worker:
        rewards = list(self.rewards.values())
        worker: Worker
        if self._placement == "main":
            worker = ThisProcess(rewards)
        else:
            limit = None if self._placement == "gpu" else int(self._scoring.memory_limit_gib * 2**30)
            worker = WorkerProcess(rewards, self._placement, rewards[0].environment, limit)
        with self._lock:
            self._workers[number] = worker
            closed = self._closed
        if closed:
            self._stop(number)
            raise RuntimeError("the scoring pool is closed")
        return worker

    def _stop(self, number: int) -> int:
        """Kill a worker and return its exit code."""
        with self._lock:
            worker = self._workers.pop(number)
        return worker.kill()

    def _run(self, number: int, worker: Worker, job: _Job) -> None:
        """Make one call, and record its values or its failure."""
        pending, reward = job.pending, job.reward
        if self._closed:
            raise RuntimeError("the scoring pool is closed")
        if pending.is_given_up(reward):
            self._fail(job, _NOT_TRIED)
            return
        begun = time.monotonic()
        answer = self._call(number, worker, job)
        pending.spent(reward, time.monotonic() - begun)
        resident_bytes = answer.pop("resident_bytes", 0)
        if self._closed and "values" not in answer:  # `close` has killed the worker, not the reward
            raise RuntimeError("the scoring pool is closed")
        if "values" not in answer:
            self._fail(job, answer)
        elif job.search is not None:
            self._repeat(job.search, job.search.tried(job.places[0], is_sound=True))
        else:
            pending.scored(reward, job.places, answer)
            if job.is_repeated:
                pending.repeated(reward)
        self._recycle(number, resident_bytes)

    def _fail(self, job: _Job, failure: dict[str, Any]) -> None:
        """Search a failed call for the completions that fail; a call that was searched already fails for all it has."""
        if len(job.places) > 1 and not job.is_repeated and failure is not _NOT_TRIED:
            search = _Search(job, failure)
            self._enqueue(_Job(job.pending, job.reward, [place], search) for place in job.places)
            return
        for place in job.places:
            job.pending.failed(job.reward, place, **failure)
        if job.search is not None:
            self._repeat(job.search, job.search.tried(job.places[0], is_sound=False))

    def _repeat(self, search: _Search, sound: list[int]) -> None:
        """Repeat a call with the completions that can be scored; `sound` is empty until the search is done."""
        if not sound:
            return
        job, failure = search.job, search.failure
        if job.pending.first_repeat(job.reward):
            log.warning(
                "reward %s failed when it was called with %d completions (%s: %s), %d of which it cannot score alone; "
                "the others are called again. Further such calls of this batch are only counted",
                self._names[job.reward], len(job.places), failure["kind"], failure["message"],
                len(job.places) - len(sound),
            )  # fmt: skip
        self._enqueue([_Job(job.pending, job.reward, sound, is_repeated=True)])

    def _recycle(self, number: int, resident_bytes: int) -> None:
        """End a worker that has too much memory; the next call starts a new one."""
        if self._placement != "gpu" and resident_bytes > self._scoring.recycle_above_gib * 2**30:
            self._stop(number)
            log.warning(
                "a scoring worker has %.2f GiB, more than scoring.recycle_above_gib = %g; it is replaced",
                resident_bytes / 2**30,
                self._scoring.recycle_above_gib,
            )

    def _enqueue(self, jobs: Iterable[_Job]) -> None:
        with self._lock:  # a job after the end marks of `close` would never be done
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            for job in jobs:
                self._jobs.put(job)

    def _call(self, number: int, worker: Worker, job: _Job) -> dict[str, Any]:
        """Return the worker's answer to one call, or a failure in the same form where the call ended the worker."""
        keywords = _keywords(job, self.parameters[job.reward])
        # with a class of this package the worker would import numpy
        state = SimpleNamespace(**asdict(job.pending.state))
        own = self.rewards[job.reward].timeout_seconds
        limit = self._scoring.timeout_seconds if own is None else own
        try:
            request = pickle.dumps((self._number_in_worker[job.reward], len(job.places), keywords, state))
            return worker.call(request, limit)
        except TimeoutError:
            self._stop(number)
            key = "scoring.timeout_seconds" if own is None else "rewards.timeout_seconds"
            several = f" with {len(job.places)} completions" if len(job.places) > 1 else ""
            kind, message = "timeout", f"took longer than {key} = {limit:g}{several}"
        except (OSError, EOFError, ValueError):
            kind, message = "died", f"ended its worker process (exit code {self._stop(number)})"
        job.pending.lost_call(job.reward)
        if not self._closed:
            name, count = self._names[job.reward], len(job.places)
            log.warning("reward %s, called with %d completions, %s; its worker is replaced", name, count, message)
        return {"kind": kind, "message": message, "traceback": ""}


def _keywords(job: _Job, parameters: Parameters) -> dict[str, Any]:
    """Return the arguments of a call: TRL's and the data's columns, as far as the function takes them.

    The worker adds `log_metric`, `log_extra` and `trainer_state`.
    """
    items = [job.pending.item(place) for place in job.places]
    keywords: dict[str, Any] = {
        "prompts": [item.prompt for item in items],
        "completions": [_as_prompted(item) for item in items],
        "completion_ids": [item.completion_ids for item in items],
    }
    for name in job.pending.columns:
        if name not in KEYWORDS:
            keywords[name] = [item.columns.get(name) for item in items]
    return {name: value for name, value in keywords.items() if parameters.takes(name)}


def _as_prompted(item: Item) -> str | list[dict[str, Any]]:
    """Return the completion in the form of its prompt: a text, or one assistant message, or all of an episode."""
    if item.messages is not None:
        return item.messages
    return item.completion if isinstance(item.prompt, str) else [{"role": "assistant", "content": item.completion}]
