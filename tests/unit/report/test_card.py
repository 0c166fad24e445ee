"""Model cards: what the hub reads of them, what they show, and what stays on the machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from grpo_dist.config.schema import Config, DataConfig, ModelConfig, RewardConfig, TrainConfig
from grpo_dist.report.card import model_card


def config(**changes: Any) -> dict[str, Any]:
    """A run's config as it is kept."""
    return asdict(Config(train=TrainConfig(output_dir="/home/me/secret-project/runs/mine"), **changes))


def history(num_steps: int) -> list[dict[str, float]]:
    """A run whose reward rises to 1, evaluated before and after."""
    steps = [{"step": step, "reward/mean": step / num_steps, "kl": 0.1} for step in range(1, num_steps + 1)]
    steps[-1]["eval/accuracy"] = 0.9
    return [{"step": 0, "eval/accuracy": 0.25}, *steps]


def front_matter(card: str) -> dict[str, Any]:
    """What the hub reads."""
    return yaml.safe_load(card.split("---")[1])


def test_front_matter_names_what_is_on_the_hub() -> None:
    data = DataConfig(train_file={"openai/gsm8k": 1.0, "mine.jsonl": 2.0})
    card = model_card(config(model=ModelConfig(name="Qwen/Qwen2.5-0.5B"), data=data), history(3), 3, "merged")
    assert front_matter(card)["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert front_matter(card)["datasets"] == ["openai/gsm8k"]
    assert front_matter(card)["library_name"] == "transformers"
    adapter = front_matter(model_card(config(), history(3), 3, "adapter"))
    assert adapter["library_name"] == "peft" and not {"base_model", "datasets"} & set(adapter)


def test_numbers_are_the_runs_own() -> None:
    card = model_card(config(), history(100), 100, "merged")
    assert "| held-out data | step 0 | step 100 |" in card and "| accuracy | 0.25 | 0.9 |" in card
    rows = [line for line in card.splitlines() if line.endswith("| 0.1 |")]
    assert len(rows) == 9 and rows[0].startswith("| 1 | 0.01 ") and rows[-1].startswith("| 100 | 1 ")


def test_what_came_after_the_exported_step_is_left_out() -> None:
    card = model_card(config(), history(100), 40, "merged")
    assert "0.9" not in card and "| 40 | 0.4 " in card and "| 41 |" not in card
    assert "The training had none" in model_card(config(), [], 0, "merged")


def test_the_machine_stays_out() -> None:
    reward = RewardConfig("mine:f", args={"words": "a|b\n# c\x1b[2J", "judge": "/home/me/judge"})
    data, model = DataConfig(train_file="/home/me/private/rows.jsonl"), ModelConfig(name="/srv/models/base")
    card = model_card(config(model=model, data=data, rewards=[reward]), history(3), 3, "merged")
    assert "secret-project" not in card and "/home/me" not in card and "/srv" not in card
    assert "# mine" in card and "`rows.jsonl`" in card and "`base`" in card
    assert "\x1b" not in card and "\n# c" not in card
