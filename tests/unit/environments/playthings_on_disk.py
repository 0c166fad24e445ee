"""Tools and environments that behave and that do not, and hosts of them."""

from __future__ import annotations

import time
from typing import Any

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost, Event

MODULE = '''
import asyncio, dataclasses, enum, os, sys, time

import numpy as np


@dataclasses.dataclass
class Found:
    count: int
    where: tuple


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Side(enum.Enum):
    LEFT = "left"


def add(a: int, b: int = 1) -> int:
    """Add.

    Args:
        a: One number.
        b: Another.
    """
    return a + b


async def sleep(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"slept {seconds}"


async def block(seconds: float) -> None:
    """Wait, and let nobody else on.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)


async def leave() -> None:
    """Exit."""
    sys.exit(3)


arrived, everybody = [], asyncio.Event()


async def meet(count: int) -> int:
    """Wait until so many calls are under way.

    Args:
        count: How many.
    """
    arrived.append(1)
    if len(arrived) == count:
        everybody.set()
    await everybody.wait()
    return len(arrived)


def fail(kind: str) -> object:
    """Misbehave.

    Args:
        kind: How.
    """
    print("a tool prints", kind)
    if kind == "raise":
        raise KeyError("no such row")
    if kind == "mute":
        raise Mute
    if kind == "half":
        return "a \\udcff"  # so Python reads a file's name that is not UTF-8
    if kind == "exit":
        sys.exit(3)
    if kind == "die":
        os._exit(7)
    if kind == "crash":
        import ctypes
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(1000)
    if kind == "loop":
        time.sleep(7)  # of the 8 s that it may take: what counts comes after them
        while True:
            pass
    if kind == "memory":
        return len(bytearray(1 << 40))
    if kind == "leak":
        kept = []
        while True:
            kept.append(bytes(1 << 28))
    if kind == "bomb":
        for _ in range(6):
            os.fork()
        with open("bomb", "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(1000)
    if kind == "fork":
        children = []
        while len(children) < 50:
            child = os.fork()
            if not child:
                time.sleep(1000)
                os._exit(0)
            children.append(child)
        return children
    if kind == "orphan":
        child = os.fork()
        if not child:
            time.sleep(1000)
        with open("orphan", "w") as file:
            file.write(str(child))
        os._exit(7)
    if kind == "large":
        return "x" * 100_000_000
    if kind == "object":
        return object()
    if kind == "numbers":
        return [np.int64(5), np.float32(0.5), np.bool_(True), np.arange(2000)[:3], Found(np.int8(1), (2,)), Side.LEFT]
    if kind == "set":
        return " ".join({"pear", "fig", "plum", "lime", "kiwi", "date"})
    if kind == "secret":
        return [os.environ.get("MY_TOKEN"), os.environ.get("OTHER_TOKEN")]
    return None


class Game:
    made = 0

    def __init__(self):
        Game.made += 1
        self.number = Game.made

    def reset(self, start: int = 0, **row):
        if start < 0:
            raise ValueError("a start below 0" + "!" * (-1 - start))
        self.total, self.done = start, False
        return f"Start at {start}." if start else None

    def move(self, by: int) -> str:
        """Move.

        Args:
            by: How far.
        """
        before, self.total = self.total, self.total + by
        time.sleep(0.01)
        self.done = self.total >= 10
        return f"{before} to {self.total}"

    async def get_reward(self):
        return self.total / 10

    def _secret(self):
        pass
'''
OTHER = '''
def plain(function):
    """A decorator that forgets its function's name."""

    def wrapper(by: int) -> int:
        """Add.

        Args:
            by: How much.
        """
        return function(by)

    return wrapper


def unnamed(a: int, /, *more: int) -> int:
    """Add.

    Args:
        a: One number.
        more: Others.
    """
    return a + sum(more)


class Tools:
    @staticmethod
    @plain
    def add(by):
        return 1 + by

    @staticmethod
    @plain
    def take(by):
        return 1 - by


class Level:
    @property
    def lives(self):
        raise ValueError("before the first episode there are none")

    def up(self, by: int) -> int:
        """Climb.

        Args:
            by: How far.
        """
        return by


class Broken:
    def __init__(self):
        raise KeyError("no level")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class BrokenMutely:
    def __init__(self):
        raise Mute


class Later:
    async def done(self):
        return False

    def up(self, by: int) -> int:
        """Climb.

        Args:
            by: How far.
        """
        return by
'''
CALL_SECONDS = 8.0


def make_config(**options: Any) -> EnvironmentConfig:
    """A config of everything in the module above."""
    tools = [f"playthings:{name}" for name in ("add", "sleep", "block", "leave", "meet", "fail")]
    defaults = {"tools": tools, "factory": "playthings:Game", "call_seconds": CALL_SECONDS, "max_tool_characters": 300}
    return EnvironmentConfig(**defaults | options)  # type: ignore[arg-type]


def events(host: EnvironmentHost, count: int) -> dict[int, Event]:
    """The next events by episode; fails where they do not come."""
    seen: dict[int, Event] = {}
    until = time.monotonic() + 60
    while len(seen) < count:
        assert time.monotonic() < until
        seen |= {event.episode: event for event in host.poll(0.5)}
    return seen


def begin(host: EnvironmentHost, *episodes: int, **row: Any) -> None:
    """Begin episodes."""
    for episode in episodes:
        host.reset(episode, row)
    assert all("failure" not in event.answer for event in events(host, len(episodes)).values())


def call(host: EnvironmentHost, episode: int, *calls: tuple[str, dict[str, Any]]) -> Event:
    """Make calls, and wait for what they give."""
    host.call(episode, calls)
    return events(host, 1)[episode]
