"""What calls cost the other episodes of their process, and the reasons that users read."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from modules_on_disk import importable
from playthings_on_disk import MODULE, OTHER, begin, call, events, make_config

from grpo_dist.environments.host import EnvironmentHost


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with importable(tmp_path_factory, "playthings", MODULE), importable(tmp_path_factory, "other", OTHER):
        yield


def test_an_episode_whose_process_has_ended_meanwhile_says_so_at_once() -> None:
    """It had no call under way when another's call ended the process: no answer comes, and no limit has to pass."""
    with EnvironmentHost(make_config(workers=1, call_seconds=60.0)) as host:
        begin(host, 0, 1, 2)
        assert "exit code 7" in call(host, 0, ("fail", {"kind": "die"})).answer["failure"]
        begun = time.monotonic()
        ended = "its process had ended before this call (exit code 7)"
        assert call(host, 1, ("move", {"by": 1})).answer["failure"] == ended
        host.reward(2)
        assert "before this reward (exit code 7)" in events(host, 1)[2].answer["failure"]
        assert time.monotonic() - begun < 30, "nothing has run out of time"
        for episode in range(3):
            host.end(episode)
        begin(host, 3)
        assert call(host, 3, ("move", {"by": 1})).answer["answers"][0]["text"] == "0 to 1"


def test_async_code_that_blocks_runs_out_of_time() -> None:
    """It holds up the async calls of its process, and no others."""
    with EnvironmentHost(make_config(workers=1, call_seconds=2.0)) as host:
        begin(host, 0, 1, 2)
        host.call(0, [("block", {"seconds": 1000.0})])
        host.call(1, [("sleep", {"seconds": 0.0})])
        assert call(host, 2, ("add", {"a": 1})).answer["answers"][0]["text"] == "2"
        for event in events(host, 2).values():
            assert event.answer["failure"] == "call took longer than environment.call_seconds = 2"
        for episode in range(3):
            host.end(episode)
        begin(host, 3)
        assert call(host, 3, ("sleep", {"seconds": 0.0})).answer["answers"][0]["text"] == "slept 0.0"


def test_an_async_done_is_waited_for() -> None:
    """A coroutine that nobody awaits is true: each episode would end after its first call."""
    with EnvironmentHost(make_config(factory="other:Later", tools=[])) as host:
        begin(host, 0)
        assert call(host, 0, ("up", {"by": 2})).answer == {
            "answers": [{"text": "2", "outcome": "answered"}], "done": False,
        }  # fmt: skip


def test_reasons_are_texts_of_some_length() -> None:
    """Whatever the text of an exception is, or if it has none."""
    with EnvironmentHost(make_config(workers=1)) as host:
        begin(host, 0)
        (answer,) = call(host, 0, ("fail", {"kind": "mute"})).answer["answers"]
        assert answer == {"text": "Error: Mute: <its text cannot be made: RuntimeError>", "outcome": "error"}
        host.reset(1, {"start": -1_000_000})
        failure = events(host, 1)[1].answer["failure"]
        assert failure.startswith("ValueError: a start below 0!") and len(failure) < 5000
