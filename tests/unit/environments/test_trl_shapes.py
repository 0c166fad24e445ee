"""Tools, environments and rewards of the shapes that TRL's examples have: they work as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from modules_on_disk import importable

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.rewards import RewardConfig
from grpo_dist.environments.host import EnvironmentHost

MODULE = '''
import asyncio
import signal
import sqlite3


def multiply(a: int, b: int) -> int:
    """
    Give the product of two integers.

    Args:
        a: One of them.
        b: The other one.

    Returns:
        Their product.
    """
    return a * b


async def add_later(a: int, b: int) -> int:
    """
    Give the sum of two integers.

    Args:
        a: One of them.
        b: The other one.

    Returns:
        Their sum.
    """
    await asyncio.sleep(0.01)
    return a + b


def select(command: str) -> list[tuple]:
    """
    Ask the table of genes.

    Args:
        command: In SQL.

    Returns:
        The rows.
    """
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("create table genes (name text, taxon integer)")
        connection.execute("insert into genes values ('JNK', 9606), ('HOG', 4932)")
        return connection.execute(command).fetchall()
    finally:
        connection.close()


def look_up(word: str) -> set:
    """
    Look a word up.

    Args:
        word: Any.

    Returns:
        What is known.
    """
    if word == "nothing":
        raise KeyError(object())
    return {"b", word, "a", 10, 9} if word != "object" else {object()}


def select_in_time(command: str) -> list[tuple]:
    """
    Ask the table of genes, with a time limit.

    Args:
        command: In SQL.

    Returns:
        The rows.
    """
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.alarm(5)
    return select(command)


class Counter:
    def __init__(self):
        self._counter = 0

    def reset(self) -> None:
        self._counter = 0

    def increment(self, a: int) -> int:
        """
        Raise the counter.

        Args:
            a: By how much.

        Returns:
            The new value.
        """
        self._counter += a
        return self._counter


class Parrot:
    def __init__(self):
        self.reward = 0.0

    def reset(self, **kwargs) -> None | str:
        self.reward = 0.0
        return None

    def echo(self, message: str) -> str:
        """
        Say it again.

        Args:
            message: What to say.

        Returns:
            The same.
        """
        self.reward = 0.1 * len(message)
        return message


class Words:
    def reset(self, **kwargs) -> str | None:
        self._word, self._log = kwargs["word"], "Guess a word of five letters."
        self.reward, self.done = 0.0, False
        return self._log

    def guess(self, guess: str) -> str:
        """
        Guess the word.

        Args:
            guess: A word in brackets, as [crane].

        Returns:
            What is right.
        """
        if self.done:
            raise ValueError("Game over.")
        seen = len(self._log)
        self._log += " " + "".join("G" if a == b else "X" for a, b in zip(guess.strip("[]"), self._word))
        self.done = guess.strip("[]") == self._word
        self.reward = float(self.done)
        return self._log[seen:]


class Either(Words):
    """Two games in one class: a column says which."""

    active = None

    def reset(self, **kwargs) -> str | None:
        self.active = kwargs.get("env", "words")
        if self.active == "words":
            return super().reset(**kwargs)
        self.reward, self.done, self._place = 0.0, False, 2
        return "You stand at 2 of 5."

    def guess(self, guess: str) -> str:
        """
        Guess the word.

        Args:
            guess: A word.
        """
        if self.active != "words":
            raise ValueError("there is no word to guess here")
        return super().guess(guess)

    def move(self, direction: str) -> str:
        """
        Take a step.

        Args:
            direction: left or right.
        """
        if self.active != "walk":
            raise ValueError("there is nowhere to go here")
        self._place += 1 if direction == "right" else -1
        self.done = self._place == 5
        self.reward = 1.0 if self.done else -1.0
        return f"You stand at {self._place} of 5."


def reward_func(environments, **kwargs):
    return [env.reward for env in environments]


def words_reward(environments, **kwargs) -> list[float | None]:
    return [env.reward if env.active == "words" else None for env in environments]


def walk_reward(environments, **kwargs) -> list[float | None]:
    return [max(env.reward, 0.0) if env.active == "walk" else None for env in environments]
'''


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with importable(tmp_path_factory, "shapes", MODULE):
        yield


def opened(*rewards: str, **options: Any) -> EnvironmentHost:
    """A host of a factory or of tools of the module above."""
    config = EnvironmentConfig(**options | {"workers": 1})
    return EnvironmentHost(config, [RewardConfig(f"shapes:{name}") for name in rewards])


def ask(host: EnvironmentHost) -> dict[str, Any]:
    """The next answer, of an environment that is not broken."""
    (event,) = host.poll(60.0)
    assert "failure" not in event.answer, event.answer
    return event.answer


def begun(host: EnvironmentHost, **row: Any) -> str | None:
    """What an episode begins with."""
    host.end(0)
    host.reset(0, {"prompt": [{"role": "user", "content": "Play."}], **row})
    observation: str | None = ask(host)["observation"]
    return observation


def called(host: EnvironmentHost, name: str, **arguments: Any) -> tuple[str, str, bool]:
    """The text and the outcome of a call, and whether the episode is done."""
    host.call(0, [(name, arguments)])
    answer = ask(host)
    (only,) = answer["answers"]
    return only["text"], only["outcome"], answer["done"]


def rewards(host: EnvironmentHost) -> dict[str, float | None]:
    """What the rewards that take environments say."""
    host.reward(0, {"completions": []})
    values: dict[str, float | None] = ask(host)["rewards"]
    return values


def test_plain_functions_are_tools() -> None:
    with opened(tools=["shapes:multiply", "shapes:add_later", "shapes:select"]) as host:
        assert set(host.tools("")) == {"multiply", "add_later", "select"} and not host.has_reward
        begun(host)
        assert called(host, "multiply", a=6, b=7) == ("42", "answered", False)
        assert called(host, "add_later", a=6, b=7) == ("13", "answered", False)
        text, outcome, _ = called(host, "select", command="select name from genes where taxon = 9606")
        assert json.loads(text) == [["JNK"]] and outcome == "answered"
        text, outcome, _ = called(host, "select", command="select")
        assert text.startswith("Error: OperationalError:") and outcome == "error"


def test_a_tool_with_an_alarm_breaks_its_episode() -> None:
    """The model could do nothing about it: it says what to leave out, instead of an answer that is always an error."""
    with opened(tools=["shapes:select_in_time"]) as host:
        begun(host)
        host.call(0, [("select_in_time", {"command": "select 1"})])
        (event,) = host.poll(60.0)
        assert "select_in_time sets a signal handler" in event.answer["failure"]
        assert "environment.call_seconds" in event.answer["failure"]


def test_no_answer_depends_on_the_process() -> None:
    """An object's address would."""
    with opened(tools=["shapes:look_up"]) as host:
        begun(host)
        assert called(host, "look_up", word="c") == ('[9, 10, "a", "b", "c"]', "answered", False)
        assert called(host, "look_up", word="nothing") == ("Error: KeyError: <object object>", "error", False)
        assert called(host, "look_up", word="object") == ('["<object object>"]', "answered", False)


