"""The quickstart, as launch/quickstart.sh runs it: two ranks under ZeRO-2, and a model that has learned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launching import ROOT, launch, metrics


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


def test_a_mistake_in_an_option_ends_before_the_launcher_starts(tmp_path: Path) -> None:
    (tmp_path / "single_node.sh").write_bytes((ROOT / "launch" / "single_node.sh").read_bytes())
    # the tests' own environment, whatever its pins
    (tmp_path / "setup.sh").write_text(f"root={ROOT} PATH={Path(sys.executable).parent}:$PATH; cd $root\n")
    done = subprocess.run(["bash", str(tmp_path / "single_node.sh"), "--rollout.grup_size", "2"], capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "did you mean 'rollout.group_size'?" in done.stderr
    assert "Traceback" not in done.stderr
