"""A scoring worker: a new Python that resolves the rewards, then answers one call after another until it is closed.

It imports nothing but the standard library by itself, so that it starts fast. It neither schedules nor retries calls:
the pool does. Requests are pickled by the trainer. Answers are JSON, so that the trainer never unpickles data of a
reward function.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import math
import numbers
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from ...config.rewards import MOST_REWARD
from ..registry import RewardFunction, declared_placement, resolve
from .channel import Channel

if TYPE_CHECKING:
    import asyncio

    from ...config.schema import RewardConfig
    from ..placement import Placement
    from ..scores import FailureKind

_PR_SET_PDEATHSIG = 1
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_LEFT_TO_THE_PARENT = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
MARKER = "GRPO_DIST_WORKER"
"""Variable of the environment with a name of this worker, which all that users' code starts inherits."""
_END_SECONDS = 10.0
_TRACEBACK_CHARACTERS = 20_000
_SHOWN_CHARACTERS = 200
_OWN_METRICS = ("mean", "seconds", "repeated_calls", "failed")
"""Metrics that the trainer has for every reward."""


class BadValueError(ValueError):
    """A reward function's result is not one reward per completion."""


def main(descriptor: int, parent: int) -> None:
    """Serve the channel at file descriptor `descriptor` for the process `parent`, and end with it."""
    channel = connect(descriptor, parent)
    configs, placement, memory_limit_bytes = pickle.loads(channel.receive())
    if memory_limit_bytes is not None:
        limit_memory(memory_limit_bytes)
    try:
        rewards = [resolve_for(config, placement) for config in configs]
    except ValueError as error:
        channel.answer({"error": str(error)})
        return
    channel.answer({"rewards": [_describe(reward) for reward in rewards]})
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.answer(answer(rewards, request) | {"resident_bytes": _resident_bytes()})


def connect(descriptor: int, parent: int) -> Channel:
    """The channel at a file descriptor, in a process that ends with its parent, ends with its children, and leaves
    signals to its parent."""
    try:
        _end_children_too()
    except BlockingIOError as error:
        sys.exit(f"a worker process cannot start another ({error}): the limit of processes is reached (ulimit -u, "
                 "pids.max)")  # fmt: skip
    _end_with(parent)
    for number in _LEFT_TO_THE_PARENT:
        # A handler that does nothing, not SIG_IGN: programs that users' code starts would inherit SIG_IGN, and nobody
        # could terminate them.
        signal.signal(number, lambda *_: None)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    channel = Channel(connection)
    os.register_at_fork(after_in_child=lambda: _leave(channel))
    return channel


def limit_memory(limit_bytes: int) -> None:
    """Bound what this process can allocate, where the system can (Linux)."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def resolve_for(config: RewardConfig, placement: Placement) -> RewardFunction | Placement:
    """Return the function of a reward with this placement, and of another reward its placement."""
    declared = declared_placement(config)
    return resolve(config) if declared == placement else declared


def answer(rewards: Sequence[RewardFunction | Placement], request: bytes) -> dict[str, Any]:
    """Make one call and return `{"values": […], "bad": {place: [kind, message]}, "metrics": …, "extras": …}`, or its
    `kind`, `message` and `traceback`.

    A request is the pickled tuple of the reward's place, the number of completions, the keywords of the call and the
    trainer's state. Values are floats, lists of floats and Nones (one per token), or None where the reward does not
    apply or its value is bad.
    """
    keywords: dict[str, Any] = {}
    try:
        place, count, keywords, state = pickle.loads(request)
        reward = rewards[place]
        assert isinstance(reward, RewardFunction), "the pool sends a reward's calls to where the reward runs"
        log = Log(count)
        offered = {"trainer_state": state, "log_metric": log.metric, "log_extra": log.extra}
        keywords |= {name: value for name, value in offered.items() if reward.parameters.takes(name)}
        values, bad = read_values(_call(reward, keywords), count)
    except BadValueError as error:
        return {"kind": "bad_value", "message": str(error), "traceback": ""}
    except BaseException as error:
        # a reward may exit, or interrupt itself as Math-Verify does: all of this is reported
        line = "".join(traceback.format_exception_only(error)).strip()
        return {
            "kind": "raised",
            "message": line + _hint(error, keywords),
            "traceback": _traceback(error)[-_TRACEBACK_CHARACTERS:],
        }
    return {"values": values, "bad": bad, "metrics": log.means(), "extras": log.extras}


def _hint(error: BaseException, keywords: Mapping[str, Any]) -> str:
    """What to do where a function takes a conversation's completion, a list of messages, for a text."""
    if not isinstance(error, AttributeError | TypeError) or "list" not in str(error):
        return ""
    if all(isinstance(completion, str) for completion in keywords.get("completions", ())):
        return ""
    return (". The prompts are conversations, so each completion is a list of messages: its text is "
            "completion[-1]['content']")  # fmt: skip


def _traceback(error: BaseException) -> str:
    """The traceback of an error from where a reward's own code begins."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


class Log:
    """The log of a reward during one call with `count` completions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """TRL's `log_metric`: a number; several of a name are averaged. Raises BadValueError for anything else, and for
        a name that the trainer gives a metric of this reward."""
        number = _as_float(value)
        if not math.isfinite(number):
            raise BadValueError(f"logged {_shown(value)} as the metric {name!r}, expected a finite number")
        if name in _OWN_METRICS:
            raise BadValueError(f"logged a metric {name!r}, which the trainer logs by itself: give it another name")
        self._metrics.setdefault(str(name), []).append(number)

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """TRL's `log_extra`: one value for each completion, for their table; see `_cell`."""
        given = [_cell(value) for value in values]
        if len(given) != self._count:
            raise BadValueError(f"logged {len(given)} values as {column!r} for {self._count} completions")
        self.extras[str(column)] = given

    def means(self) -> dict[str, float]:
        """The mean of each metric over the call."""
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}


