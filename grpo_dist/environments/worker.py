"""A process of environments: it makes them, calls their methods and the tools, and answers as each call ends.

Requests come pickled from the trusted side, answers go back as JSON. Calls of different episodes run at the same time,
in threads, or in one event loop where they are asynchronous. Of one episode's calls of methods each waits for the one
before it, since they share their environment; calls of functions do not wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..rewards.pool.channel import Channel
from ..rewards.pool.worker import connect, limit_memory
from ..rewards.registry import BUILT_IN, RewardFunction, episode_columns, import_object, resolve
from ..text.plain import exception_line
from . import randomness
from .said import observation_of, shortened, text_of, without_addresses

if TYPE_CHECKING:
    from ..config.environment import EnvironmentConfig
    from ..config.rewards import RewardConfig

_RESERVED = ("reset", "get_reward", "done", "after_turn")
_THREADS = 256
_TRACEBACK_CHARACTERS = 4000
_NO_SIGNALS = "signal only works in main thread"
"""How Python refuses a signal handler in a thread."""


def main(descriptor: int, parent: int) -> None:
    """Serve the channel at file descriptor `descriptor` for the process `parent`, and end with it."""
    channel = connect(descriptor, parent)
    config: EnvironmentConfig
    config, rewards, describes = pickle.loads(channel.receive())
    limit_memory(int(config.memory_limit_gib * 2**30))
    randomness.install()
    try:
        worker = Worker(config, rewards, channel)
        description = worker.description() if describes else {}
    except ValueError as error:
        channel.answer({"error": str(error)})
        return
    channel.answer(description)
    while True:
        try:
            worker.begin(pickle.loads(channel.receive()))
        except EOFError:
            os._exit(0)  # threads of tools may be in the middle of something


@dataclass
class _Episode:
    """An episode under way."""

    name: str
    """Of its environment's factory."""
    environment: Any
    """None where there are only functions."""
    seed: int
    """Of what it draws."""
    stream: random.Random
    turn: int = 0


