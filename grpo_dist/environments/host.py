"""The environments of a rank as the trainer sees them: processes, episodes in them, and answers as they come.

A call that takes longer than its limit costs its episode alone: the others of its process play on, and the process gets
no more of them and is killed when they have ended. A process that ends takes its episodes with it. Such episodes are
broken: nobody knows what they would have been worth.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import pickle
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.environment import ENVIRONMENT_COLUMN, EnvironmentConfig
from ..config.rewards import RewardConfig
from ..rewards.pool.channel import Channel
from ..rewards.pool.process import START_SECONDS, signal_kill, start_worker

log = logging.getLogger(__name__)

_FOR_EVER_SECONDS = 1e6  # a wait without a limit would fail while another waits with one


@dataclass(frozen=True)
class Event:
    """What became of a request."""

    episode: int
    kind: str
    """reset, call, turn or reward."""
    answer: dict[str, Any]
    """What the worker answered; `failure` where the environment is broken."""


@dataclass
class _Process:
    """A process, and the episodes that live in it."""

    process: subprocess.Popen[bytes]
    channel: Channel
    episodes: set[int] = field(default_factory=set)
    exit_code: int | None = None
    """Of a process that has ended by itself."""
    is_stuck: bool = False
    """Whether a call in it has run out of time: the thread it runs in cannot be ended."""


class EnvironmentHost:
    """Processes that hold environments; close it, or use it as a context manager."""

    def __init__(self, config: EnvironmentConfig, rewards: Sequence[RewardConfig] = ()) -> None:
        """Start a process and learn its tools, and which of `rewards` take the environments. Raises ValueError with the
        user's mistake, and where a process ends while it imports them."""
        self._config, self._rewards = config, list(rewards)
        self._numbers = itertools.count()
        self._home: dict[int, _Process] = {}
        self._open: dict[int, tuple[int, str]] = {}  # request -> episode and kind
        self._deadlines: list[tuple[float, int]] = []  # a heap of time and request
        self._answers: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]] = queue.SimpleQueue()
        self._processes: list[_Process] = []
        first, description = self._start(describes=True)
        self.schemas: dict[str, list[dict[str, Any]]] = description["schemas"]
        """JSON schemas of the tools by environment; the name of a single one is empty."""
        self.with_users: list[str] = description["with_users"]
        """Names of the environments that answer turns without calls."""
        self.has_reward: bool = description["has_reward"]
        """Whether the environment says what an episode is worth."""
        self.rewards: list[str] = description["rewards"]
        """Names of the rewards that take the environments, and so are called in their processes."""
        self._processes.append(first)

    def name_of(self, row: Mapping[str, Any]) -> str:
        """The name of the environment of a row of the data."""
        return "" if "" in self.schemas else row[ENVIRONMENT_COLUMN]

    def tools(self, name: str) -> dict[str, dict[str, Any]]:
        """The tools of an environment, with the part `parameters` of their schemas."""
        functions = [schema["function"] for schema in self.schemas[name]]
        return {function["name"]: function["parameters"] for function in functions}

    def reset(self, episode: int, row: Mapping[str, Any], seed: int = 0) -> None:
        """Begin an episode on a row of the data; an event of kind `reset` comes of it, with an `observation`.

        What the environment draws follows from `seed`.
        """
        process = self._placed()
        process.episodes.add(episode)
        self._home[episode] = process
        name = self.name_of(row)
        columns = {column: value for column, value in row.items() if not name or column != ENVIRONMENT_COLUMN}
        self._ask(episode, "reset", self._config.reset_seconds, name=name, seed=seed, row=columns)

    def call(self, episode: int, calls: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Make an episode's calls; an event of kind `call` comes of it, with `answers` in order, and `done`."""
        self._ask(episode, "call", self._config.call_seconds * max(1, len(calls)), calls=list(calls))

    def after_turn(self, episode: int, text: str) -> None:
        """Hand over a turn without calls; an event of kind `turn` comes of it, with the `messages` that answer it, and
        `done`."""
        self._ask(episode, "turn", self._config.call_seconds, text=text)

    def reward(self, episode: int, row: Mapping[str, Any] | None = None) -> None:
        """Ask what an episode is worth; an event of kind `reward` comes of it, with a `reward`, and `rewards` of those
        that take the environment and of `row` what they name."""
        self._ask(episode, "reward", self._config.call_seconds, row=dict(row or {}))

    def end(self, episode: int) -> None:
        """End an episode, whatever it waits for; its environment is free for another."""
        process = self._home.pop(episode, None)
        for request in [number for number, (whose, _) in self._open.items() if whose == episode]:
            del self._open[request]
        if process is None:
            return
        process.episodes.discard(episode)
        if process.is_stuck:
            if not process.episodes:
                self._kill(process)
        else:
            self._send(process, {"kind": "end", "episode": episode})

    def end_all(self) -> None:
        """End all episodes."""
        for episode in list(self._home):
            self.end(episode)

    def poll(self, wait_seconds: float) -> list[Event]:
        """Events since the last call; waits at most so long for the first one."""
        # first what has arrived: a caller that looks rarely, or was stopped, takes no answer for a late one
        events = self._arrived()
        until = time.monotonic() + wait_seconds
        while True:
            now = time.monotonic()
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._open):
                _, request = heapq.heappop(self._deadlines)
                if request in self._open:
                    events += self._timed_out(request)
            if events:
                return events
            soonest = min(until, self._deadlines[0][0] if self._deadlines else until)
            try:
                events += self._taken(*self._answers.get(timeout=max(0.0, soonest - now)))
            except queue.Empty:
                if time.monotonic() >= until:
                    return []
            events += self._arrived()

    def _arrived(self) -> list[Event]:
        """The events of all answers that have arrived."""
        events: list[Event] = []
        while not self._answers.empty():
            events += self._taken(*self._answers.get())
        return events

    def close(self) -> None:
        """Kill all processes and their children. Closing twice is harmless."""
        for process in list(self._processes):
            self._kill(process)

    def __enter__(self) -> EnvironmentHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _taken(self, process: _Process, answer: dict[str, Any] | None) -> list[Event]:
        """The events of one answer; None says that the process has ended."""
        if answer is not None:
            request = answer.pop("id")
            if request not in self._open:  # the episode was ended meanwhile
                return []
            episode, kind = self._open.pop(request)
            return [Event(episode, kind, answer)]
        if process not in self._processes:
            return []
        code = process.exit_code = self._kill(process)
        return [self._broken(request, f"its process ended (exit code {code})")
                for request, (episode, _) in list(self._open.items()) if episode in process.episodes]  # fmt: skip

    def _timed_out(self, request: int) -> list[Event]:
        episode, kind = self._open[request]
        seconds, key = self._config.call_seconds, "call_seconds"
        if kind == "reset":
            seconds, key = self._config.reset_seconds, "reset_seconds"
        self._home[episode].is_stuck = True
        return [self._broken(request, f"{kind} took longer than environment.{key} = {seconds:g}")]

    def _broken(self, request: int, message: str) -> Event:
        episode, kind = self._open.pop(request)
        log.warning("an episode's environment is broken: %s", message)
        return Event(episode, kind, {"failure": message})

    def _ask(self, episode: int, kind: str, limit_seconds: float, **needed: Any) -> None:
        process, request = self._home[episode], next(self._numbers)
        self._open[request] = episode, kind
        if process.exit_code is not None:  # while the policy's turn was sampled: nobody will answer
            failure = f"its process had ended before this {kind} (exit code {process.exit_code})"
            self._answers.put((process, {"id": request, "failure": failure}))
            return
        heapq.heappush(self._deadlines, (time.monotonic() + limit_seconds, request))
        self._send(process, {"id": request, "kind": kind, "episode": episode, **needed})

    def _send(self, process: _Process, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its reader says what became of it
            process.channel.send(pickle.dumps(message), self._config.call_seconds)

    def _placed(self) -> _Process:
        """The process for a new episode: of those that are sound the one with fewest."""
        sound = [process for process in self._processes if not process.is_stuck]
        if len(sound) < self._config.workers and (not sound or min(len(each.episodes) for each in sound)):
            started, _ = self._start(describes=False)
            self._processes.append(started)
            sound.append(started)
        return min(sound, key=lambda process: len(process.episodes))

    def _start(self, describes: bool) -> tuple[_Process, dict[str, Any]]:
        handle, connection = start_worker("grpo_dist.environments.worker", self._config.secrets, "environment.secrets")
        process = _Process(handle, Channel(connection))
        try:
            process.channel.send(pickle.dumps((self._config, self._rewards, describes)), START_SECONDS)
            description = json.loads(process.channel.receive(START_SECONDS))
        except (OSError, EOFError) as error:
            code = self._kill(process)
            raise ValueError(
                f"environment: its process ended (exit code {code}) or hung while it imported environment.tools and "
                "environment.factory; what it printed is above"
            ) from error
        if "error" in description:
            self._kill(process)
            raise ValueError(description["error"])
        # an object of its own for the thread that reads: a socket's time limit is one for all that use it
        answers = Channel(connection.dup())
        threading.Thread(target=self._read, args=(process, answers), daemon=True, name="environments").start()
        return process, description

    def _read(self, process: _Process, answers: Channel) -> None:
        while True:
            try:
                answer = json.loads(answers.receive(_FOR_EVER_SECONDS))
            except (OSError, EOFError, ValueError):
                self._answers.put((process, None))
                answers.close()
                return
            self._answers.put((process, answer))

    def _kill(self, process: _Process) -> int:
        """Kill a process and its children; returns its own exit code where it had ended, else -9."""
        if process in self._processes:
            self._processes.remove(process)
        signal_kill(process.process)
        process.channel.close()
        return process.process.wait()
