"""The benchmark's arithmetic, its models and prompts, and a real run of it with the toy model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_dist.cli.bench.bench import ours_in_turn, peer_micro_batch
from grpo_dist.cli.bench.ours import peak_gib
from grpo_dist.cli.bench.tables import Pair, pairs_table, summary_row, table
from grpo_dist.cli.bench.workloads import WORKLOADS, Shape, Workload, make_model, write_prompts

SMALL = Workload("small", Shape(64, 2, 4, 2, 128, 400), 3, 4, 40, 64, 8)


def step(seconds: float, tokens: int) -> dict[str, object]:
    """What our worker says of a step."""
    metrics = {"tokens/completion": tokens, "tokens/useful_share": 1.0, "time/rollout": seconds / 2, "time/update": 0.1}
    return {"seconds": seconds, "peak_gib": 1.0, "metrics": metrics}


def test_a_ratio_is_per_completion_token() -> None:
    pair = Pair(step(2.0, 100), {"seconds": 12.0, "lengths": [30, 20, 50], "peak_gib": 2.0})
    assert pair.their_tokens == 100 and pair.ratio == pytest.approx(6)
    assert Pair(step(2.0, 200), {"seconds": 12.0, "lengths": [100], "peak_gib": 2.0}).ratio == pytest.approx(12)
    assert pair.rollout_ratio is None, "the peer did not say how long its rollout took"
    told = Pair(step(2.0, 200), {"seconds": 12.0, "rollout_seconds": 9.0, "lengths": [100], "peak_gib": 2.0})
    assert told.rollout_ratio == pytest.approx(18)
    assert summary_row("w", [told, told, told], "TRL")["of the rollout alone"] == "18.0 (18.0 to 18.0)"


def test_the_summary_has_medians_and_spread() -> None:
    pairs = [Pair(step(seconds, 100), {"seconds": 12.0, "lengths": [100], "peak_gib": 2.0}) for seconds in (1, 2, 6)]
    row = summary_row("w", pairs, "TRL")
    assert row["TRL ÷ ours, per token"] == "6.0 (2.0 to 12.0)"
    assert (row["s a step"], row["tokens/s"], row["rollout"], row["peak GiB"]) == ("2.00", "50", "1.00", "1.00")
    assert "TRL: s a step" not in summary_row("w", [Pair(step(1, 1))], None)
    assert pairs_table("w", pairs, "TRL").count("\n") == 4


@pytest.mark.parametrize(
    ("noted", "peak"), [({"memory/peak_gib": 5.0}, 5.0), ({"memory/peak_gib": 0.5}, 2.0), ({}, 2.0)]
)
def test_a_peak_is_that_of_all_phases(noted: dict[str, float], peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases reset torch's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * 2**30)
    assert peak_gib(noted) == peak


def test_a_table_is_markdown() -> None:
    assert table([["a", "bb"], ["ccc", "d"]]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"


def test_a_made_model_ends_its_completions_by_itself(tmp_path: Path) -> None:
    assert isinstance(SMALL.model, Shape)
    make_model(SMALL.model, SMALL.mean_new_tokens, "float32", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(tokenizer) <= model.config.vocab_size
    hello = tokenizer("hello").input_ids
    assert len(hello) == 5 and tokenizer.decode(hello) == "hello", "one token a character"
    with torch.no_grad():
        probs = torch.softmax(model(torch.randint(2, 400, (4, 30))).logits, -1)
    ends, pads = probs[..., tokenizer.eos_token_id], probs[..., tokenizer.pad_token_id]
    assert float(ends.mean()) == pytest.approx(1 / SMALL.mean_new_tokens, rel=0.2)
    assert float(ends.std()) < 0.2 * float(ends.mean()), "the end does not depend on what was written"
    assert float(pads.max()) < 1e-3


def test_prompts_have_the_lengths_they_should(tmp_path: Path) -> None:
    write_prompts(SMALL, 5, tmp_path / "prompts.jsonl")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 15 and len(set(prompts)) == 15
    assert all(20 <= len(prompt) <= 40 for prompt in prompts)
    write_prompts(WORKLOADS["quickstart"], 1, tmp_path / "sums.jsonl")
    assert "What is" in (tmp_path / "sums.jsonl").read_text()


def test_our_step_repeats_given_lengths(tmp_path: Path) -> None:
    """The worker is the trainer: it takes a step for each request, with completions of the given lengths."""
    lengths = [1 + n % 16 for n in range(16 * 8)]
    with ours_in_turn(WORKLOADS["quickstart"], "toy", tmp_path, num_steps=2, kl_coeff=0.04, lora_r=4,
                      rest=["--logging.profile_step", "2"]) as ours:  # fmt: skip
        first, second = ours.step(lengths), ours.step(None)
        deadline = time.monotonic() + 60  # a signal arrives when the system delivers it
        while psutil.Process(ours.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, "it leaves the processor to the peer"
            time.sleep(0.05)
    assert first["metrics"]["tokens/completion"] == sum(lengths)
    assert first["metrics"]["completion/length_max"] == 16
    assert second["metrics"]["step"] == 2 and second["metrics"]["tokens/completion"] != sum(lengths)
    assert first["seconds"] > 0 and first["peak_gib"] > 0.1
    assert Path(second["profile"]).is_file() and not Path(first["profile"]).is_file()
    assert {"time/rollout", "time/reference", "time/update", "time/sync"} <= first["metrics"].keys()


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    arguments = ["--lora.r", "-3"]
    with (
        pytest.raises(ValueError, match=r"(?s)status.*lora\.r"),
        ours_in_turn(WORKLOADS["quickstart"], "toy", tmp_path, num_steps=1, kl_coeff=0.0, lora_r=4, rest=arguments),
    ):
        pass


STOPPED = """
import sys, tempfile
from pathlib import Path
from grpo_dist.cli.bench.turns import Worker, signals_unwind

