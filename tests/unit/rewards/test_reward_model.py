"""The reward model, against a tiny sequence-classification checkpoint that is trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from toy import task
from toy_training import make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen2ForSequenceClassification as Classifier

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import resolve
from grpo_dist.rewards.scores import Item

TEXTS = ["good day", "good night", "bad day", "bad night", "day good", "night bad", "a long and good day", "bad"]


def config(num_labels: int, vocab_size: int) -> Qwen2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2Config(
        vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=64, num_labels=num_labels, **sizes
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scalar` and `classes` know good from bad; `headless` is a language model."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(task().texts)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    targets = torch.tensor([float("good" in text) for text in TEXTS])
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for name, num_labels in (("scalar", 1), ("classes", 2)):
        torch.manual_seed(0)
        model = Classifier(config(num_labels, len(tokenizer)))
        model.config.pad_token_id = tokenizer.pad_token_id
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            logits = model(**inputs).logits
            loss = (
                torch.nn.functional.mse_loss(logits[:, 0], targets)
                if num_labels == 1
                else torch.nn.functional.cross_entropy(logits, targets.long())
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    Qwen2ForCausalLM(config(2, len(tokenizer))).save_pretrained(path / "headless")
    tokenizer.save_pretrained(path / "headless")
    return path


def test_a_trained_model_scores_in_batches(directory: Path) -> None:
    texts = [*TEXTS, "day " * 40, ""]
    config = RewardConfig("reward_model", args={"model": str(directory / "scalar"), "batch_size": 3})
    with ScorerPool([config], ScoringConfig(num_workers=1)) as pool:
        scores = pool.score([Item("", text, [1]) for text in texts])
    assert [failure.item for failure in scores.failures] == [8, 9], "too long and empty: never cut, never guessed"
    assert "expected 1 to 64" in scores.failures[0].message
    model = AutoModelForSequenceClassification.from_pretrained(directory / "scalar")
    tokenizer = AutoTokenizer.from_pretrained(directory / "scalar")
    alone = [float(model(**tokenizer(text, return_tensors="pt")).logits.detach()) for text in TEXTS]
    assert scores.values[:8, 0] == pytest.approx(alone, abs=1e-5), "padding and order change nothing"
    assert [value > 0.5 for value in alone] == ["good" in text for text in TEXTS]


def test_an_attention_in_config_json_is_not_needed(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory / "scalar", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": "flash_attention_2"}))
    names = (tmp_path, directory / "scalar")
    asked, plain = (resolve(RewardConfig("reward_model", args={"model": str(name)})) for name in names)
    given = {"prompts": ["a "], "completions": ["good day"]}
    assert asked.function(**given) == plain.function(**given)


def test_a_text_may_end_with_what_a_tokenizer_pads_with(directory: Path, tmp_path: Path) -> None:
    """By a config without padding the score is that of the last token, also where that is the end of a turn."""
    model = AutoModelForSequenceClassification.from_pretrained(directory / "scalar")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory / "scalar")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    texts = [text + tokenizer.eos_token * (n % 2) for n, text in enumerate(TEXTS)]
    reward = resolve(RewardConfig("reward_model", args={"model": str(tmp_path)})).function
    alone = [float(model(**tokenizer(text, return_tensors="pt")).logits.detach()) for text in texts]
    assert reward([""] * len(texts), texts) == pytest.approx(alone, abs=1e-5)


def test_a_prompt_that_was_rendered_before_begins_once(directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory / "scalar")
    begin = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(directory / "scalar").save_pretrained(tmp_path)
    reward = resolve(RewardConfig("reward_model", args={"model": str(tmp_path)})).function
    assert reward([f"{begin}good "], ["day"]) == reward(["good "], ["day"])


def test_classes_and_bfloat16(directory: Path) -> None:
    good = ["good" in text for text in TEXTS]
    for args in ({"model": "scalar", "dtype": "bfloat16"}, {"model": "classes", "label": "LABEL_1"}):
        reward = resolve(RewardConfig("reward_model", args=args | {"model": str(directory / args["model"])}))
        assert [value > 0.5 for value in reward.function(prompts=[""] * len(TEXTS), completions=TEXTS)] == good


def test_conversations_use_the_model_s_own_template(directory: Path) -> None:
    reward = resolve(RewardConfig("reward_model", args={"model": str(directory / "scalar")})).function
    prompts, completions = [[{"role": "user", "content": "day"}]], [[{"role": "assistant", "content": "good"}]]
    assert reward(prompts, completions) == pytest.approx(reward(["user day assistant "], ["good "]), abs=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "headless"}, "has no weights for score.weight"),
        ({"model": "classes"}, "expected one of the classes"),
        ({"model": "classes", "label": 2}, "expected one of the classes"),
        ({"model": "scalar", "label": 0}, "has a single output"),
    ],
)
def test_checkpoints_that_cannot_serve(directory: Path, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(RewardConfig("reward_model", args={**args, "model": str(directory / str(args["model"]))}))
