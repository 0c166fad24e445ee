"""The quickstart, as launch/quickstart.sh runs it: two ranks under ZeRO-2, and a model that has learned."""

from __future__ import annotations

from pathlib import Path

from launching import launch, metrics


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
