"""A lane of the scoring pool: rewards that run in the same kind of place, their queue, and the threads that feed it.

Each worker process has a thread that hands it one call at a time. Where a call fails, each of its completions is called
alone to find the guilty, and the others are then called again at once: values are only ever taken from a call that a
reward could compare completions in. A call that fails without a guilty completion fails for all of them. A worker that
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

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.placement import Placement
from grpo_dist.rewards.pool.pending import Pending
from grpo_dist.rewards.pool.process import ThisProcess, WorkerProcess
from grpo_dist.rewards.registry import KEYWORDS, Parameters
from grpo_dist.rewards.scores import Item

logger = logging.getLogger(__name__)

_MOST_CHUNK_ITEMS = 32
_CHUNKS_PER_WORKER = 2  # so that a worker that is done early can take over some of the rest
_CLOSE_SECONDS = 10.0
_NOT_TRIED = {
    "kind": "timeout", "traceback": "",
    "message": "not tried: too many calls of this reward have hung or ended their worker in this batch",
}  # fmt: skip

Place = WorkerProcess | ThisProcess


@dataclass(frozen=True)
class _Job:
    """One call to make: some items of a submission under one reward."""

    pending: Pending
    reward: int
    places: list[int]
    search: _Search | None = None
    """What this call of one completion is a part of: its values are not taken."""
    is_repeated: bool = False
    """Whether it repeats a call that failed, without the guilty."""


class _Search:
    """A call that failed, while its completions are called alone to find the guilty."""

    def __init__(self, job: _Job, failure: dict[str, Any]) -> None:
        self.job, self.failure = job, failure
        self._untried = len(job.places)
        self._sound: set[int] = set()
        self._lock = threading.Lock()

    def tried(self, place: int, is_sound: bool) -> list[int]:
        """Take in a completion's own call; after the last, returns the completions that can be scored, in order."""
        with self._lock:
            self._untried -= 1
            if is_sound:
                self._sound.add(place)
            return [] if self._untried else [place for place in self.job.places if place in self._sound]