def test_an_environment_of_state_alone() -> None:
    with opened(factory="shapes:Counter") as host:
        for _ in range(2):
            assert begun(host) is None
            assert called(host, "increment", a=2) == ("2", "answered", False)
            assert called(host, "increment", a=3) == ("5", "answered", False)


def test_a_reward_reads_what_the_environment_says() -> None:
    with opened("reward_func", factory="shapes:Parrot") as host:
        assert begun(host) is None
        assert called(host, "echo", message="Hello") == ("Hello", "answered", False)
        assert rewards(host) == {"shapes:reward_func": 0.5}
        begun(host)
        assert rewards(host) == {"shapes:reward_func": 0.0}


def test_a_game_that_is_done_says_so() -> None:
    with opened("reward_func", factory="shapes:Words") as host:
        assert begun(host, word="crane") == "Guess a word of five letters."
        assert called(host, "guess", guess="[crown]") == (" GGXXX", "answered", False)
        assert rewards(host) == {"shapes:reward_func": 0.0}
        assert called(host, "guess", guess="[crane]") == (" GGGGG", "answered", True)
        assert called(host, "guess", guess="[crane]") == ("Error: ValueError: Game over.", "error", True)
        assert rewards(host) == {"shapes:reward_func": 1.0}


def test_one_class_of_two_games() -> None:
    with opened("words_reward", "walk_reward", factory="shapes:Either") as host:
        assert set(host.tools("")) == {"guess", "move"}
        begun(host, env="words", word="crane")
        assert called(host, "move", direction="left")[1] == "error"
        called(host, "guess", guess="crane")
        assert rewards(host) == {"shapes:words_reward": 1.0, "shapes:walk_reward": None}
        assert begun(host, env="walk", word=None) == "You stand at 2 of 5."
        assert called(host, "guess", guess="crane")[1] == "error"
        assert rewards(host) == {"shapes:words_reward": None, "shapes:walk_reward": 0.0}
        for _ in range(3):
            called(host, "move", direction="right")
        assert rewards(host) == {"shapes:words_reward": None, "shapes:walk_reward": 1.0}
