"""Trainings whose rollouts are drawn by servers with vLLM's interface, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from fake_vllm import FakeVllm
from launching import ROOT, TINY, begin, free_port, launch, metrics, python_of_fake_vllm, train
from packed_models import write_fp8
from small_experts import make_experts
from wide_heads import write_with_wide_heads

from grpo_dist.model.toy import toy_path

SMALL = ("--train.num_train_steps", "2", "--train.batch_size", "4", "--rollout.group_size", "4",
         "--optim.learning_rate", "1e-2", "--data.eval_file", "null", "--rollout.engine", "vllm",
         "--rollout.vllm.retries", "2")  # fmt: skip

ROUTED = ("--rollout.routing_replay", "true", "--data.max_prompt_length", "64", "--rollout.max_completion_length", "8",
          "--rewards", "[{name: 'tests.distributed.comparing:different_characters'}]")  # fmt: skip


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with FakeVllm(str(toy_path()), max_rank=32) as running:
        yield running


def urls(*servers: FakeVllm) -> tuple[str, str]:
    return "--rollout.vllm.urls", f"[{', '.join(server.url for server in servers)}]"


def test_adapters_are_served_and_proved(server: FakeVllm, tmp_path: Path) -> None:
    run = train("zero2", 2, tmp_path / "run", *SMALL, *urls(server))
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 for line in lines)
    assert all(line["rollout/logprob_gap_max"] <= 1e-4 for line in lines), "the trainer scores what the server drew"
    assert all(line["importance/mean"] == pytest.approx(1, abs=1e-4) for line in lines), "`truncate` is the default"
    assert server.calls.count("/v1/load_lora_adapter") == 3, "one a step, and one before the first"
    names = {given["model"] for given in server.requests if given and "prompt" in given}
    assert len(names) == 3, "each step asks for its own policy by name"
    assert not server.adapters and not list((run / "rollout").iterdir()), "nothing stays on servers and disk"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """The Python of an environment in which that server is vLLM."""
    return python_of_fake_vllm(tmp_path)


def begin_at(directory: Path, *words: str) -> Any:
    """Start a training in the background."""
    return begin(None, 1, *TINY, *SMALL, "--train.output_dir", str(directory), *words)


def wait_for(condition: Callable[[], object], run: Any) -> None:
    while not condition():
        assert run.poll() is None, run.communicate()[1][-4000:]
        time.sleep(0.05)


def note(directory: Path) -> int | None:
    """The process of the server that a run has started."""
    path = directory / ".vllm.json"
    return json.loads(path.read_text())["pid"] if path.exists() and path.read_text() else None


def steps(directory: Path) -> int:
    """Steps that are done."""
    return len(metrics(directory)) - 1 if (directory / "metrics.jsonl").exists() else 0


def test_a_server_lives_as_long_as_its_run(python: str, tmp_path: Path) -> None:
    directory, words = tmp_path / "run", ["--rollout.vllm.python", python, "--train.num_train_steps", "40"]
    run = begin_at(directory, *words, "--train.save_every", "1")
    wait_for(lambda: steps(directory) > 1, run)
    first = note(directory)
    run.kill()
    run.communicate()
    assert first is not None
    with suppress(psutil.NoSuchProcess):  # it may have ended already
        psutil.Process(first).wait(timeout=30)
    assert not psutil.pid_exists(first), "a killed run leaves no server"
    done = steps(directory)
    run = begin_at(directory, *words)
    wait_for(lambda: steps(directory) > done, run)
    os.kill(note(directory) or 0, signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 1 and "has ended with status" in stderr, stderr[-4000:]
    assert f"serving {toy_path()}" in stderr, "the last lines of its log"
    saved = steps(directory)
    assert f"goes on from step {saved}" in stderr, stderr[-1000:]
    again = launch(None, 1, *TINY, *SMALL, "--train.output_dir", str(directory), *words[:2],
                   "--train.num_train_steps", str(saved + 1), "--train.allow_changes", "true")  # fmt: skip
    assert again.returncode == 0, again.stderr[-4000:]
    assert [line["step"] for line in metrics(directory)] == list(range(saved + 2))
    assert note(directory) is None and not list((directory / "rollout").iterdir())


def test_a_server_that_does_not_start(python: str, tmp_path: Path) -> None:
    """The first rank says so, also where it is the last to end."""
    done = launch("ddp", 2, *TINY, *SMALL, "--train.output_dir", str(tmp_path / "run"), "--rollout.vllm.python", python,
                  "--rollout.vllm.args", "[--plant, ends]", program=["tests/fault/faulty.py"],
                  environment={"FAULT": "late@word:1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode != 0 and "fake_vllm: no device" in done.stderr, done.stderr[-4000:]
    assert "Traceback" not in done.stderr.partition("error: ")[0]


def test_a_signal_while_requests_are_out(server: FakeVllm, tmp_path: Path) -> None:
    run = begin_at(tmp_path / "run", *urls(server))
    wait_for(lambda: steps(tmp_path / "run") == 1, run)
    server.always = "hang"
    wait_for(lambda: server.most_at_once > 2, run)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped: rank 0 received SIGTERM" in stdout, stderr[-4000:]
    server.always = "ok"
    again = train(None, 1, tmp_path / "run", *SMALL, *urls(server))
    assert [line["step"] for line in metrics(again)] == [0, 1, 2]


def test_a_step_ahead(server: FakeVllm, tmp_path: Path) -> None:
    run = train(None, 1, tmp_path / "run", *SMALL, *urls(server), "--rollout.lag", "1")
    _, first, second = metrics(run)
    assert first["time/overlapped"] > 0, "the next rollout runs while the update does"
    assert second["rollout/logprob_gap_max"] > 1e-4, "an older policy drew"
    assert first["rollout/probe_gap"] <= 1e-4 and second["rollout/probe_gap"] <= 1e-4


NF4 = ("--model.quantization", "nf4")


def test_servers_have_the_quantised_base(python: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = [*NF4, "--rollout.vllm.python", python]
    run = train(None, 1, tmp_path / "run", *SMALL, *words, "--optim.scheduler", "constant")
    note = run / "served_base" / "written_from.json"
    assert f"serving {note.parent}" in (run / "vllm.log").read_text()
    written = note.stat().st_mtime_ns
    train(None, 1, run, *SMALL, *words, "--optim.scheduler", "constant", "--train.num_train_steps", "3")
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)
    assert note.stat().st_mtime_ns == written, "a run that goes on takes the same files"
    assert [each.name for each in run.glob("served_base*")] == ["served_base"]


def test_a_server_with_the_base_that_is_not_quantised(server: FakeVllm, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = launch(None, 1, *TINY, *SMALL, *NF4, *urls(server), "--train.output_dir", str(tmp_path / "run"))
    assert done.returncode == 2 and "does not sample from the policy" in done.stderr, done.stderr[-4000:]
    assert f"--model {tmp_path / 'run' / 'served_base'}" in done.stderr


@pytest.mark.slow
def test_all_weights_of_a_base_in_fp8(python: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.finegrained_fp8")
    write_fp8(tmp_path / "model")
    run = train(None, 1, tmp_path / "run", *SMALL, *ROUTED, "--rollout.routing_replay", "auto", "--model.name",
                str(tmp_path / "model"), "--lora", "null", "--rollout.vllm.python", python)  # fmt: skip
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)


vllm_itself = pytest.mark.skipif(
    "GRPO_DIST_VLLM" not in os.environ, reason="GRPO_DIST_VLLM does not name the Python of vLLM"
)


@pytest.mark.slow
@vllm_itself
def test_vllm_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    python = os.environ["GRPO_DIST_VLLM"]
    run = train(None, 1, tmp_path / "run", *SMALL, "--rollout.vllm.python", python, timeout_seconds=900)
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)
    assert note(run) is None, "it ends with the run"


@pytest.mark.slow
@vllm_itself
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_in_vllm_itself(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    run = train(None, 1, tmp_path / "run", *SMALL, "--model.quantization", quantization,
                "--rollout.vllm.python", os.environ["GRPO_DIST_VLLM"], timeout_seconds=900)  # fmt: skip
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)


def require_the_same_experts(run: Path) -> None:
    """The policy scores what the server drew, with the server's experts, and would have chosen nearly all of them."""
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/router_agreement"] > 0.99 for line in lines)
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)
    assert lines[0]["ratio/mean"] == pytest.approx(1, abs=1e-5)


