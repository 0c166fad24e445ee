"""Processes of environments: what tools answer, what breaks an episode, and what never reaches the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playthings_on_disk import MODULE, OTHER, begin, call, events, make_config

from grpo_dist.environments.host import EnvironmentHost
from grpo_dist.environments.said import shortened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools")
    (path / "playthings.py").write_text(MODULE)
    (path / "other.py").write_text(OTHER)
    return path


@pytest.fixture(autouse=True, scope="module")
def path(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def one_host() -> Iterator[EnvironmentHost]:
    with EnvironmentHost(make_config()) as opened:
        yield opened


@pytest.fixture
def host(one_host: EnvironmentHost) -> Iterator[EnvironmentHost]:
    """A host for all tests, as a run has one: whatever a test has broken in it, the next one's episodes begin."""
    yield one_host
    for episode in list(one_host._home):
        one_host.end(episode)


def failure_after_its_time(host: EnvironmentHost, episode: int, kind: str) -> str:
    """Why a call is given up that has not ended in time: its limit is over as soon as it is under way."""
    host.call(episode, [("fail", {"kind": kind})])
    assert host.poll(0.5) == []
    host._deadlines = [(0.0, request) for _, request in host._deadlines]
    return str(events(host, 1)[episode].answer["failure"])


def test_tools_and_methods(host: EnvironmentHost) -> None:
    assert set(host.tools("")) == {"add", "sleep", "block", "leave", "meet", "fail", "move"} and host.has_reward
    schema = next(each["function"] for each in host.schemas[""] if each["function"]["name"] == "add")
    assert schema["description"] == "Add." and schema["parameters"]["required"] == ["a"]
    host.reset(0, {"start": 3, "answer": "x"})
    host.reset(1, {})
    begun = events(host, 2)
    assert begun[0].answer["observation"] == "Start at 3." and begun[1].answer["observation"] is None
    event = call(host, 0, ("move", {"by": 1}), ("add", {"a": 2}), ("move", {"by": 2}), ("sleep", {"seconds": 0.1}))
    assert [each["text"] for each in event.answer["answers"]] == ["3 to 4", "3", "4 to 6", "slept 0.1"]
    assert event.answer["done"] is False
    assert call(host, 0, ("move", {"by": 9})).answer["done"] is True
    host.reward(0)
    assert events(host, 1)[0].answer == {"reward": 1.5, "rewards": {}}


def test_calls_of_episodes_do_not_wait_for_each_other() -> None:
    """Each call ends only when all have begun."""
    with EnvironmentHost(make_config(workers=1, call_seconds=60.0)) as host:
        begin(host, *range(20))
        for episode in range(20):
            host.call(episode, [("meet", {"count": 20})])
        assert all(event.answer["answers"][0]["text"] == "20" for event in events(host, 20).values())


def test_an_answer_that_waits_is_not_late(host: EnvironmentHost) -> None:
    """A trainer that decodes for longer than a call may take looks at its answer after the limit."""
    begin(host, 1)
    host.call(1, [("add", {"a": 2})])
    until = time.monotonic() + 60
    while host._answers.empty():
        assert time.monotonic() < until
        time.sleep(0.01)
    host._deadlines = [(0.0, request) for _, request in host._deadlines]
    assert events(host, 1)[1].answer["answers"][0]["text"] == "3"


def test_what_the_model_gets_to_read(host: EnvironmentHost) -> None:
    begin(host, 0)
    kinds = [("fail", {"kind": kind}) for kind in ("raise", "none", "large", "object", "half")]
    event = call(host, 0, ("add", {"a": "x"}), *kinds)
    texts = [each["text"] for each in event.answer["answers"]]
    assert [each["outcome"] for each in event.answer["answers"]] == ["error", "error", *["answered"] * 4]
    assert texts[1] == "Error: KeyError: 'no such row'"
    assert texts[2] == "null" and "<object object" in texts[4] and texts[5] == "a ?"
    assert "99999700 characters left out" in texts[3] and len(texts[3]) < 400