busy = "import os, subprocess; print(os.getpid(), subprocess.Popen(['sleep', '60']).pid, flush=True); os.wait()"
with signals_unwind(), tempfile.TemporaryDirectory(dir=sys.argv[1]) as scratch:
    with Worker([sys.executable, "-c", busy], Path(scratch) / "worker"):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_a_benchmark_that_is_stopped(number: int, tmp_path: Path) -> None:
    """Also what they have started, and nothing is left on the disk unless it was killed."""
    stopped = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)])
    busy: list[int] = []
    deadline = time.monotonic() + 60
    while len(busy) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        busy = [int(pid) for log in tmp_path.glob("*/worker/log") for pid in log.read_text().split()]
    stopped.send_signal(number)
    is_killed = number == signal.SIGKILL
    assert stopped.wait(30) == (-number if is_killed else 128 + number)
    while left := [pid for pid in busy if _is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert len(busy) == 2 and (is_killed or not list(tmp_path.iterdir()))


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--workload", "nothing"]])
def test_mistakes_are_answered(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "grpo_dist", "bench", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and arguments[0] in done.stderr


@pytest.mark.parametrize(
    ("on_gpu", "given", "expected"), [(False, None, 512), (True, None, 8), (True, 16, 16), (False, 4, 4)]
)
def test_the_peers_micro_batch_has_room_on_a_gpu(
    on_gpu: bool, given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    assert peer_micro_batch(given, WORKLOADS["qwen-0.5b"]) == expected
    assert not on_gpu or peer_micro_batch(None, replace(WORKLOADS["medium"], num_prompts=3, group_size=5)) == 5


@pytest.mark.parametrize("given", [0, -8, 7, 1024])
def test_a_micro_batch_that_divides_no_step_is_refused(given: int) -> None:
    with pytest.raises(ValueError, match=f"--peer_micro_batch: {given} given, expected a divisor of the 512 sequences"):
        peer_micro_batch(given, WORKLOADS["qwen-0.5b"])
