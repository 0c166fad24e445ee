"""What the log says of evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_dist.config.schema import Config
from grpo_dist.trainer.evaluation import shown
from grpo_dist.trainer.record import summary


def test_the_mean_reward_is_said_where_it_is_another_number() -> None:
    assert shown(0.5, 0.5) == shown(0.5, 0.50004) == "0.500"
    assert shown(0.25, 0.6) == "0.250 (mean reward 0.600)"


@pytest.mark.parametrize(("values", "said"), [([0.25, None, 0.5], "0.250 before (step 0), 0.500 after (step 2)"),
                                              ([None, None, 0.5], None)])  # fmt: skip
def test_an_evaluation_without_any_score_is_left_out_at_the_end(
    values: list[float | None], said: str | None, tmp_path: Path
) -> None:
    lines = [{"step": step, "eval/accuracy": value} for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(SimpleNamespace(directory=tmp_path, config=Config()))  # type: ignore[arg-type]
    assert ("held-out" in text) == (said is not None) and (said or "") in text
