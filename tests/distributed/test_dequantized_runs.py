"""Trainings from checkpoints in FP8 and MXFP4, as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check_same, metrics, train
from packed_models import write_fp8, write_mxfp4
from transformers import AutoModelForCausalLM

from grpo_dist.cli.main import main

OPTIONS = ("--data.max_prompt_length", "64", "--rollout.max_completion_length", "8", "--train.num_train_steps", "2",
           "--loss.kl_coeff", "0.04", "--optim.learning_rate", "1e-3", "--rewards",
           "[{name: 'tests.distributed.comparing:different_characters'}]")  # fmt: skip


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model in the files of openai/gpt-oss-20b."""
    path = tmp_path_factory.mktemp("model")
    write_mxfp4(path)
    return str(path)


@pytest.fixture(scope="module")
def one_process(gpt_oss: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run all others are compared with."""
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", "--model.name", gpt_oss, *OPTIONS)


def test_gpt_oss_as_published(one_process: Path, tmp_path: Path) -> None:
    _, first, second = metrics(one_process)
    assert first["rollout/router_agreement"] == 1 and abs(first["rollout/kl"]) < 1e-9
    assert second["grad_norm"] > 0
    assert "dequantised from mxfp4, and is merged into its values" in (one_process / "final" / "README.md").read_text()
    assert "quantization_config" not in json.loads((one_process / "final" / "config.json").read_text())
    assert main(["export", str(one_process), "--to", "adapter", "--out", str(tmp_path / "out")]) == 0
    assert "dequantised from mxfp4" in (tmp_path / "out" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(one_process / "final")


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [("zero2", 2), *(pytest.param(each, 2, marks=pytest.mark.slow) for each in ("zero3", "fsdp2"))],
)
def test_ranks_change_nothing(
    strategy: str, num_processes: int, gpt_oss: str, one_process: Path, tmp_path: Path
) -> None:
    other = train(strategy, num_processes, tmp_path / "run", "--model.name", gpt_oss, *OPTIONS)
    check_same(one_process, other)


@pytest.mark.slow
def test_fp8_with_adapters_and_with_all_weights(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    for lora in ([], ["--lora", "null"]):
        run = train(None, 1, tmp_path / f"run{len(lora)}", "--model.name", str(tmp_path / "model"), *OPTIONS, *lora)
        _, first, _ = metrics(run)
        assert abs(first["rollout/kl"]) < 1e-9
        assert "dequantised from fp8" in (run / "final" / "README.md").read_text()