def test_numbers_of_numpy_and_data_classes_are_written_as_json_has_them(host: EnvironmentHost) -> None:
    """A model that reads "5" in quotes, or Found(count=1), reads a text."""
    begin(host, 0)
    (answer,) = call(host, 0, ("fail", {"kind": "numbers"})).answer["answers"]
    assert answer["text"] == '[5, 0.5, true, [0, 1, 2], {"count": 1, "where": [2]}, "left"]'


def test_an_async_tool_that_exits_breaks_its_own_episode_alone() -> None:
    with EnvironmentHost(make_config(workers=1, call_seconds=60.0)) as host:
        begin(host, 0, 1)
        begun = time.monotonic()
        assert "SystemExit: 3" in call(host, 0, ("leave", {})).answer["failure"]
        assert call(host, 1, ("sleep", {"seconds": 0.1})).answer["answers"][0]["text"] == "slept 0.1"
        assert time.monotonic() - begun < 30, "nothing has run out of time"


def test_a_set_of_texts_has_the_same_order_in_every_process(host: EnvironmentHost) -> None:
    begin(host, 0)
    begin(host, 1)
    assert len({process.process.pid for process in host._home.values()}) == 2
    first, second = (call(host, episode, ("fail", {"kind": "set"})).answer for episode in (0, 1))
    assert first == second


BREAKING = {"exit": "SystemExit", "die": "exit code 7", "crash": "exit code -11", "memory": "MemoryError",
            "leak": "MemoryError", "hang": "call_seconds = 8"}  # fmt: skip


@pytest.mark.parametrize(("kind", "reason"), BREAKING.items())
def test_what_breaks_an_episode(host: EnvironmentHost, kind: str, reason: str) -> None:
    """Episodes of other processes play on, and new ones begin."""
    begin(host, 0)
    begin(host, 1)
    if kind == "hang":
        assert reason in failure_after_its_time(host, 0, kind)
    else:
        assert reason in call(host, 0, ("fail", {"kind": kind})).answer["failure"]
    host.end(0)
    assert call(host, 1, ("move", {"by": 1})).answer["answers"][0]["text"] == "0 to 1"
    begin(host, 2)
    assert call(host, 2, ("add", {"a": 1})).answer["answers"][0]["text"] == "2"


def test_a_loop_that_never_ends_costs_its_process_and_no_more(host: EnvironmentHost) -> None:
    for episode in range(3):  # the third shares the process of the first
        begin(host, episode)
    process, _ = host._processes
    assert failure_after_its_time(host, 0, "loop") == "call took longer than environment.call_seconds = 8"
    host.end(0)
    assert call(host, 2, ("move", {"by": 1})).answer["answers"][0]["text"] == "0 to 1"
    begin(host, 3)
    assert 3 not in process.episodes
    host.end(2)
    assert process.process.poll() is not None, "it would take a core for the rest of the run"
    assert call(host, 1, ("move", {"by": 1})).answer["answers"][0]["text"] == "0 to 1"


def test_a_fork_bomb_ends_with_its_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with EnvironmentHost(make_config(workers=1, call_seconds=3.0)) as host:
        begin(host, 0)
        assert "call_seconds" in call(host, 0, ("fail", {"kind": "bomb"})).answer["failure"]
        numbers = [int(number) for number in (tmp_path / "bomb").read_text().split()]
        assert len(numbers) == 64
        host.end(0)
        until = time.monotonic() + 30
        while any(map(_runs, numbers)):
            assert time.monotonic() < until
            time.sleep(0.05)
        begin(host, 1)


def test_children_end_with_the_host() -> None:
    with EnvironmentHost(make_config(max_tool_characters=2000)) as host:
        begin(host, 0)
        children = call(host, 0, ("fail", {"kind": "fork"})).answer["answers"][0]["text"]
        numbers = [int(number) for number in children.strip("[]").split(", ")]
        assert len(numbers) == 50 and all(Path(f"/proc/{number}").exists() for number in numbers)
    _wait_for_the_end_of(numbers)


def test_children_of_a_process_that_ended_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with EnvironmentHost(make_config()) as host:
        begin(host, 0)
        assert "exit code 7" in call(host, 0, ("fail", {"kind": "orphan"})).answer["failure"]
        _wait_for_the_end_of([int((tmp_path / "orphan").read_text())])


