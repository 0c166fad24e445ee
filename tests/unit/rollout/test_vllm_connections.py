"""How servers with vLLM's interface are reached: addresses, proxies, keys, and what is none of them."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import FakeVllm
from served import Start, Training
from serving import Server

from grpo_dist.config.schema import Config, ModelConfig, RolloutConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.distributed.watch import Interrupted
from grpo_dist.preflight.findings import Findings
from grpo_dist.preflight.servers import check_servers
from grpo_dist.rollout.choose import UnfitEngine
from grpo_dist.rollout.vllm import server as own_server
from grpo_dist.rollout.vllm.server import OwnServer


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy for everything, which does not answer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def checked(url: str) -> Findings:
    """What `check` says about a server."""
    findings = Findings()
    config = Config(rollout=RolloutConfig(engine="vllm", vllm=VllmConfig(urls=[url])))
    check_servers(config, None, findings)
    return findings


@pytest.mark.usefixtures("nowhere")
def test_proxies_are_for_others(
    start: Start, server: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(server)
    training.engine.update_weights()
    assert training.draw()
    assert not checked(server.url).problems
    own = OwnServer.__new__(OwnServer)
    own.url = server.url
    monkeypatch.setattr(own, "obituary", lambda: None)
    monkeypatch.setattr(own_server, "START_SECONDS", 30.0)
    own.wait_until_ready()


@pytest.mark.usefixtures("nowhere")
def test_a_job_waits_for_its_own_servers(server: FakeVllm) -> None:
    script = Path("launch/slurm_vllm.sbatch").read_text(encoding="utf-8")
    (waiting,) = [line for line in script.splitlines() if "/health" in line]
    command = waiting.strip().removeprefix("until ").removesuffix("; do")
    variables = {**os.environ, "venv": sys.prefix, "url": server.url}
    assert subprocess.run(["bash", "-c", command], env=variables).returncode == 0


def test_an_address_of_ipv6(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name, host="::1") as server:
        training = start(server)
        training.engine.update_weights()
        assert training.draw() and server.url.startswith("http://[::1]:")
        assert not checked(server.url).problems


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://node7:80000", "'http://node7:80000' given, expected an address"),
        ("http://node7:port", "expected an address"),
        ("http://[::1:8000", "expected an address"),
        ("http://me:secret@node7:8000", "…@node7:8000' given, expected an address without a user and a password"),
    ],
)
def test_addresses_that_are_none(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"rollout\.vllm\.urls") as caught:
        VllmConfig(urls=[url])
    assert reason in str(caught.value) and "secret" not in str(caught.value)


def test_a_key_is_no_argument() -> None:
    with pytest.raises(ValueError, match="export the key as VLLM_API_KEY") as caught:
        VllmConfig(python="python", args=["--api-key=secret"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["secret\n", "secret\r", "sécret"])
def test_a_key_that_is_none(key: str, start: Start, server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UnfitEngine, match="VLLM_API_KEY has a line break or another character") as caught:
        start(server)
    (problem,) = checked(server.url).problems
    assert "VLLM_API_KEY has a line break" in problem and "cret" not in str(caught.value) + problem


class Locked(FakeVllm):
    """Wants a key."""

    def reply(self, path: str, given: Any) -> tuple[int, Any]:
        if self.headers[-1].get("Authorization") != "Bearer right":
            return 401, {"error": "Unauthorized"}
        return super().reply(path, given)


def test_a_server_that_wants_a_key(
    start: Start, base: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Locked(base.name) as server:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(UnfitEngine, match=r"asks for a key \(status 401\): export it as VLLM_API_KEY"):
            start(server)
        monkeypatch.setenv("VLLM_API_KEY", "wrong")
        with pytest.raises(UnfitEngine, match="asks for another key"):
            start(server)
        monkeypatch.setenv("VLLM_API_KEY", "right")
        training = start(server)
        training.engine.update_weights()
        assert training.draw() and not checked(server.url).problems
    assert "wrong" not in caplog.text and "right" not in caplog.text


NO_MODELS: list[Any] = [{"data": None}, {"data": []}, {"data": ["model"]}, {"data": [{"root": "x"}]}, [], "busy", None,
                        {"object": "list"}]  # fmt: skip


@pytest.mark.parametrize("answer", NO_MODELS, ids=str)
def test_another_kind_of_server(answer: Any, start: Start) -> None:
    with Server(lambda _: answer) as server:
        with pytest.raises(UnfitEngine, match="an answer that is none"):
            start(server)
        (problem,) = checked(server.url).problems
        assert "does not answer" in problem


@pytest.fixture
def chatterbox() -> Iterator[SimpleNamespace]:
    """Something that speaks no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(4096)
                    peer.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=speak, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_something_that_is_no_server(start: Start, chatterbox: Any) -> None:
    with pytest.raises(UnfitEngine, match="RemoteProtocolError"):
        start(chatterbox)
    (problem,) = checked(chatterbox.url).problems
    assert "does not answer (BadStatusLine" in problem


def test_many_stop_texts(start: Start, server: FakeVllm) -> None:
    """vLLM takes four, unless a variable of the server says otherwise."""
    start(server, stop=["a", "b", "c", "d"])
    with pytest.raises(UnfitEngine, match=r"at most 4 items.* VLLM_MAX_STOP_STRINGS=5 python"):
        start(server, stop=["a", "b", "c", "d", "e"])
    server.most_stops = 5
    start(server, stop=["a", "b", "c", "d", "e"])


class Stuck(FakeVllm):
    """Hangs in a message to `path`, as long as it is to."""

    path_of_hang = ""
    released = threading.Event()

    def reply(self, path: str, given: Any) -> tuple[int, Any]:
        if self.path_of_hang and path.startswith(self.path_of_hang):
            self.released.wait()
        return super().reply(path, given)


@pytest.fixture
def stuck(base: ModelConfig) -> Iterator[Stuck]:
    Stuck.released.clear()
    with Stuck(base.name) as server:
        yield server
        Stuck.released.set()


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/completions"])
def test_a_stop_while_a_server_hangs(path: str, stuck: Stuck, start: Start) -> None:
    training = start(stuck, timeout_seconds=3600.0)
    training.engine.update_weights()
    stuck.path_of_hang = path
    looks = iter([None, None, Interrupted("rank 0 received SIGTERM")])

    def check() -> None:
        if stop := next(looks):
            raise stop

    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        training.engine.update_weights(check)
    assert not caught.value.failed, "it was asked to stop"


def test_the_end_of_a_run_does_not_wait_for_a_server_that_hangs(
    stuck: Stuck, base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_dist.rollout.vllm.policy.UNLOAD_SECONDS", 0.2)
    training = Training(base, tmp_path / "run", stuck, timeout_seconds=3600.0)
    training.engine.update_weights()
    stuck.path_of_hang = "/v1/unload"
    training.engine.close()
    assert not list((tmp_path / "run" / "rollout").iterdir())


def test_an_adapter_that_cannot_be_removed_at_the_start(base: ModelConfig, server: FakeVllm, tmp_path: Path) -> None:
    killed = Training(base, tmp_path / "run", server)
    killed.engine.update_weights()
    server.refuses_removal = True
    again = Training(base, tmp_path / "run", server)
    again.engine.update_weights()
    assert again.draw()
    for each in (again, killed):
        each.engine.close()


def test_a_prefix_cache_that_keeps_old_weights(start: Start, server: FakeVllm) -> None:
    training = start(server, lora=None)
    server.keeps_its_cache = True
    with pytest.raises(Interrupted, match="keeps what its prefix cache has of the policy before"):
        training.engine.update_weights()
