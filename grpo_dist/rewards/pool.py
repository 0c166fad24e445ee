"""The scoring pool: reward functions in worker processes, with a hard time limit and nothing defaulted.

Each worker process has a thread in the trainer that feeds it one call at a time. Completions are scored in chunks. A
call that fails as a whole is made again completion by completion, so that only the guilty stay unscored; a worker that
exceeds the time limit is killed with its children and replaced. The pool knows nothing of ranks and stops nothing: it
says what failed, and the loop decides together with the other ranks.

    with ScorerPool(config.rewards, config.scoring) as pool:     # a mistake in a reward is raised here
        pending = pool.submit(items)                             # returns at once
        scores = pending.result()
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_dist.config import RewardConfig, ScoringConfig
from grpo_dist.rewards.process import WorkerProcess
from grpo_dist.rewards.registry import KEYWORDS, Parameters, labels
from grpo_dist.rewards.scores import Failure, FailureKind, Item, Scores

logger = logging.getLogger(__name__)

_MOST_CHUNK_ITEMS = 32
_CHUNKS_PER_WORKER = 2  # so that a worker that is done early can take over some of the rest
_LEAST_LOST_CALLS = 8
_CLOSE_SECONDS = 10.0
_CHECK_SECONDS = 0.2


@dataclass(frozen=True)
class _Job:
    """One call to make: some items of a submission under one reward."""

    pending: Pending
    reward: int
    places: list[int]


class Pending:
    """Scores on their way; threads of the pool fill it in."""

    def __init__(self, items: Sequence[Item], names: Sequence[str], most_lost_calls: int) -> None:
        self.items = items
        self.columns = _column_names(items)
        self._names = names
        self._most_lost_calls = most_lost_calls
        shape = (len(items), len(names))
        self._values = np.full(shape, np.nan)
        self._per_token: dict[tuple[int, int], list[float]] = {}
        self._failures: dict[tuple[int, int], Failure] = {}
        self._seconds = np.zeros(len(names))
        self._lost_calls = [0] * len(names)
        self._open_cells = shape[0] * shape[1]
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not self._open_cells:
            self._done.set()

    def result(self, check: Callable[[], None] | None = None) -> Scores:
        """Wait for all scores; raises what kept the pool itself from scoring, such as being closed.

        `check` is called several times a second meanwhile and may raise to give up waiting.
        """
        while not self._done.wait(_CHECK_SECONDS):
            if check:
                check()
        if self._error is not None:
            raise self._error
        failed = np.zeros(self._values.shape, dtype=bool)
        for cell in self._failures:
            failed[cell] = True
        failures = [self._failures[cell] for cell in sorted(self._failures)]
        return Scores(values=self._values, failed=failed, failures=failures, seconds=self._seconds,
                      per_token=self._per_token)  # fmt: skip

    def scored(self, reward: int, places: Sequence[int], answer: dict[str, Any]) -> None:
        """Take in the values of one call."""
        bad = {int(place): message for place, message in answer["bad"].items()}
        with self._lock:
            for number, (place, value) in enumerate(zip(places, answer["values"], strict=True)):
                if isinstance(value, list) and len(value) != len(self.items[place].completion_ids):
                    tokens = len(self.items[place].completion_ids)
                    bad[number] = f"returned {len(value)} numbers for {tokens} tokens, expected one per token"
                else:
                    self._take(place, reward, value)
            for place, message in bad.items():
                self._failures[places[place], reward] = self._failure(places[place], reward, "bad_value", message)
            self._close(len(places))

    def _take(self, place: int, reward: int, value: float | list[float | None] | None) -> None:
        if isinstance(value, list):
            numbers = np.array(value, dtype=float)  # None becomes NaN
            self._per_token[place, reward] = numbers.tolist()
            value = None if np.isnan(numbers).all() else float(np.nansum(numbers))
        self._values[place, reward] = np.nan if value is None else value

    def failed(self, reward: int, place: int, kind: FailureKind, message: str, traceback: str = "") -> None:
        """Take in that one completion cannot be scored."""
        with self._lock:
            self._failures[place, reward] = self._failure(place, reward, kind, message, traceback)
            self._close(1)

    def spent(self, reward: int, seconds: float) -> None:
        """Take in how long a call has taken."""
        with self._lock:
            self._seconds[reward] += seconds

    def lost_call(self, reward: int) -> None:
        """Take in that a call has cost its worker."""
        with self._lock:
            self._lost_calls[reward] += 1

    def is_given_up(self, reward: int) -> bool:
        """Whether so many calls of a reward have cost their worker that trying on would only waste time."""
        return self._lost_calls[reward] >= self._most_lost_calls

    def abort(self, error: Exception) -> None:
        """Have `result` raise `error`."""
        self._error = error
        self._done.set()

    def _failure(self, place: int, reward: int, kind: FailureKind, message: str, traceback: str = "") -> Failure:
        return Failure(place, self._names[reward], kind, message, traceback)

    def _close(self, cells: int) -> None:
        self._open_cells -= cells
        if not self._open_cells:
            self._done.set()


class ScorerPool:
    """Worker processes that score completions; close it, or use it as a context manager."""

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig) -> None:
        """Start the workers and wait until they have resolved the rewards.

        Raises ValueError where a reward cannot be resolved, RuntimeError where a worker cannot be started.
        """
        self.names = labels(rewards)
        """A short, unique label per reward."""
        self._rewards = list(rewards)
        self._scoring = scoring
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[int, WorkerProcess] = {}
        started: queue.SimpleQueue[list[Parameters] | Exception] = queue.SimpleQueue()
        # The kernel kills a worker when the *thread* that started it ends, so a worker is started by the thread that
        # feeds it, which lives as long.
        self._threads = [
            threading.Thread(target=self._serve, args=(slot, started), name=f"scorer-{slot}", daemon=True)
            for slot in range(scoring.num_workers)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            answer = started.get()
            if isinstance(answer, Exception):
                self.close()
                raise answer
            self.parameters = answer
            """The keywords each reward takes."""

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ValueError where a reward requires a column that the data lacks."""
        columns = list(columns)
        for reward, parameters in zip(self._rewards, self.parameters, strict=True):
            parameters.check_columns(reward.name, columns)

    def submit(self, items: Sequence[Item]) -> Pending:
        """Begin to score completions and return at once; columns that only some items have are None for the others.

        Raises ValueError where a reward requires a column that no item has, RuntimeError where the pool is closed.
        """
        most_lost_calls = max(_LEAST_LOST_CALLS, math.ceil(self._scoring.error_budget * len(items)))
        pending = Pending(items, self.names, most_lost_calls)
        if items:
            self.check_columns(pending.columns)
        size = math.ceil(len(items) / (_CHUNKS_PER_WORKER * len(self._threads)))
        size = min(max(size, 1), _MOST_CHUNK_ITEMS)
        chunks = [list(range(start, min(start + size, len(items)))) for start in range(0, len(items), size)]
        self._enqueue(_Job(pending, reward, places) for reward in range(len(self._rewards)) for places in chunks)
        return pending

    def score(self, items: Sequence[Item]) -> Scores:
        """Score completions and wait for it."""
        return self.submit(items).result()

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

    def __enter__(self) -> ScorerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, slot: int, started: queue.SimpleQueue[list[Parameters] | Exception]) -> None:
        """Run one worker: a thread's life."""
        try:
            worker = self._start(slot)
        except Exception as error:  # the constructor raises it
            started.put(error)
            return
        started.put(worker.parameters)
        while (job := self._jobs.get()) is not None:
            try:
                if slot not in self._workers:
                    worker = self._start(slot)
                self._run(slot, worker, job)
            except Exception as error:  # a fault of the pool: whoever waits for the result gets it, and does not hang
                job.pending.abort(error)
        if slot in self._workers:
            self._stop(slot)

    def _start(self, slot: int) -> WorkerProcess:
        worker = WorkerProcess(self._rewards)
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

    def _run(self, slot: int, worker: WorkerProcess, job: _Job) -> None:
        """Make one call, and take in its values or its failure."""
        pending, reward, places = job.pending, job.reward, job.places
        if self._closed:
            raise RuntimeError("the scoring pool is closed")
        if pending.is_given_up(reward):
            self._give_up(job)
            return
        begun = time.monotonic()
        answer = self._call(slot, worker, job)
        pending.spent(reward, time.monotonic() - begun)
        if self._closed and "values" not in answer:  # it is `close` that has killed the worker, not the reward
            raise RuntimeError("the scoring pool is closed")
        if "values" in answer:
            pending.scored(reward, places, answer)
        elif len(places) == 1:
            pending.failed(reward, places[0], answer["kind"], answer["message"], answer["traceback"])
        else:
            self._enqueue(_Job(pending, reward, [place]) for place in places)

    def _enqueue(self, jobs: Iterable[_Job]) -> None:
        with self._lock:  # nothing may come after the end marks that `close` leaves, or it would never be done
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            for job in jobs:
                self._jobs.put(job)

    def _call(self, slot: int, worker: WorkerProcess, job: _Job) -> dict[str, Any]:
        """Return the worker's answer to one call, or a failure in the same form where the call has cost the worker."""
        keywords = _keywords(job, self.parameters[job.reward])
        limit = self._scoring.timeout_seconds
        try:
            return worker.call(job.reward, len(job.places), keywords, limit)
        except TimeoutError:
            self._stop(slot)
            kind, message = "timeout", f"took longer than scoring.timeout_seconds = {limit:g}"
        except (OSError, EOFError, ValueError):
            kind, message = "died", f"ended its worker process (exit code {self._stop(slot)})"
        job.pending.lost_call(job.reward)
        if not self._closed:
            name, count = self.names[job.reward], len(job.places)
            logger.warning("reward %s, called with %d completions, %s; its worker is replaced", name, count, message)
        return {"kind": kind, "message": message, "traceback": ""}

    def _give_up(self, job: _Job) -> None:
        message = "not tried: too many calls of this reward have hung or ended their worker in this batch"
        for place in job.places:
            job.pending.failed(job.reward, place, "timeout", message)


def _column_names(items: Sequence[Item]) -> list[str]:
    """Return the names of all items' columns, in order of appearance."""
    return list(dict.fromkeys(name for item in items for name in item.columns))


def _keywords(job: _Job, parameters: Parameters) -> dict[str, Any]:
    """Return the arguments of a call: TRL's three and the data's columns, as far as the function takes them."""
    items = [job.pending.items[place] for place in job.places]
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
