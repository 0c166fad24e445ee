"""`--dry_run` through the launcher: every rank ends, whatever is wrong, and all of it is said once."""

from __future__ import annotations

from pathlib import Path

from launching import launch

FIVE_MISTAKES = """
rollout: {{group_size: 2.5, max_completion_length: 16}}
data: {{eval_file: nowhere.jsonl, max_prompt_length: 64}}
rewards: [{{name: mth}}]
optim: {{learning_rat: 1e-3}}
logging: {{trackers: [tensorbord]}}
train: {{output_dir: {directory}}}
"""


def test_five_mistakes_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(FIVE_MISTAKES.format(directory=tmp_path / "run"))
    done = launch("zero2", 2, "--dry_run", "--config", str(tmp_path / "config.yaml"), timeout_seconds=120)
    assert done.returncode != 0
    assert done.stdout.count("5 problem(s)") == 1, done.stdout + done.stderr
    for told in ("rollout.group_size: 2.5 given", "nowhere.jsonl", "'mth' is not a built-in reward",
                 "did you mean 'optim.learning_rate'?", "'tensorbord' given"):  # fmt: skip
        assert told in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_good_config_on_two_ranks(tmp_path: Path) -> None:
    done = launch("ddp", 2, "--config", "configs/quickstart.yaml", "--dry_run", "--train.output_dir",
                  str(tmp_path / "run"), timeout_seconds=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no problems found" in done.stdout and "up to 128 on each of 2 rank(s)" in done.stdout
    assert not (tmp_path / "run").exists()
