"""Where a model lies: what is said about a path that leads nowhere, and which path a run's tools take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from grpo_dist.checkpoint.trained import find
from grpo_dist.config.places import model_place, require_metrics
from grpo_dist.config.schema import Config, ModelConfig
from grpo_dist.model.config_files import load_model_config, load_tokenizer
from grpo_dist.model.files import model_path
from grpo_dist.model.load import base_identity
from grpo_dist.model.toy import toy_path
from grpo_dist.monitoring.machine import started_in


def test_a_directory_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model", "./model/", "~/model", str(tmp_path / "model")):
        assert model_place(name, "model.name") == str(tmp_path / "model")
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert model_place(name, "model.name") == name, "may be on the hub"
    assert model_path(ModelConfig("toy")) == str(toy_path("toy"))


@pytest.mark.parametrize("name", ["runs", "runs/own/final", "runs/own/checkpoints/step_2", "runs/own/metrics.jsonl"])
def test_a_run_that_is_near_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for directory in ("runs/own/final", "runs/own/checkpoints/step_2", "runs/empty"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "runs" / "own" / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    require_metrics(Path("runs/own"))
    with pytest.raises(
        ValueError, match=f"^{name} is no run: expected metrics.jsonl in it, .*; there is one in runs/own$"
    ):
        require_metrics(Path(name))
    with pytest.raises(ValueError, match=r"as in `train\.output_dir`$"):
        require_metrics(Path("runs/empty"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modle", r"model\.name: './modle' given, but there is no directory .*/modle: .*; did you mean 'model'\?"),
        (
            "models/of/mine",
            r"there is no directory .*/models/of/mine: expected one that a model was saved to, or a hub",
        ),
        ("~/nowhere", r"there is no directory .*/nowhere"),
        ("./empty", r"there is no config\.json in .*/empty: expected a directory that a model was saved to$"),
        ("runs", r"no config\.json in .*/runs.*; there is one in runs/final"),
        (
            "began/",
            r"there is no config\.json in .*; `python -m grpo_dist export .*/began` writes the model of this run's",
        ),
        ("./began/final", r"no directory .*; `python -m grpo_dist export .*/began` writes"),
        ("began/checkpoints/step_2", r"no config\.json .*; `python -m grpo_dist export .*/began` writes"),
        ("began/checkpoints/step_2/rank_0", r"no config\.json .*: expected a directory that a model was saved to$"),
        ("model/config.json", r"which is a file .*: expected the directory that it is in"),
        (
            "llama/q4.gguf",
            r"which is a file .*/q4\.gguf\): GGUF files are for inference alone: expected the safetensors",
        ),
        ("./llama", r"there is no config\.json in .*/llama: .*\. GGUF files are for inference alone"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for directory in ("model", "empty", "runs/final", "began/checkpoints/step_2/rank_0"):
        (tmp_path / directory).mkdir(parents=True)
        if directory in ("model", "runs/final"):
            (tmp_path / directory / "config.json").write_text("{}")
    (tmp_path / "began" / "metrics.jsonl").touch()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "q4.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for load in (load_tokenizer, load_model_config):
        with pytest.raises(ValueError, match=message):
            load(ModelConfig(name))


def test_a_run_s_relative_model_is_that_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (start / "model").mkdir(parents=True)
    for file in (start / "model" / "config.json", run / "final" / "config.json"):
        file.write_text(json.dumps({"model_type": "qwen2"}))
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "./model"}, "lora": None}))
    assert started_in(run) is None and find(run).model.name == "./model"
    lines = [{"directory": "/elsewhere"}, {"directory": str(start)}, {"started": "before this was kept"}]
    (run / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    trained = find(run)
    assert Path(trained.model.name) == start / "model" and trained.given_model.name == "./model"
    config = load_model_config(trained.model)
    monkeypatch.chdir(start)
    assert base_identity(trained.given_model, config) == base_identity(
        ModelConfig("./model"), load_model_config(ModelConfig("./model"))
    ), "a checkpoint fits wherever it is opened from"
    for name in ("toy", "org/name", str(start / "model")):
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"name": name}, "lora": None}))
        assert find(run).model.name == name
    assert Config().model.name
