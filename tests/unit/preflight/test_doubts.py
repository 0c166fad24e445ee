"""What a user may not have meant is said, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import make_tokenizer

from grpo_dist.config.schema import Config, DataConfig, RolloutConfig
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
    assert bool(doubts(config, tokenizer, [prompt], [])) == doubted
    assert not doubts(config, tokenizer, [], []), "a problem that is named elsewhere"


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
    said = doubts(Config(data=DataConfig(train_file, eval_file)), make_tokenizer(), [TEXT], [])
    assert any("ships with the package" in each for each in said) == doubted


def test_a_task_of_ones_own_is_not_evaluated_on_sums() -> None:
    assert DataConfig("own.jsonl").eval_file is None


TURNS = "{% for each in messages %}<|{{ each.role }}|>{{ each.content }}<|over|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end_ids", "stop", "doubted"),
    [
        (TURNS, [256], [], True), (TURNS, [256, 257], [], False), (TURNS, [256], ["<|over|>"], False),
        (TURNS.replace("<|over|>", "<end>"), [256], [], False), (TURNS.replace("<|over|>", ""), [256], [], False),
        ("{{ messages[0].content }}{{ raise_exception('no answers') if messages[1] }}", [256], [], False),
    ],
)  # fmt: skip
def test_a_template_that_ends_answers_otherwise(
    template: str, end_ids: list[int], stop: list[str], doubted: bool
) -> None:
    """A base model's tokenizer with the template of its instruct variant: completions do not end where answers do."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    tokenizer.chat_template = template
    config = Config(data=DataConfig("own.jsonl"), rollout=RolloutConfig(stop=stop))
    said = doubts(config, tokenizer, [MESSAGES], end_ids)
    assert [each.startswith("the chat template ends an answer with '<|over|>'") for each in said] == [True] * doubted
    assert not any("ends an answer" in each for each in doubts(config, tokenizer, [TEXT], end_ids))


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs", "images"])
def test_columns_that_only_rewards_get(name: str) -> None:
    prompt = Prompt(0, [5], "a", None, {name: [], "answer": "a"})
    (said,) = doubts(Config(data=DataConfig("own.jsonl")), make_tokenizer(), [prompt], [])
    assert said.startswith(f"the column '{name}' is not shown to the model")


@pytest.mark.parametrize(
    ("options", "doubted"),
    [
        ({"rollout": RolloutConfig(stop=["\\n\\n"])}, "rollout.stop"), ({"rollout": RolloutConfig(stop=["\n"])}, None),
        ({"data": DataConfig("own.jsonl", system_prompt="Think.\\nAnswer.")}, "data.system_prompt"),
    ],
)  # fmt: skip
def test_line_breaks_that_are_none(options: dict[str, Any], doubted: str | None) -> None:
    said = doubts(Config(**{"data": DataConfig("own.jsonl"), **options}), make_tokenizer(), [TEXT], [])
    assert [each.partition(":")[0] for each in said] == [doubted] * (doubted is not None)
