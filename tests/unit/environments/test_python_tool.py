"""The shipped Python tool in a host of environments: output, errors, and the limits of its sandbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost
from grpo_dist.rewards.sandbox import Sandbox, SandboxError


@pytest.fixture(scope="module")
def host() -> Iterator[EnvironmentHost]:
    try:
        Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    with EnvironmentHost(EnvironmentConfig(tools=["configs.environments.python_tool:python"], workers=1)) as host:
        host.reset(0, {})
        host.poll(20.0)
        yield host


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(sum(range(101)))", "5050\n"),
        ("print(1)\nprint(x)", "1\nError: NameError: name 'x' is not defined"),
        ("import sys; sys.exit(3)", "Error: exit code 3"),
        ("x = 4", "The program printed nothing. Use print()."),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 1)",
         "Error: OSError: [Errno 101] Network is unreachable"),
        ("while True: print('x' * 100)", "too much"),
        ("print(1, flush=True)\nwhile True: pass", "1\nError: the program took longer than 5 seconds"),
    ],
)  # fmt: skip
def test_a_program_answers(host: EnvironmentHost, code: str, answer: str) -> None:
    host.call(0, [("python", {"code": code})])
    (event,) = host.poll(60.0)
    assert event.answer["answers"][0]["outcome"] == "answered"
    text = event.answer["answers"][0]["text"]
    assert text.endswith(answer) and (answer == "too much" or text == answer)