class Worker:
    """The environments of this process, by episode."""

    def __init__(self, config: EnvironmentConfig, rewards: list[RewardConfig], channel: Channel) -> None:
        """Import tools, factory, and the rewards that take environments. Raises ValueError with the user's mistake."""
        self._config, self._channel = config, channel
        self._functions = _by_name(config.tools)
        self._factories = {name: imported(path) for name, path in config.factories.items()} or {"": None}
        self._rewards = _taking_environments(rewards)
        self._live: dict[int, _Episode] = {}
        self._send_lock = threading.Lock()
        self._requests, self._calls = (ThreadPoolExecutor(_THREADS) for _ in range(2))  # those wait for these
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._free = {name: [_first(config.factories[name], factory)] if factory else []
                      for name, factory in self._factories.items()}  # fmt: skip
        self._methods = {name: _methods(each[0]) if each else {} for name, each in self._free.items()}

    def description(self) -> dict[str, Any]:
        """By the environments' names, the tools' JSON schemas; which of them answer turns without calls, whether there
        is a reward, and which rewards take environments. Raises ValueError."""
        tools = {name: self._functions | methods for name, methods in self._methods.items()}
        for methods in self._methods.values():
            if both := set(methods) & set(self._functions):
                raise ValueError(f"environment: {', '.join(sorted(both))} is a tool and a method of an environment")
        if unknown := set(self._config.stop_tools) - {tool for each in tools.values() for tool in each}:
            raise ValueError(f"environment.stop_tools: {', '.join(sorted(unknown))} is no tool")
        if self._rewards and not self._config.factories:
            raise ValueError(f"rewards: {', '.join(self._rewards)} takes `environments`; environment.factory is null")
        return {
            "schemas": {name: [_schema(*tool) for tool in each.items()] for name, each in tools.items()},
            "with_users": [name for name, instances in self._free.items()
                           if any(hasattr(each, "after_turn") for each in instances)],
            "rewards": list(self._rewards),
            "has_reward": any(callable(getattr(each, "get_reward", None))
                              for instances in self._free.values() for each in instances),
        }  # fmt: skip

    def begin(self, request: dict[str, Any]) -> None:
        """Start to work on a request: `id`, `episode`, `kind` (reset, call, reward, end) and what the kind needs."""
        if request["kind"] == "end":
            ended = self._live.pop(request["episode"], None)
            if ended is not None and ended.environment is not None:
                self._free[ended.name].append(ended.environment)
            return
        self._requests.submit(self._answer, request)

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = getattr(self, f"_{request['kind']}")(request)
        except BaseException as error:  # tools may exit or interrupt themselves: the environment is then broken
            line = shortened("".join(traceback.format_exception_only(error)).strip(), _TRACEBACK_CHARACTERS)
            answer = {"failure": line, "traceback": traceback.format_exc()[-_TRACEBACK_CHARACTERS:]}
            self._live.pop(request["episode"], None)  # nobody plays in it again
        with self._send_lock:
            self._channel.answer({"id": request["id"], **answer})

    def _reset(self, request: dict[str, Any]) -> dict[str, Any]:
        name, seed, observation = request["name"], request["seed"], None
        stream = random.Random(seed)
        randomness.use(stream)
        factory = self._factories[name]
        try:
            environment = self._free[name].pop()
        except IndexError:
            environment = factory() if factory else None
        if hasattr(environment, "reset"):
            observation = self._result(environment.reset(**_taken(environment.reset, request["row"], seed)))
        self._live[request["episode"]] = _Episode(name, environment, seed, stream)
        return {"observation": observation_of(observation)}

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        episode = self._live[request["episode"]]
        environment = episode.environment
        episode.turn += 1
        waiting: list[Any] = []
        for number, (name, arguments) in enumerate(request["calls"]):
            if name in self._methods[episode.name]:
                randomness.use(episode.stream)
                waiting.append(self._called(getattr(environment, name), arguments))
            else:  # at the same time as others, so with a stream of its own
                randomness.use(random.Random(f"{episode.seed}/{episode.turn}/{number}"))
                run = contextvars.copy_context().run
                waiting.append(self._calls.submit(run, self._called, self._functions[name], arguments))
        randomness.use(episode.stream)
        answers = [each if isinstance(each, dict) else each.result() for each in waiting]
        for answer in answers:
            answer["text"] = shortened(answer["text"], self._config.max_tool_characters)
        return {"answers": answers, "done": self._is_done(environment)}

    def _turn(self, request: dict[str, Any]) -> dict[str, Any]:
        episode = self._live[request["episode"]]
        randomness.use(episode.stream)
        said = observation_of(self._result(episode.environment.after_turn(request["text"])))
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        return {"messages": messages, "done": not messages or self._is_done(episode.environment)}

    def _called(self, tool: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """What a call gives, or the error that the model gets to read."""
        try:
            return {"text": text_of(self._result(tool(**arguments))), "outcome": "answered"}
        except MemoryError:
            raise
        except Exception as error:
            line = exception_line(error)
            if _NO_SIGNALS in line:  # no call of this tool can work, whatever the model writes
                raise RuntimeError(
                    f"{tool.__name__} sets a signal handler, and tools run in threads, which cannot: leave its own "
                    "time limit out, since environment.call_seconds limits each call"
                ) from error
            return {"text": f"Error: {without_addresses(line)}", "outcome": "error"}

    def _reward(self, request: dict[str, Any]) -> dict[str, Any]:
        environment = self._live[request["episode"]].environment
        randomness.use(self._live[request["episode"]].stream)
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

    def _is_done(self, environment: Any) -> bool:
        """Whether an environment says that the episode has ended."""
        done = getattr(environment, "done", False)
        return bool(self._result(done() if callable(done) else done))

    def _result(self, value: Any) -> Any:
        """The value, of a coroutine what it returns."""
        if not inspect.isawaitable(value):
            return value

        async def wait() -> tuple[Any, BaseException | None]:
            try:
                return await value, None
            except (SystemExit, KeyboardInterrupt) as error:  # would end the loop, in which other episodes' calls wait
                return None, error

        result, left = asyncio.run_coroutine_threadsafe(wait(), self._loop).result()
        if left is not None:
            raise left
        return result


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


def _by_name(paths: list[str]) -> dict[str, Callable[..., Any]]:
    """Functions by the names that the model calls them by. Raises ValueError where two have the same."""
    named: dict[str, Callable[..., Any]] = {}
    for path in paths:
        name = path.rpartition(":")[2].rpartition(".")[2]
        if name in named:
            raise ValueError(f"environment.tools: two are called {name!r}, and the model calls tools by their names: "
                             "give one another name")  # fmt: skip
        named[name] = imported(path)
    return named


def _first(path: str, factory: Callable[[], Any]) -> Any:
    """What a factory makes. Raises ValueError where it fails."""
    try:
        return factory()
    except Exception as error:  # its constructor is the user's code
        traceback.print_exc()
        raise ValueError(f"environment.factory: {path!r} cannot be made: {exception_line(error)}") from error


def _methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """The methods of an environment that are tools."""
    names = [name for name in dir(environment) if not name.startswith("_") and name not in _RESERVED
             # a property may need an episode
             and not isinstance(inspect.getattr_static(environment, name), property)]  # fmt: skip
    return {name: method for name in names if inspect.ismethod(method := getattr(environment, name))}


def _taken(reset: Callable[..., Any], row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The columns that `reset` takes: all of them where it has **kwargs; and the seed where it names a `seed`."""
    parameters = inspect.signature(reset).parameters
    if "seed" in parameters:
        row = {"seed": seed} | row
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return row
    return {name: value for name, value in row.items() if name in parameters}


def _schema(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """A tool's JSON schema, which has its name. Raises ValueError where type hints or docstring are missing, or an
    argument has no name."""
    from transformers.utils import chat_template_utils

    if "torch" not in sys.modules:  # then no type hint is a tensor, and to import it takes two seconds and 300 MB
        chat_template_utils.is_torch_available = lambda: False
    try:
        schema = chat_template_utils.get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds
        raise ValueError(f"environment: the tool {name!r} needs type hints and a Google docstring that describes each "
                         f"argument under `Args:`: {error}") from error  # fmt: skip
    schema["function"]["name"] = name  # a decorator's function may have another
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if nameless := [str(each) for each in inspect.signature(tool).parameters.values() if each.kind not in by_name]:
        raise ValueError(f"environment: the tool {name!r} takes {', '.join(nameless)}, and a model gives arguments by "
                         "name: write each as one that has a name")  # fmt: skip
    return dict(schema)
