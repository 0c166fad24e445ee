"""Servers with vLLM's interface that fail, and what a run leaves on them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fake_vllm import FakeVllm
from served import PROMPTS, REQUESTS, Start, Training
from transformers import AutoModelForCausalLM

from grpo_dist.config.schema import ModelConfig
from grpo_dist.distributed.watch import Interrupted
from grpo_dist.rollout import Request, Sampling, awake
from grpo_dist.rollout.choose import UnfitEngine
from grpo_dist.rollout.vllm import keeper
from grpo_dist.rollout.vllm import server as own_server
from grpo_dist.rollout.vllm import start as starting


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "json", "empty", "hang"])
def test_a_failure_is_made_good(fault: str, start: Start, server: FakeVllm) -> None:
    training = start(server, timeout_seconds=2.0 if fault == "hang" else 60.0)
    training.engine.update_weights()
    expected = training.draw()
    server.faults = [fault]
    assert training.draw() == expected, "the same seeds give the same completions"
    assert training.engine.metrics()["rollout/retried"] >= 1


BENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a fragment": lambda choice: choice.update(finish_reason="abort", token_ids=choice["token_ids"][:1]),
    "a fragment that looks finished": lambda choice: choice.update(
        finish_reason="stop", token_ids=[5], logprobs={"token_logprobs": [-1.0]}
    ),
    "another prompt": lambda choice: choice.update(prompt_token_ids=choice["prompt_token_ids"][1:]),
    "too few log-probabilities": lambda choice: choice["logprobs"].update(token_logprobs=[]),
    "no tokens": lambda choice: choice.update(token_ids=None),
}


@pytest.mark.parametrize("name", BENT)
def test_nothing_but_a_complete_answer_is_taken(name: str, start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.bend = BENT[name]
    with pytest.raises(Interrupted, match="an answer that is none") as caught:
        training.draw()
    assert caught.value.failed


def test_log_probabilities_that_are_not_finite_are_the_models_fault(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.bend = lambda choice: choice["logprobs"].update(token_logprobs=[-9999.0] * len(choice["token_ids"]))
    with pytest.raises(FloatingPointError, match="overflowed"):
        training.draw()


def test_a_server_that_dies_is_replaced_by_another(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name) as first, FakeVllm(base.name) as second:
        training = start(first, second)
        training.engine.update_weights()
        expected = training.draw(MANY)
        asked = [sum("seed" in (given or {}) for given in each.requests) for each in (first, second)]
        assert min(asked) > 6, "both draw"
        first.__exit__()
        assert training.draw(MANY) == expected
        training.learn()
        training.engine.update_weights()
        assert training.draw(MANY) != expected and training.engine.metrics()["rollout/probe_gap"] <= 1e-4


MANY = [
    Request(group, number, PROMPTS[group % 3], key=100 * group + number) for group in range(12) for number in range(2)
]


@contextmanager
def in_a_process(model: str) -> Iterator[tuple[Any, int]]:
    """A server that may be killed: what a training asks of it, and its process."""
    forks = multiprocessing.get_context("fork")
    here, there = forks.Pipe()

    def serve() -> None:
        torch.set_num_threads(1)
        with FakeVllm(model) as server:
            there.send(server.url)
            signal.pause()

    process = forks.Process(target=serve, daemon=True)
    process.start()
    yield SimpleNamespace(url=here.recv()), process.pid or 0
    process.kill()
    process.join()


def test_servers_that_are_killed_in_a_rollout(start: Start, base: ModelConfig) -> None:
    some = MANY[:12]
    with ExitStack() as running:
        (first, killed), (second, last) = (running.enter_context(in_a_process(base.name)) for _ in range(2))
        training = start(first, second)
        training.engine.update_weights()
        expected = training.draw(some)
        os.kill(killed, signal.SIGSTOP)  # which answers nothing, so that requests are out
        training.engine.submit(some, Sampling())
        drawn = training.engine.poll()
        while len(drawn) < 3:
            drawn += training.engine.poll()
        os.kill(killed, signal.SIGKILL)
        while len(drawn) < len(some):
            drawn += training.engine.poll()
        assert [each.ids for each in sorted(drawn, key=lambda each: (each.group, each.sample))] == expected
        assert training.engine.metrics()["rollout/retried"] >= 1
        training.engine.sleep()
        os.kill(last, signal.SIGSTOP)
        training.engine.submit(some, Sampling())
        os.kill(last, signal.SIGKILL)
        with pytest.raises(Interrupted, match="ConnectError") as caught:
            while True:
                training.engine.poll()
        assert caught.value.failed


def test_a_group_stays_on_one_server(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name) as first, FakeVllm(base.name) as second:
        training = start(first, second)
        training.engine.update_weights()
        for each in (first, second):
            each.requests.clear()
        training.draw([Request(group, number, PROMPTS[group], key=number) for group in range(3) for number in range(4)])
        prompts = [{tuple(given["prompt"]) for given in each.requests if given} for each in (first, second)]
        assert not prompts[0] & prompts[1] and all(prompts), "its prompt is computed once"


def test_without_a_server_the_run_stops(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.__exit__()
    with pytest.raises(Interrupted, match=f"{server.url}: ConnectError") as caught:
        training.draw()
    assert caught.value.failed
    with pytest.raises(Interrupted, match=f"{server.url}.*ConnectError"):
        training.engine.update_weights()


def test_a_server_that_was_started_again_gets_the_policy(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    expected = training.draw()
    server.adapters.clear()
    assert training.draw() == expected
    assert len(server.adapters) == 1


def test_all_weights_are_not_sampled_from_a_server_that_lost_them(start: Start, server: FakeVllm) -> None:
    training = start(server, lora=None)
    training.engine.update_weights()
    server.base, server.faults = AutoModelForCausalLM.from_pretrained(server.path, dtype=torch.float32), ["cut"]
    with pytest.raises(Interrupted, match="does not sample from the policy"):
        training.draw()


def test_a_rank_that_is_too_large_is_refused_at_the_start(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name, max_rank=2) as server:
        training = start(server)
        with pytest.raises(Interrupted, match=r"LoRA rank 3 is greater than max_lora_rank 2.*--max-lora-rank 8"):
            training.engine.update_weights()


def test_a_server_with_short_sequences_is_refused_at_the_start(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name, longest=50) as server, pytest.raises(UnfitEngine, match="50 tokens, expected 70"):
        start(server)


def test_no_server_at_the_start(start: Start, server: FakeVllm) -> None:
    server.__exit__()
    with pytest.raises(UnfitEngine, match=f"{server.url}/v1/models.*This run needs servers"):
        start(server)


def test_a_full_disk(start: Start, server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(server)
    training.engine.update_weights()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_dist.rollout.vllm.policy.write_adapter", full)
    with pytest.raises(Interrupted, match=r"cannot be written.*No space left") as caught:
        training.engine.update_weights()
    assert caught.value.failed


def test_a_disk_that_is_really_full(start: Start, server: FakeVllm, tmp_path: Path) -> None:
    disk = tmp_path / "run0" / "rollout"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        training = start(server)
        training.engine.update_weights()
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(Interrupted, match=r"cannot be written to .*No space left on device"):
            training.engine.update_weights()
        (disk / "other").unlink()
        training.engine.update_weights()
        assert training.draw()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_runs_on_a_server(start: Start, server: FakeVllm) -> None:
    runs = [start(server), start(server)]
    runs[1].learn()
    for each in runs:
        each.engine.update_weights()
    drawn = [each.draw() for each in runs]
    assert drawn[0] != drawn[1] and [each.draw() for each in runs] == drawn
    runs[0].engine.close()
    assert runs[1].draw() == drawn[1]


def test_what_a_killed_run_has_left_is_removed(base: ModelConfig, server: FakeVllm, tmp_path: Path) -> None:
    killed = Training(base, tmp_path / "run", server)
    killed.engine.update_weights()
    other = Training(base, tmp_path / "other", server)
    other.engine.update_weights()
    assert len(server.adapters) == 2
    again = Training(base, tmp_path / "run", server)
    assert len(server.adapters) == 1, "the other run's stays"
    assert not list((tmp_path / "run" / "rollout").iterdir())
    for each in (again, other):
        each.engine.close()


def test_what_is_dropped_is_not_computed_on(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    training.engine.submit([replace(REQUESTS[0], group=group) for group in range(50)], Sampling())
    training.engine.sleep()
    assert training.engine.poll() == []
    assert training.draw() == training.draw(), "answers to what was dropped do not come later"


def test_a_server_that_shares_the_devices_sleeps_while_it_does_not_sample(
    base: ModelConfig, server: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SimpleNamespace(url=server.url, obituary=lambda: None, close=lambda: None)
    monkeypatch.setattr(starting, "_start", lambda *_: own)
    training = Training(base, tmp_path / "run", python="python", devices="shared")
    assert not training.engine.is_elsewhere, "a rollout and an update do not happen at once"
    server.calls.clear()
    training.engine.update_weights()
    assert server.sleeps and server.calls[0] == "/wake_up" and server.calls[-1] == "/sleep?level=1"
    with awake(training.engine):
        assert training.draw()
    assert server.sleeps
    training.engine.close()


def test_a_server_whose_keeper_was_killed_ends_at_the_next_start(tmp_path: Path) -> None:
    note = tmp_path / ".vllm.json"
    with subprocess.Popen([sys.executable, keeper.__file__, str(note), "sleep", "999"], stdin=subprocess.PIPE) as kept:
        while not (note.exists() and note.read_text()):
            assert kept.poll() is None
        kept.kill()
    left = psutil.Process(json.loads(note.read_text())["pid"])
    assert left.is_running()
    own_server.end_leftover(note)
    psutil.wait_procs([left], timeout=10)
    assert not note.exists() and not (left.is_running() and left.status() != psutil.STATUS_ZOMBIE)
    note.write_text(json.dumps({"pid": os.getpid(), "created": 0.0}))
    own_server.end_leftover(note)
    assert not note.exists(), "another process got its number, and is left alone"
