"""Chat: what is heard are the run's own options, and nothing that came with the model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import GenerationConfig

from grpo_dist.checkpoint.trained import Trained
from grpo_dist.cli.conversation import Conversation
from grpo_dist.config.schema import Config, ModelConfig
from grpo_dist.distributed.device import DTYPES
from grpo_dist.model.config_files import end_token_ids, load_tokenizer
from grpo_dist.model.load import load_causal_lm, load_policy
from grpo_dist.rollout import Request, RowDecoder, decode_all
from grpo_dist.rollout.sampling import sampling_with
from grpo_dist.text.tokens import CompletionTexts

PROMPT = "What is 12 - 7? Answer with an integer."


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_config_of_the_model_has_no_part(
    temperature: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    trained = Trained(tmp_path, tmp_path, 1, asdict(config), True)
    answers = []
    for strange in (False, True):
        policy = load_policy(ModelConfig("toy"), config.lora, DTYPES["float32"], None)
        if strange:
            policy.causal_lm.generation_config = GenerationConfig(
                repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=7, top_k=1, max_length=3, do_sample=True,
                suppress_tokens=[5, 6, 7], temperature=5.0,
            )  # fmt: skip
        tokenizer = load_tokenizer(ModelConfig("toy"))
        Conversation(trained, policy.eval(), tokenizer, temperature, 12, seed=3).answer(PROMPT)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert "--- base\n" in answers[0] and "--- after 1 steps\n" in answers[0]


def test_the_likeliest_answer_is_the_model_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tokenizer = Config(), load_tokenizer(ModelConfig("toy"))
    policy = load_policy(ModelConfig("toy"), config.lora, DTYPES["float32"], None).eval()
    trained = Trained(tmp_path, tmp_path, 1, asdict(config), True)
    Conversation(trained, policy, tokenizer, 0.0, 12, seed=0).answer(PROMPT)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    plain = load_causal_lm(ModelConfig("toy"), DTYPES["float32"], None).eval()
    row = plain.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(row, skip_special_tokens=True)
    assert capsys.readouterr().out.startswith(f"--- base\n{expected}\n")


def test_the_run_s_ends_and_bans_hold_in_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tokenizer = Config(), load_tokenizer(ModelConfig("toy"))
    policy = load_policy(ModelConfig("toy"), config.lora, DTYPES["float32"], None).eval()
    config.rollout.stop, config.rollout.min_new_tokens, config.rollout.banned_tokens = ["3"], 6, ["5"]
    trained = Trained(tmp_path, tmp_path, 1, asdict(config), True)
    Conversation(trained, policy, tokenizer, 0.0, 24, seed=0).answer(PROMPT)
    ends = end_token_ids(ModelConfig("toy"), tokenizer)
    sampling = replace(sampling_with(config.rollout, tokenizer, ends, policy.causal_lm.config), greedy=True)
    request = Request(0, 0, tokenizer(PROMPT)["input_ids"], key=0)
    (expected,) = decode_all(RowDecoder(ends, 24), policy.causal_lm, [request], sampling)
    (text,) = CompletionTexts(tokenizer, ends)([expected.ids])
    assert len(expected.ids) > 6 and "5" not in text
    assert capsys.readouterr().out.startswith(f"--- base\n{text}\n")