PLAYING = """
import os, signal
from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost

with EnvironmentHost(EnvironmentConfig(tools=["playthings:fail"])) as host:
    host.reset(0, {})
    while not host.poll(1.0):
        pass
    host.call(0, [("fail", {"kind": "fork"})])
    while not (events := host.poll(1.0)):
        pass
    print(events[0].answer["answers"][0]["text"], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_end_with_a_trainer_that_is_killed(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}
    killed = subprocess.run([sys.executable, "-c", PLAYING], stdout=subprocess.PIPE, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL
    numbers = [int(number) for number in killed.stdout.strip().strip("[]").split(", ")]
    assert len(numbers) == 50
    _wait_for_the_end_of(numbers)


def _wait_for_the_end_of(numbers: list[int]) -> None:
    until = time.monotonic() + 30
    while any(map(_runs, numbers)):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_reset_that_fails(host: EnvironmentHost) -> None:
    host.reset(0, {"start": -1})
    assert "a start below 0" in events(host, 1)[0].answer["failure"]
    host.end(0)
    begin(host, 1)


def test_an_environment_is_used_again(host: EnvironmentHost) -> None:
    for episode in range(8):
        begin(host, episode, start=episode)
        event = call(host, episode, ("move", {"by": 1}))
        assert event.answer["answers"][0]["text"] == f"{episode} to {episode + 1}"
        host.end(episode)


def test_an_episode_that_was_ended_says_nothing_more(host: EnvironmentHost) -> None:
    begin(host, 0, 1)
    host.call(0, [("sleep", {"seconds": 0.3})])
    host.end(0)
    host.call(1, [("sleep", {"seconds": 0.6})])
    assert set(events(host, 1)) == {1}


def test_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "mine")
    monkeypatch.setenv("OTHER_TOKEN", "theirs")
    with EnvironmentHost(make_config(secrets=["MY_TOKEN"])) as host:
        begin(host, 0)
        text = call(host, 0, ("fail", {"kind": "secret"})).answer["answers"][0]["text"]
    assert text == '["mine", null]'


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": ["playthings:nothing"]}, "'playthings' has no 'nothing'"),
        ({"tools": ["nowhere:add"]}, "ModuleNotFoundError"),
        ({"tools": ["playthings:arrived"]}, "is a list, expected a function or a class"),
        ({"stop_tools": ["none"]}, "none is no tool"),
        ({"tools": ["playthings:add", "other:Tools.add"]}, "two are called 'add'"),
        ({"tools": ["other:unnamed"]}, r"takes a: int, \*more: int, and a model gives arguments by name"),
        ({"factory": "other:Broken"}, "'other:Broken' cannot be made: KeyError: 'no level'"),
        ({"factory": "other:BrokenMutely"}, "'other:BrokenMutely' cannot be made: Mute: <its text cannot be made"),
        ({"tools": ["os.path:basename"], "factory": None}, "type hints and a Google docstring"),
        ({"secrets": ["NOT_SET_TOKEN"]}, "environment.secrets names NOT_SET_TOKEN"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], reason: str) -> None:
    assert "NOT_SET_TOKEN" not in os.environ
    with pytest.raises(ValueError, match=reason):
        EnvironmentHost(make_config(**options))


def test_a_tool_has_the_name_that_it_is_given_by() -> None:
    """Whatever its decorator calls it."""
    config = make_config(tools=["other:Tools.add", "other:Tools.take"], factory="other:Level")
    with EnvironmentHost(config) as host:
        assert set(host.tools("")) == {"add", "take", "up"}
        begin(host, 0)
        made = call(host, 0, ("add", {"by": 2}), ("take", {"by": 2}), ("up", {"by": 7})).answer["answers"]
        assert [each["text"] for each in made] == ["3", "-1", "7"]


def test_the_middle_of_a_long_answer_is_left_out() -> None:
    assert shortened("a" * 100, 100) == "a" * 100
    assert shortened("a" * 60 + "b" * 50, 100) == "a" * 50 + "\n[10 characters left out]\n" + "b" * 50
