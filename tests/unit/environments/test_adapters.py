"""The shipped adapters with the packages that they adapt, where these are installed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost

SERVER = """
import sys
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Step(Action):
    by: int


class Seen(Observation):
    total: int


class Counter(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **given):
        self.total = seed % 3
        return Seen(total=self.total, done=False, reward=None)

    def step(self, action, timeout_s=None, **given):
        self.total += action.by
        return Seen(total=self.total, done=self.total >= 5, reward=float(action.by))

    @property
    def state(self):
        return State()


uvicorn.run(create_fastapi_app(Counter, Step, Seen, max_concurrent_envs=4), port=int(sys.argv[1]), log_level="warning")
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


def test_open_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openenv.core")
    pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setenv("OPENENV_URL", f"http://127.0.0.1:{port}")
    server = subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)])
    try:
        config = EnvironmentConfig(factory="configs.environments.open_env:OpenEnv", workers=1)
        with EnvironmentHost(config) as host:
            assert host.tools("") == {"act"}
            for episode in range(2):
                until = time.monotonic() + 60
                while True:
                    host.reset(episode, {}, seed=4)
                    (event,) = host.poll(60.0)
                    if "failure" not in event.answer:
                        break
                    assert time.monotonic() < until, event.answer
                    host.end(episode)
                    time.sleep(0.2)
                assert json.loads(event.answer["observation"])["total"] == 1
                for by, total in ((1, 2), (3, 5)):
                    host.call(episode, [("act", {"action": {"by": by}})])
                    answer = ask(host)
                    assert json.loads(answer["answers"][0]["text"])["total"] == total
                    assert answer["done"] == (total == 5)
                host.reward(episode)
                assert ask(host)["reward"] == 4.0
                host.end(episode)
    finally:
        server.kill()
        server.wait()