def _cell(value: Any) -> Any:
    """A value for the table of the completions, which has numbers of 64 bits; any other value becomes a text."""
    value = _plain(value)
    is_cell = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)
    return value if is_cell else str(value)


Value = float | list[float | None] | None


def read_values(result: object, count: int) -> tuple[list[Value], dict[int, tuple[FailureKind, str]]]:
    """Return a result's values as floats, None where it does not apply, and kind and message of each bad one by place.

    Bools, ints, NumPy scalars and tensors without dimensions are numbers; arrays and tensors with one dimension are
    lists. A value that is a list has one number, or None, for each token of its completion. An exception means that
    this completion could not be scored. Raises BadValueError where the result is not a list of `count` values.
    """
    if hasattr(result, "tolist") and getattr(result, "ndim", None) is not None:
        result = result.tolist()
    if isinstance(result, (str, bytes, Mapping, Set)) or not isinstance(result, Iterable):
        raise BadValueError(f"returned {_shown(result)}, expected a list of {count} floats or Nones")
    given = list(result)
    if len(given) != count:
        raise BadValueError(f"returned {len(given)} values for {count} completions: {_shown(given)}")
    values: list[Value] = []
    bad: dict[int, tuple[FailureKind, str]] = {}
    for place, value in enumerate(given):
        read = None if isinstance(value, Exception) else _read_value(value)
        if isinstance(value, Exception):
            bad[place] = ("raised", "".join(traceback.format_exception_only(value)).strip())
        elif not all(each is None or abs(each) <= MOST_REWARD for each in (read if isinstance(read, list) else [read])):
            expected = f"a finite number of at most {MOST_REWARD:g}, None, or a list of these (one per token)"
            bad[place], read = ("bad_value", f"returned {_shown(value)}, expected {expected}"), None
        values.append(read)
    return values, bad


def _read_value(value: Any) -> Value:
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [None if each is None else _as_float(each) for each in value]
    return None if value is None else _as_float(value)


def _as_float(value: Any) -> float:
    """Return a value as a float, or NaN, which no reward may be, where it is not a number."""
    value = _plain(value)
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def _plain(value: Any) -> Any:
    """Python's number for one of NumPy's, or for a tensor without dimensions."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _call(reward: RewardFunction, keywords: dict[str, Any]) -> object:
    """Call a reward function, and wait for its result where it is asynchronous."""
    result = reward.function(**keywords)
    if not inspect.isawaitable(result):
        return result
    return _event_loop().run_until_complete(result)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the process's one event loop: a client that a reward keeps between calls belongs to its first loop."""
    import asyncio  # this import takes most of a worker's start, and most rewards are not asynchronous

    return asyncio.new_event_loop()


def _describe(reward: RewardFunction | Placement) -> dict[str, Any]:
    """Return a reward's placement, and its parameters where it runs here, as JSON."""
    if not isinstance(reward, RewardFunction):
        return {"placement": reward}
    parameters = reward.parameters
    return {
        "placement": reward.placement,
        "accepted": None if parameters.accepted is None else sorted(parameters.accepted),
        "required": sorted(parameters.required),
        "bound": sorted(parameters.bound),
        "most_items": parameters.most_items,
    }


def _resident_bytes() -> int:
    """Return the memory of this process, or its peak where the kernel does not report it (not Linux)."""
    import resource

    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even in the middle of a call (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call of prctl
        sys.exit(f"scoring worker: the process {parent} that started it has ended")


def _end_children_too() -> None:
    """Let what users' code has started end with this process, however that ends (Linux): its process group, and
    programs in groups of their own, as servers, browsers and whatever has a time limit are. These have the environment.

    Whoever kills the trainer with SIGKILL leaves nobody else who could do it.
    """
    if sys.platform != "linux":
        return
    own, between = os.getpid(), os.fork()
    if between:
        os.waitpid(between, 0)
        return
    if not os.fork():  # a grandchild: users' code may wait for all of its children
        os.setsid()  # the kill of the worker's group would end it before its work
        for descriptor in os.listdir("/proc/self/fd"):  # the trainer waits until nobody has the channel
            with contextlib.suppress(OSError):
                os.close(int(descriptor))
        try:
            select.select([os.pidfd_open(own)], [], [])
        except ProcessLookupError:
            pass  # it has ended already
        except OSError:  # the kernel is older than 5.3, or a sandbox forbids it
            os._exit(0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(own, signal.SIGKILL)
        _end_marked(f"{MARKER}={os.environ.get(MARKER, own)}".encode())
    os._exit(0)


def _end_marked(variable: bytes) -> None:
    """Kill all processes with this variable in their environment but this one, and those that they start meanwhile."""
    found, until = True, time.monotonic() + _END_SECONDS
    while found and time.monotonic() < until:  # the kernel ends a process that waits for a device later
        found = False
        for each in os.listdir("/proc"):
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                if each.isdecimal() and int(each) != os.getpid() and variable in _environment(each):
                    os.kill(int(each), signal.SIGKILL)
                    found = True
        time.sleep(0.01)


def _environment(process: str) -> list[bytes]:
    with open(f"/proc/{process}/environ", "rb") as file:
        return file.read().split(b"\0")


def _leave(channel: Channel) -> None:
    """Detach a process that a reward forked: signals end it, and it does not keep the channel open."""
    channel.close()
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_DFL)


def _shown(value: object) -> str:
    shown = f"{value!r} ({type(value).__name__})"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
