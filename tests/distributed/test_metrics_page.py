"""docs/metrics.md has every metric that real runs write, and no other."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from fake_vllm import FakeVllm
from launching import ROOT, launch, metrics
from small_experts import make_experts

from grpo_dist.model.toy import toy_path

RUNS = {
    "critic": ["--preset", "ppo", "--loss.importance_correction", "truncate", "--loss.kl_target", "0.02"],
    "groups": ["--rollout.max_resamples", "1", "--rewards", "[{name: math}, {name: boxed, weight: 0.1}]"],
    "vllm": ["--rollout.engine", "vllm", "--rollout.lag", "1"],
    "episodes": ["--config", "configs/calculator.yaml"],
    "experts": ["--data.max_prompt_length", "64", "--rollout.max_completion_length", "8"],
}
"""Between them, all options that add metrics; `boxed` reports a number of its own."""


ON_GPU = {f"memory/{each}_gib" for each in ("rollout", "reward", "reference", "update", "sync", "eval", "reserved")}
"""Metrics that runs on a CPU do not have."""


def page() -> set[str]:
    """Metric names of the page, NAME standing for a reward's and … for what it reports."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    tables = text.partition("## All metrics")[2].partition("## Alarms")[0]
    cells = re.findall(r"^\| (`.*?) \|", tables, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    names: set[str] = set()
    for run, options in RUNS.items():
        directory, words, server = tmp_path_factory.mktemp("runs") / run, list(options), nullcontext()
        if run == "vllm":
            server = FakeVllm(str(toy_path()), max_rank=32)
            words += ["--rollout.vllm.urls", f"[{server.url}]"]
        if run == "experts":
            words += ["--model.name", make_experts(tmp_path_factory.mktemp("model"), "qwen3_moe")]
        with server:
            done = launch(None, 1, "--config", "configs/quickstart.yaml", *words, "--train.num_train_steps", "2",
                          "--train.batch_size", "4", "--rollout.group_size", "4", "--train.num_eval_prompts", "4",
                          "--train.save_every", "0",
                          "--train.output_dir", str(directory))  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert (directory / "alarms.jsonl").exists()
        names |= {name for line in metrics(directory) for name in line}
        assert [("eval/accuracy" in line, "time/eval" in line) for line in metrics(directory)] == [
            (True, True), (False, False), (True, True)
        ]  # fmt: skip
    return names


def as_on_the_page(name: str) -> str:
    parts = name.split("/")
    if len(parts) < 3 or parts[0] != "reward":
        return name
    return f"reward/NAME/{parts[2] if parts[2] in ('mean', 'failed', 'repeated_calls', 'seconds') else '…'}"


def test_the_page_has_every_metric_and_no_other(written: set[str]) -> None:
    assert {as_on_the_page(name) for name in written} | ON_GPU == page()


def test_every_metric_has_a_meaning(written: set[str]) -> None:
    text = Path(ROOT / "docs" / "metrics.md").read_text()
    for name in {as_on_the_page(name) for name in written}:
        (row,) = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
        assert len(row.split("|")) == 7 and len(row.split("|")[3].strip()) > 4, row
