"""A check and the start of a run see weights that do not fit the config, before any are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_dist.cli.main import main
from grpo_dist.config.parse import parse_config
from grpo_dist.model.toy import toy_path
from grpo_dist.trainer.build import UserError, build


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options of a run with a copy of the toy."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': f'{n} + {n}', 'answer': str(2 * n)})}\n" for n in range(4)))
    shutil.copytree(toy_path(), tmp_path / "model")
    return ["--data.train_file", str(file), "--data.eval_file", "null", "--data.max_prompt_length=64", "--model.name",
            str(tmp_path / "model"), "--train.output_dir", str(tmp_path / "run")]  # fmt: skip


@pytest.mark.parametrize(
    ("num_layers", "problem"),
    [(9, "lacks {} weights of Qwen2ForCausalLM, which would be random"),
     (1, "has {} layers more than Qwen2ForCausalLM by its config.json")],
)  # fmt: skip
def test_weights_that_do_not_fit_the_config_are_found_in_their_headers(
    num_layers: int, problem: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, beside a mistake in the adapters; a run ends with the same words before it reads weights."""
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    further = settings["num_hidden_layers"] - num_layers
    settings |= {"num_hidden_layers": num_layers, "layer_types": None}
    file.write_text(json.dumps(settings))
    expected = problem.format(further if further > 0 else -12 * further)
    assert main(["check", *words, "--lora.target_modules", "[q_proj, lm_head]"]) == 2
    shown = capsys.readouterr().out
    assert shown.count(expected) == 1 and "'lm_head' cannot have adapters" in shown
    with pytest.raises(UserError, match=expected):
        build(parse_config(words))


def test_weights_that_are_left_out_are_worth_a_look(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file) | {"v_head.weight": torch.ones(1, 8)}
    save_file(weights, file, metadata={"format": "pt"})
    assert main(["check", *words]) == 0
    assert "computes (v_head.weight): they are not loaded" in capsys.readouterr().out
