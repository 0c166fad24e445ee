"""The evaluation as a program: the same numbers on one rank and on two, resumed, compared, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm
from launching import ROOT, launch, python_of_fake_vllm
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from grpo_dist.model.toy import toy_path
from grpo_dist.rewards.math import last_integer


def evaluate(
    strategy: str | None, num_processes: int, *arguments: str, model: str = "toy"
) -> subprocess.CompletedProcess[str]:
    options = ["--config", "configs/quickstart.yaml", "--model", model, "--n", "2", "--model.dtype", "float32"]
    program = ["-m", "grpo_dist.evaluate"] if strategy else ["-m", "grpo_dist", "evaluate"]
    return launch(strategy, num_processes, *options, *arguments, program=program)


def samples(directory: Path) -> list[str]:
    return [path.read_text() for path in sorted(directory.glob("samples_*.jsonl"))]


def test_ranks_resuming_and_comparing(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = (ROOT / "configs/data/math_tasks_eval.jsonl").read_text().splitlines()[:80]
    data.write_text("".join(json.dumps(json.loads(row) | {"sign": "+-"["-" in row]}) + "\n" for row in rows))
    common = ("--data", str(data), "--category", "sign")
    one = evaluate(None, 1, *common, "--output", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-4000:]
    assert "pass@2" in one.stdout and "all right" in one.stdout
    assert "count a sample as right if its reward is above half of the sum of positive weights" in one.stdout
    two = evaluate("zero3", 2, *common, "--output", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr[-4000:]
    assert samples(tmp_path / "one") == samples(tmp_path / "two") and len(samples(tmp_path / "one")) == 2

    (tmp_path / "one" / "samples_0000064.jsonl").unlink()
    stamp = (tmp_path / "one" / "samples_0000000.jsonl").stat().st_mtime_ns
    again = evaluate(None, 1, *common, "--output", str(tmp_path / "one"), "--compare", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr[-4000:]
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    assert (tmp_path / "one" / "samples_0000000.jsonl").stat().st_mtime_ns == stamp, "what is there is not done again"
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["comparison"]["p_value"] == 1 and set(summary) == {"all", "+", "-", "comparison"}

    by_answer = evaluate(None, 1, *common, "--output", str(tmp_path / "one"), "--category", "answer")
    assert by_answer.returncode == 0, by_answer.stderr[-4000:]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert "+" not in summary and any(" to " in name for name in summary), "another column, without new samples"

    other = evaluate(None, 1, *common, "--output", str(tmp_path / "one"), "--rollout.temperature", "0.5")
    assert other.returncode == 2 and "holds another evaluation (rollout differ)" in other.stderr
    missing = evaluate(None, 1, *common, "--output", str(tmp_path / "x"), "--category", "colour")
    assert missing.returncode == 2 and "--category: 'colour' given" in missing.stderr
    (tmp_path / "one" / "summary.json").unlink()
    (tmp_path / "one" / "summary.json").mkdir()
    done = evaluate(None, 1, *common, "--output", str(tmp_path / "one"))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_a_directory_that_vanishes_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "vanishing.py").write_text(
        f"import shutil\n\ndef reward(completions, **_):\n    shutil.rmtree({str(out)!r}, ignore_errors=True)\n"
        "    return [1.0] * len(completions)\n"
    )
    done = launch("ddp", 2, "--config", "configs/quickstart.yaml", "--model", "toy", "--n", "1", "--output", str(out),
                  "--data", "configs/data/math_tasks_eval.jsonl", "--rewards", "[{name: vanishing:reward}]",
                  program=["-m", "grpo_dist.evaluate"], environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr[-4000:]
    assert f"writing samples failed on 1 of 2 ranks. rank 0: --output: a file in {out} cannot be written" in done.stderr


def test_a_quantised_base(tmp_path: Path) -> None:
    """A server gets the values that the process computes with."""
    pytest.importorskip("bitsandbytes")
    rows = (ROOT / "configs/data/math_tasks_eval.jsonl").read_text().splitlines()[:4]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    common = ("--data", str(tmp_path / "data.jsonl"), "--model.quantization", "nf4", "--output")
    own = evaluate(None, 1, *common, str(tmp_path / "own"))
    assert own.returncode == 0 and "pass@2" in own.stdout, own.stderr[-4000:]
    served = evaluate(None, 1, *common, str(tmp_path / "served"), "--rollout.engine", "vllm", "--rollout.vllm.python",
                      python_of_fake_vllm(tmp_path))  # fmt: skip
    assert served.returncode == 0 and "pass@2" in served.stdout, served.stderr[-4000:]
    assert (tmp_path / "served" / "served_base" / "model.safetensors").is_file()


def test_a_server_samples(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join((ROOT / "configs/data/math_tasks_eval.jsonl").read_text().splitlines(keepends=True)[:3]))
    words = ("--data", str(data), "--output", str(tmp_path / "out"), "--rollout.engine", "vllm")
    with FakeVllm(str(toy_path())) as server:
        done = evaluate(None, 1, *words, "--rollout.vllm.urls", f"[{server.url}]")
        assert done.returncode == 0, done.stderr[-4000:]
        assert len([given for given in server.requests if given and "seed" in given]) == 7, "6 samples and the probe"
    server_gone = evaluate(None, 1, *words, "--rollout.vllm.urls", f"[{server.url}]")
    assert server_gone.returncode == 0, "all samples are there: another server is no other evaluation"


def test_episodes(tmp_path: Path) -> None:
    """The answer of an episode is what the model said last; what a tool said is in the conversation."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join((ROOT / "configs/data/products_eval.jsonl").read_text().splitlines(keepends=True)[:8]))
    options = ("--config", "configs/calculator.yaml", "--model", "toy-tools", "--n", "4", "--data", str(data))
    done = evaluate(None, 1, *options, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for part in samples(tmp_path / "out") for line in part.splitlines()]
    talks = [talk for row in rows for talk in row["conversations"]]
    answers = [answer for row in rows for answer in row["answers"]]
    assert len(talks) == 32 and any(message["role"] == "tool" for talk in talks for message in talk)
    for talk, answer in zip(talks, answers, strict=True):
        said = [message["content"] for message in talk if message["role"] == "assistant"][-1]
        assert answer == last_integer(said)


def test_an_adapter_is_evaluated_on_its_base(tmp_path: Path) -> None:
    """Also by a config that trains no adapters; and a server gets the adapter."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toy_path(), dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(toy_path(), tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    data = tmp_path / "data.jsonl"
    data.write_text("".join((ROOT / "configs/data/math_tasks_eval.jsonl").read_text().splitlines(keepends=True)[:5]))
    for name, words in (("adapter", ("--lora", "null")), ("merged", ())):
        done = evaluate(None, 1, "--data", str(data), "--output", str(tmp_path / f"by {name}"), *words,
                        model=str(tmp_path / name))  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    assert samples(tmp_path / "by adapter") == samples(tmp_path / "by merged")
    with FakeVllm(str(toy_path())) as server:
        words = ("--data", str(data), "--output", str(tmp_path / "served"), "--rollout.engine", "vllm")
        done = evaluate(None, 1, *words, "--rollout.vllm.urls", f"[{server.url}]", model=str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert any((given or {}).get("model", "").startswith("policy-") for given in server.requests)