def test_experts_of_a_server(python: str, tmp_path: Path) -> None:
    """The run starts a server that reports them."""
    model = make_experts(tmp_path / "model", "qwen3_moe")
    run = train("zero2", 2, tmp_path / "run", *SMALL, *ROUTED, "--model.name", model, "--rollout.vllm.python", python)
    require_the_same_experts(run)


@pytest.mark.slow
@vllm_itself
def test_games_by_vllm_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    write_with_wide_heads(tmp_path / "model")
    run = tmp_path / "run"
    done = launch(None, 1, "--config", "configs/guess_number.yaml", "--model.name", str(tmp_path / "model"),
                  "--model.dtype", "float32", "--train.num_minibatches", "1", *SMALL, "--train.output_dir", str(run),
                  "--rollout.vllm.python", os.environ["GRPO_DIST_VLLM"], "--rollout.vllm.devices", "shared",
                  timeout_seconds=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)
    log = (run / "vllm.log").read_text()
    assert "POST /wake_up" in log and "POST /sleep?level=1" in log, "on a CPU it does nothing"
    assert all(line["environment/turns"] > 1 for line in lines), "a turn goes on from the results of the one before"


@pytest.fixture
def vllm_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two vLLM servers, started as launch/slurm_vllm.sbatch starts them."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with ExitStack() as running:
        urls = []
        for number in range(2):
            port = free_port()
            log = running.enter_context((tmp_path / f"server{number}.log").open("w"))
            words = [*TINY, *SMALL, "--rollout.vllm.urls", f"[http://127.0.0.1:{port}]"]
            server = subprocess.Popen(
                [sys.executable, "-m", "grpo_dist.rollout.vllm.serve", os.environ["GRPO_DIST_VLLM"], str(port), *words],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            running.callback(server.wait)
            running.callback(os.killpg, server.pid, signal.SIGTERM)
            urls.append(f"http://127.0.0.1:{port}")
        for number, url in enumerate(urls):
            wait_until_it_serves(url, tmp_path / f"server{number}.log")
        yield urls


def wait_until_it_serves(url: str, log: Path) -> None:
    for _ in range(600):
        with suppress(OSError), urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def finished_requests(url: str) -> float:
    with urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))


@pytest.mark.slow
@vllm_itself
def test_two_servers_of_vllm(vllm_urls: list[str], tmp_path: Path) -> None:
    where = ["--rollout.vllm.urls", f"[{', '.join(vllm_urls)}]"]
    run = train("ddp", 2, tmp_path / "run", *SMALL, *where)
    _, *lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 and line["rollout/logprob_gap_max"] <= 1e-4 for line in lines)
    shares = [finished_requests(url) for url in vllm_urls]
    assert min(shares) >= 0.25 * sum(shares), f"each draws its part: {shares}"
    done = launch(None, 1, "--config", "configs/quickstart.yaml", "--model", "toy", "--n", "2",
                  "--model.dtype", "float32", "--output", str(tmp_path / "out"), "--rollout.engine", "vllm", *where,
                  program=["-m", "grpo_dist.evaluate"])  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "pass@2" in done.stdout
    assert all(finished_requests(url) > share for url, share in zip(vllm_urls, shares, strict=True))
