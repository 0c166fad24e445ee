"""What the log says of evaluations."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_dist.config.schema import Config, DataConfig
from grpo_dist.trainer.ending import _say
from grpo_dist.trainer.evaluation import shown
from grpo_dist.trainer.record import summary, write
from grpo_dist.types import Metrics


def test_the_mean_reward_is_said_where_it_is_another_number() -> None:
    assert shown(0.5, 0.5) == shown(0.5, 0.50004) == "0.500"
    assert shown(0.25, 0.6) == "0.250 (mean reward 0.600)"


def test_what_is_no_number_is_null_for_everyone() -> None:
    seen: list[Metrics] = []
    recorder = SimpleNamespace(metrics=lambda values: seen.append(values) or [], alarms=SimpleNamespace(ringing=[]))
    display = SimpleNamespace(alarms=lambda new, ringing: None, shows_completions=lambda step: False)
    parts = SimpleNamespace(recorder=recorder, display=display, config=Config(), directory=Path("."))
    given = {"step": 3, "reward/mean": math.nan, "kl": -math.inf, "entropy": None, "loss": 0.5}
    expected = {"step": 3, "reward/mean": None, "kl": None, "entropy": None, "loss": 0.5}
    assert write(parts, given) == expected  # type: ignore[arg-type]
    assert seen == [expected]
    assert write(SimpleNamespace(recorder=None), given) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "said"), [([0.25, None, 0.5], "0.250 before (step 0), 0.500 after (step 2)"),
                                              ([None, None, 0.5], None)])  # fmt: skip
def test_an_evaluation_without_any_score_is_left_out_at_the_end(
    values: list[float | None], said: str | None, tmp_path: Path
) -> None:
    lines = [{"step": step, "eval/accuracy": value} for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(SimpleNamespace(directory=tmp_path, config=Config()))  # type: ignore[arg-type]
    assert ("held-out" in text) == (said is not None) and (said or "") in text


def test_the_commands_at_the_end_can_be_copied(tmp_path: Path) -> None:
    directory = tmp_path / "mine, second"
    directory.mkdir()
    (directory / "metrics.jsonl").touch()
    config = Config(data=DataConfig(eval_file="mine.jsonl"))
    text = summary(SimpleNamespace(directory=directory, config=config))  # type: ignore[arg-type]
    commands = [line.partition(":")[2] for line in text.splitlines() if "python -m" in line or "--logdir" in line]
    assert [[word for word in shlex.split(each) if word.startswith(str(tmp_path))] for each in commands] == [
        [str(directory / "tensorboard")], [str(directory)], [str(directory)],
        [str(directory / "final"), str(directory / "config.yaml")], []]  # fmt: skip


def test_a_run_whose_last_words_cannot_be_printed_has_ended_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody reads them (`| head`), or the disk of the log is full."""
    read, write = os.pipe()
    os.close(read)
    stream = io.TextIOWrapper(io.FileIO(write, "w"), write_through=True)
    _say("done, in runs/mine", stream)
    assert "cannot be printed (Broken pipe): done, in runs/mine" in caplog.text
