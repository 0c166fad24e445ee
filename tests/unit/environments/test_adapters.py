"""The shipped adapters with the packages that they adapt, where these are installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost

COUNTER = """
import random, sys

from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Count(Action):
    by: int


class Counted(Observation):
    total: int


class Counter(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.total = random.Random(seed).randrange(1000)
        return Counted(total=self.total)

    def step(self, action, timeout_s=None, **kwargs):
        self.total += action.by
        return Counted(total=self.total, reward=0.5, done=action.by == 9)

    @property
    def state(self):
        return State()


if __name__ == "__main__":
    import uvicorn

    app = create_fastapi_app(Counter, Count, Counted, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""
COUNTING = """
import os

from configs.environments.openenv_client import OpenEnvClient


class Counting(OpenEnvClient):
    url = os.environ["COUNTER_URL"]

    def count(self, by: int) -> str:
        '''
        Count.

        Args:
            by: How much is added.
        '''
        return self._step(by=by)
"""


def ask(host: EnvironmentHost) -> dict[str, Any]:
    """The next answer, of an environment that is not broken."""
    (event,) = host.poll(60.0)
    assert "failure" not in event.answer, event.answer
    return event.answer


def test_skyrl_gym() -> None:
    pytest.importorskip("skyrl_gym")
    prompt = [{"role": "user", "content": "What is 2 + 2?"}]
    row = {"prompt": prompt, "env_class": "gsm8k_multi_turn", "reward_spec": {"ground_truth": "4"}, "max_turns": 3}
    config = EnvironmentConfig(factory="configs.environments.skyrl:SkyRLGym", workers=1)
    with EnvironmentHost(config) as host:
        assert host.schemas == {"": []} and host.with_users == [""] and host.has_reward
        for answers, asked, reward in (
            (["Hm.", "#### 4"], [True, False], 1.0),
            (["a", "b", "c"], [True, True, False], 0),
        ):
            host.reset(0, row)
            assert ask(host) == {"observation": None}
            for text, goes_on in zip(answers, asked, strict=True):
                host.after_turn(0, text)
                answer = ask(host)
                assert answer["done"] == (not goes_on)
                assert not goes_on or (
                    answer["messages"][0]["role"] == "user" and "####" in answer["messages"][0]["content"]
                )
            host.reward(0)
            assert ask(host)["reward"] == reward
            host.end(0)


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of OpenEnv on this machine, and a module with its client."""
    pytest.importorskip("openenv.core")
    (tmp_path / "counter.py").write_text(COUNTER)
    (tmp_path / "counting.py").write_text(COUNTING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("COUNTER_URL", f"http://127.0.0.1:{port}")
    monkeypatch.syspath_prepend(tmp_path)
    with subprocess.Popen([sys.executable, str(tmp_path / "counter.py"), str(port)], env=os.environ) as server:
        try:
            until = time.monotonic() + 300
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < until and server.poll() is None
                time.sleep(0.1)
            yield
        finally:
            server.kill()


@pytest.mark.usefixtures("counter")
def test_openenv() -> None:
    with EnvironmentHost(EnvironmentConfig(factory="counting:Counting", workers=1)) as host:
        assert set(host.tools("")) == {"count"} and host.has_reward
        starts = []
        for episode, seed in enumerate((5, 5, 6)):
            host.reset(episode, {}, seed)
            starts.append(json.loads(ask(host)["observation"])["total"])
        assert starts[0] == starts[1] != starts[2], "what an environment draws follows from the seed"
        for by, total, done in ((2, 2, False), (9, 11, True)):
            host.call(1, [("count", {"by": by})])
            answer = ask(host)
            assert json.loads(answer["answers"][0]["text"])["total"] == starts[1] + total
            assert answer["done"] == done
        for episode, reward in ((0, 0), (1, 1.0)):
            host.reward(episode)
            assert ask(host)["reward"] == reward
        host.call(0, [("count", {"by": "many"})])
        assert ask(host)["answers"][0]["outcome"] == "error", "the server refuses it, and the model reads why"
        host.end(1)
        host.reset(3, {}, 6)
        assert json.loads(ask(host)["observation"])["total"] == starts[2], "an instance is used again"
