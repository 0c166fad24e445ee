"""What a user may not have meant is said, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import make_tokenizer

from grpo_dist.config.schema import Config, DataConfig
from grpo_dist.preflight.doubts import doubts
from grpo_dist.types import Prompt

SHIPPED = "configs/data/math_tasks_eval.jsonl"
TEXT, MESSAGES = Prompt(0, [5], "a"), Prompt(0, [5], "a", [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("has_template", "chat_template", "prompt", "doubted"),
    [
        (True, "auto", TEXT, True), (False, "auto", TEXT, False), (True, "never", TEXT, False),
        (True, "auto", MESSAGES, False),
    ],
)  # fmt: skip
def test_an_instruct_model_without_its_template(has_template: bool, chat_template: str, prompt: Prompt,
                                                doubted: bool) -> None:  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}" if has_template else None
    config = Config(data=DataConfig("own.jsonl", chat_template=chat_template))  # type: ignore[arg-type]
    assert bool(doubts(config, tokenizer, [prompt])) == doubted
    assert not doubts(config, tokenizer, []), "a problem that is named elsewhere"


@pytest.mark.parametrize(
    ("train_file", "eval_file", "doubted"),
    [
        ("own.jsonl", SHIPPED, True), ({"own.jsonl": 1.0, "b.jsonl": 1.0}, str(Path(SHIPPED).absolute()), True),
        ("configs/data/math_tasks_train.jsonl", SHIPPED, False), ("own.jsonl", "held_out.jsonl", False),
        ("own.jsonl", None, False),
    ],
)  # fmt: skip
def test_evaluation_on_data_that_ships(
    train_file: str | dict[str, float], eval_file: str | None, doubted: bool
) -> None:
    said = doubts(Config(data=DataConfig(train_file, eval_file)), make_tokenizer(), [TEXT])
    assert any("ships with the package" in each for each in said) == doubted


def test_a_task_of_ones_own_is_not_evaluated_on_sums() -> None:
    assert DataConfig("own.jsonl").eval_file is None
