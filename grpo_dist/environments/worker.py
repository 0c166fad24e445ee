"""A process of environments: it makes them, calls their methods and the tools, and answers as each call ends.

Requests come pickled from the trusted side, answers go back as JSON. Calls of different episodes run at the same time,
in threads, or in one event loop where they are asynchronous. Of one episode's calls of methods each waits for the one
before it, since they share their environment; calls of functions do not wait.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from grpo_dist.rewards.pool.channel import Channel
from grpo_dist.rewards.pool.worker import connect, limit_memory
from grpo_dist.rewards.registry import BUILT_IN, RewardFunction, episode_columns, import_object, resolve

if TYPE_CHECKING:
    from grpo_dist.config.environment import EnvironmentConfig
    from grpo_dist.config.rewards import RewardConfig

_RESERVED = ("reset", "get_reward", "done")
_THREADS = 256
_TRACEBACK_CHARACTERS = 4000


def main(descriptor: int, parent: int) -> None:
    """Serve the channel at file descriptor `descriptor` for the process `parent`, and end with it."""
    channel = connect(descriptor, parent)
    config: EnvironmentConfig
    config, rewards, describes = pickle.loads(channel.receive())
    limit_memory(int(config.memory_limit_gib * 2**30))
    try:
        worker = Worker(config, rewards, channel)
        description = worker.description() if describes else {}
    except ValueError as error:
        channel.send(json.dumps({"error": str(error)}).encode())
        return
    channel.send(json.dumps(description).encode())
    while True:
        try:
            worker.begin(pickle.loads(channel.receive()))
        except EOFError:
            os._exit(0)  # threads of tools may be in the middle of something


class Worker:
    """The environments of this process, by episode."""

    def __init__(self, config: EnvironmentConfig, rewards: list[RewardConfig], channel: Channel) -> None:
        """Import tools, factory, and the rewards that take environments. Raises ValueError with the user's mistake."""
        self._config, self._channel = config, channel
        self._functions = {function.__name__: function for function in map(imported, config.tools)}
        self._factory = imported(config.factory) if config.factory else None
        self._rewards = _taking_environments(rewards)
        self._free: list[Any] = []
        self._live: dict[int, Any] = {}
        self._send_lock = threading.Lock()
        self._requests, self._calls = (ThreadPoolExecutor(_THREADS) for _ in range(2))  # those wait for these
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._methods: dict[str, Callable[..., Any]] = {}
        if self._factory is not None:
            first = self._made()
            self._methods = {name: method for name, method in inspect.getmembers(first, inspect.ismethod)
                             if not name.startswith("_") and name not in _RESERVED}  # fmt: skip
            self._free.append(first)

    def description(self) -> dict[str, Any]:
        """The tools' JSON schemas, and whether the environment has a reward. Raises ValueError."""
        if both := set(self._methods) & set(self._functions):
            raise ValueError(f"environment: {', '.join(sorted(both))} is a tool and a method of the environment too")
        tools = self._functions | self._methods
        if unknown := set(self._config.stop_tools) - set(tools):
            raise ValueError(f"environment.stop_tools: {', '.join(sorted(unknown))} is no tool")
        if self._rewards and self._factory is None:
            raise ValueError(f"rewards: {', '.join(self._rewards)} takes `environments`; environment.factory is null")
        return {
            "schemas": [_schema(name, tool) for name, tool in tools.items()],
            "rewards": list(self._rewards),
            "has_reward": any(callable(getattr(each, "get_reward", None)) for each in self._free),
        }

    def begin(self, request: dict[str, Any]) -> None:
        """Start to work on a request: `id`, `episode`, `kind` (reset, call, reward, end) and what the kind needs."""
        if request["kind"] == "end":
            if (environment := self._live.pop(request["episode"], None)) is not None:
                self._free.append(environment)
            return
        self._requests.submit(self._answer, request)

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = {"reset": self._reset, "call": self._call, "reward": self._reward}[request["kind"]](request)
        except BaseException as error:  # tools may exit or interrupt themselves: the environment is then broken
            line = "".join(traceback.format_exception_only(error)).strip()
            answer = {"failure": line, "traceback": traceback.format_exc()[-_TRACEBACK_CHARACTERS:]}
            self._live.pop(request["episode"], None)  # nobody plays in it again
        with self._send_lock:
            self._channel.send(json.dumps({"id": request["id"], **answer}).encode())

    def _reset(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._factory is None:
            return {"observation": None}
        try:
            environment = self._free.pop()
        except IndexError:
            environment = self._made()
        observation = None
        if hasattr(environment, "reset"):
            observation = self._result(environment.reset(**_taken(environment.reset, request["row"])))
        self._live[request["episode"]] = environment
        return {"observation": None if observation is None else _text(observation)}

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        environment = self._live.get(request["episode"])
        waiting: list[Any] = []
        for name, arguments in request["calls"]:
            if name in self._methods:
                waiting.append(self._called(getattr(environment, name), arguments))
            else:
                waiting.append(self._calls.submit(self._called, self._functions[name], arguments))
        answers = [each if isinstance(each, dict) else each.result() for each in waiting]
        for answer in answers:
            answer["text"] = shortened(answer["text"], self._config.max_tool_characters)
        done = getattr(environment, "done", False)
        return {"answers": answers, "done": bool(done() if callable(done) else done)}

    def _called(self, tool: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """What a call gives, or the error that the model gets to read."""
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return {"text": f"Error: {error}", "outcome": "malformed"}
        try:
            return {"text": _text(self._result(tool(**arguments))), "outcome": "answered"}
        except MemoryError:
            raise
        except Exception as error:
            return {"text": f"Error: {type(error).__name__}: {error}", "outcome": "error"}

    def _reward(self, request: dict[str, Any]) -> dict[str, Any]:
        environment = self._live[request["episode"]]
        value = self._result(environment.get_reward()) if hasattr(environment, "get_reward") else None
        given = {name: [each] for name, each in request["row"].items()} | {"environments": [environment]}
        return {"reward": None if value is None else float(value),
                "rewards": {reward.name: self._scored(reward, given) for reward in self._rewards.values()}}  # fmt: skip

    def _scored(self, reward: RewardFunction, given: dict[str, list[Any]]) -> float | None:
        """What a reward gives one episode."""
        taken = {name: values for name, values in given.items() if reward.parameters.takes(name)}
        values = list(self._result(reward.function(**taken)))
        if len(values) != 1:
            raise ValueError(f"rewards: {reward.name!r} returned {len(values)} values for one episode")
        return None if values[0] is None else float(values[0])

    def _made(self) -> Any:
        assert self._factory is not None
        return self._factory()

    def _result(self, value: Any) -> Any:
        """The value, of a coroutine what it returns."""
        if not inspect.isawaitable(value):
            return value

        async def wait() -> Any:
            return await value

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()


def _taking_environments(rewards: list[RewardConfig]) -> dict[str, RewardFunction]:
    """The rewards that take `environments`, by name. Raises ValueError where one cannot be called here."""
    taking: dict[str, RewardFunction] = {}
    for reward in rewards:
        if reward.name in BUILT_IN or "environments" not in episode_columns(reward):
            continue
        if reward.name in taking:
            raise ValueError(f"rewards: {reward.name!r}, which takes `environments`, is given twice")
        if reward.environment:
            raise ValueError(f"rewards.environment: {reward.name!r} takes `environments` and is called in their "
                             f"processes: name {', '.join(reward.environment)} in environment.secrets")  # fmt: skip
        taking[reward.name] = resolve(reward, has_environments=True)
    return taking


def imported(path: str) -> Any:
    """What `module:name` names. Raises ValueError."""
    thing = import_object(path, path, "environment")
    if not callable(thing):
        raise ValueError(f"environment: {path!r} is a {type(thing).__name__}, expected a function or a class")
    return thing


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    note = f"\n[{len(text) - most} characters left out]\n"
    half = most // 2
    return text[:half] + note + text[len(text) - (most - half) :]


def _taken(function: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """The columns that a function takes: all of them where it has **kwargs."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return row
    return {name: value for name, value in row.items() if name in parameters}


def _schema(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """A tool's JSON schema. Raises ValueError where type hints or docstring are missing."""
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds
        raise ValueError(f"environment: the tool {name!r} needs type hints and a Google docstring that describes each "
                         f"argument under `Args:`: {error}") from error  # fmt: skip


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