class Lane:
    """Workers for some of the pool's rewards; rewards go by their number in the whole pool."""

    def __init__(
        self, rewards: Mapping[int, RewardConfig], names: Sequence[str], placement: Placement, scoring: ScoringConfig
    ) -> None:
        """Start the workers and wait until they have resolved the rewards.

        Raises ValueError where a reward cannot be resolved, RuntimeError where a worker cannot be started.
        """
        self.rewards = dict(rewards)
        self._names = names
        self._placement: Placement = placement
        self._scoring = scoring
        self._place_of = {reward: place for place, reward in enumerate(self.rewards)}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[int, Place] = {}
        started: queue.SimpleQueue[Place | Exception] = queue.SimpleQueue()
        # The kernel kills a worker when the *thread* that started it ends, so a worker is started by the thread that
        # feeds it, which lives as long.
        self._threads = [
            threading.Thread(target=self._serve, args=(slot, started), name=f"scorer-{placement}-{slot}", daemon=True)
            for slot in range(scoring.num_workers if placement == "worker" else 1)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            answer = started.get()
            if isinstance(answer, Exception):
                self.close()
                raise answer
            self.placements = dict(zip(self.rewards, answer.placements, strict=True))
            """Where each reward declares to run; the others are not this lane's."""
            self.parameters: dict[int, Parameters] = {
                reward: parameters
                for reward, parameters in zip(self.rewards, answer.parameters, strict=True)
                if parameters is not None
            }
            """The keywords that each of this lane's rewards takes."""

    def submit(self, pending: Pending, begun: int) -> None:
        """Make the calls that a group, the items that have come since `begun`, makes possible under all rewards.

        In shared workers a call has one group. Rewards that declare `most_items`, and those with a process of their
        own, get as many as fit; a group is divided only where it alone has more than `most_items`.
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
        """Kill the workers; whoever waits for scores gets a RuntimeError. Closing twice is harmless."""
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.signal_kill()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _serve(self, slot: int, started: queue.SimpleQueue[Place | Exception]) -> None:
        """Run one worker: a thread's life."""
        try:
            worker = self._start(slot)
        except Exception as error:  # the constructor raises it
            started.put(error)
            return
        started.put(worker)
        while (job := self._jobs.get()) is not None:
            try:
                if slot not in self._workers:
                    worker = self._start(slot)
                self._run(slot, worker, job)
            except Exception as error:  # a fault of the pool: whoever waits for the result gets it, and does not hang
                job.pending.abort(error)
        if slot in self._workers:
            self._stop(slot)

    def _start(self, slot: int) -> Place:
        rewards = list(self.rewards.values())
        worker: Place
        if self._placement == "main":
            worker = ThisProcess(rewards)
        else:
            limit = None if self._placement == "gpu" else int(self._scoring.memory_limit_gib * 2**30)
            worker = WorkerProcess(rewards, self._placement, rewards[0].environment, limit)
        with self._lock:
            self._workers[slot] = worker
            closed = self._closed
        if closed:
            self._stop(slot)
            raise RuntimeError("the scoring pool is closed")
        return worker

    def _stop(self, slot: int) -> int:
        """Kill a slot's worker and return the exit code it had come to."""
        with self._lock:
            worker = self._workers.pop(slot)
        return worker.kill()

    def _run(self, slot: int, worker: Place, job: _Job) -> None:
        """Make one call, and take in its values or its failure."""
        pending, reward = job.pending, job.reward
        if self._closed:
            raise RuntimeError("the scoring pool is closed")
        if pending.is_given_up(reward):
            self._fail(job, _NOT_TRIED)
            return
        begun = time.monotonic()
        answer = self._call(slot, worker, job)
        pending.spent(reward, time.monotonic() - begun)
        resident_bytes = answer.pop("resident_bytes", 0)
        if self._closed and "values" not in answer:  # it is `close` that has killed the worker, not the reward
            raise RuntimeError("the scoring pool is closed")
        if "values" not in answer:
            self._fail(job, answer)
        elif job.search is not None:
            self._repeat(job.search, job.search.tried(job.places[0], is_sound=True))
        else:
            pending.scored(reward, job.places, answer)
            if job.is_repeated:
                pending.repeated(reward)
        self._recycle(slot, resident_bytes)

    def _fail(self, job: _Job, failure: dict[str, Any]) -> None:
        """Search a failed call for the guilty; a call that cannot be searched, or was before, fails for all it has."""
        if len(job.places) > 1 and not job.is_repeated and failure is not _NOT_TRIED:
            search = _Search(job, failure)
            self._enqueue(_Job(job.pending, job.reward, [place], search) for place in job.places)
            return
        for place in job.places:
            job.pending.failed(job.reward, place, **failure)
        if job.search is not None:
            self._repeat(job.search, job.search.tried(job.places[0], is_sound=False))

    def _repeat(self, search: _Search, sound: list[int]) -> None:
        """Call again what a search has left; nothing where it goes on, or has left nothing."""
        if not sound:
            return
        job, failure = search.job, search.failure
        if job.pending.first_repeat(job.reward):
            logger.warning(
                "reward %s failed when it was called with %d completions (%s: %s), %d of which it cannot score alone; "
                "the others are called again at once. Further such calls of this batch are only counted",
                self._names[job.reward], len(job.places), failure["kind"], failure["message"],
                len(job.places) - len(sound),
            )  # fmt: skip
        self._enqueue([_Job(job.pending, job.reward, sound, is_repeated=True)])

    def _recycle(self, slot: int, resident_bytes: int) -> None:
        """End a worker that has grown too large; the next call starts a fresh one."""
        if self._placement != "gpu" and resident_bytes > self._scoring.recycle_above_gib * 2**30:
            self._stop(slot)
            logger.warning(
                "a scoring worker holds %.2f GiB, more than scoring.recycle_above_gib = %g; it is replaced",
                resident_bytes / 2**30,
                self._scoring.recycle_above_gib,
            )

    def _enqueue(self, jobs: Iterable[_Job]) -> None:
        with self._lock:  # nothing may come after the end marks that `close` leaves, or it would never be done
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            for job in jobs:
                self._jobs.put(job)

    def _call(self, slot: int, worker: Place, job: _Job) -> dict[str, Any]:
        """Return the worker's answer to one call, or a failure in the same form where the call has cost the worker."""
        keywords = _keywords(job, self.parameters[job.reward])
        state = SimpleNamespace(**asdict(job.pending.state))  # a class of ours would have the worker import numpy
        own = self.rewards[job.reward].timeout_seconds
        limit = self._scoring.timeout_seconds if own is None else own
        try:
            request = pickle.dumps((self._place_of[job.reward], len(job.places), keywords, state))
            return worker.call(request, limit)
        except TimeoutError:
            self._stop(slot)
            key = "scoring.timeout_seconds" if own is None else "rewards.timeout_seconds"
            several = f" with {len(job.places)} completions" if len(job.places) > 1 else ""
            kind, message = "timeout", f"took longer than {key} = {limit:g}{several}"
        except (OSError, EOFError, ValueError):
            kind, message = "died", f"ended its worker process (exit code {self._stop(slot)})"
        job.pending.lost_call(job.reward)
        if not self._closed:
            name, count = self._names[job.reward], len(job.places)
            logger.warning("reward %s, called with %d completions, %s; its worker is replaced", name, count, message)
        return {"kind": kind, "message": message, "traceback": ""}


def _keywords(job: _Job, parameters: Parameters) -> dict[str, Any]:
    """Return the arguments of a call: TRL's and the data's columns, as far as the function takes them.

    What only the worker can make (`log_metric` and its like) it adds there.
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


def _as_prompted(item: Item) -> str | list[dict[str, str]]:
    """Return the completion in the form of its prompt: a text, or one assistant message."""
    return item.completion if isinstance(item.prompt, str) else [{"role": "assistant", "content": item.completion}]
