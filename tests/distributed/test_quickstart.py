"""The quickstart, as launch/quickstart.sh runs it: two ranks under ZeRO-2, and a model that has learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, launch, metrics


@pytest.mark.slow
def test_quickstart_learns(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch("zero2", 2, "--config", "configs/quickstart.yaml", "--train.output_dir", str(run), fresh=True)
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = metrics(run)[0], metrics(run)[-1]
    assert before["eval/accuracy"] <= 0.5
    assert after["eval/accuracy"] >= 0.95
    for told in ("before", "after", str(run / "final"), str(run / "metrics.jsonl"), "next:"):
        assert told in done.stdout


def test_started_again_it_has_nothing_left_to_do(tmp_path: Path) -> None:
    short = ("--config", "configs/quickstart.yaml", "--train.output_dir", str(tmp_path / "run"),
             "--train.num_train_steps", "1", "--train.num_eval_prompts", "4")  # fmt: skip
    first, second = launch(None, 1, *short), launch(None, 1, *short)
    assert first.returncode == second.returncode == 0, second.stderr[-4000:]
    assert "done already" in second.stderr
    assert len(metrics(tmp_path / "run")) == 2


def single_node(directory: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """launch/single_node.sh in the tests' own environment, whatever its pins."""
    (directory / "single_node.sh").write_bytes((ROOT / "launch" / "single_node.sh").read_bytes())
    setup = f"root={ROOT} PATH={Path(sys.executable).parent}:$PATH; cd $root\n"
    (directory / "setup.sh").write_text(setup + 'die() { echo "$*" >&2; exit 1; }\n')
    return subprocess.run(["bash", str(directory / "single_node.sh"), *words], capture_output=True, text=True,
                          timeout=120, check=False, env={**os.environ, **variables})  # fmt: skip


def test_some_gpus_serve_and_the_others_train(tmp_path: Path) -> None:
    launcher = tmp_path / "accelerate" / "commands" / "launch.py"
    launcher.parent.mkdir(parents=True)
    for package in launcher.parents[:2]:
        (package / "__init__.py").touch()
    launcher.write_text("import os, sys\nprint('train on', os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:])\n")
    served = {"CUDA_VISIBLE_DEVICES": "0,1,2,10", "VLLM_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = single_node(tmp_path, "--config", "configs/quickstart.yaml", **served, SERVER_GPUS="1,10")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train on 0,2 --config_file ")
    assert done.stdout.strip().endswith(
        f"--rollout.engine vllm --rollout.vllm.devices 1,10 --rollout.vllm.python {sys.executable}"
    )
    nowhere = single_node(tmp_path, "--config", "configs/quickstart.yaml", **served | {"VLLM_PYTHON": "/no/python"},
                          SERVER_GPUS="1,10")  # fmt: skip
    assert nowhere.returncode == 2 and "'/no/python' given, which is no program here" in nowhere.stderr
    for wrong, message in {"3": "expected some of the GPUs 0,1,2,10", "0,1,2,10": "no GPU for the training"}.items():
        refused = single_node(tmp_path, "--config", "configs/quickstart.yaml", **served, SERVER_GPUS=wrong)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr


def test_a_mistake_in_an_option_ends_before_the_launcher_starts(tmp_path: Path) -> None:
    done = single_node(tmp_path, "--rollout.grup_size", "2")
    assert done.returncode == 2, done.stderr
    assert "did you mean 'rollout.group_size'?" in done.stderr
    assert "Traceback" not in done.stderr
