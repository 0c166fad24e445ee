"""Completions of 32,768 tokens, whose packs two ranks compute together: drawn and learned as by one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import adapters, completions, relative_difference, train
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_dist.config.schema import ModelConfig
from grpo_dist.model.config_files import load_tokenizer

TOKENS = 32_768


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model of such a length, and completions that never end by themselves."""
    path, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(ModelConfig())
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=TOKENS + 64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return ["--model.name", str(path), "--rollout.max_completion_length", str(TOKENS), "--rollout.min_new_tokens",
            str(TOKENS - 1), "--rollout.group_size", "2", "--train.batch_size", "1", "--train.num_train_steps", "1",
            "--train.max_tokens_per_pack", str(TOKENS + 64), "--data.eval_file", "null", "--rewards",
            "[{name: 'tests.distributed.comparing:share_of_digits'}]"]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_train_a_row_together(options: list[str], tmp_path: Path) -> None:
    one = train(None, 1, tmp_path / "one", *options, timeout_seconds=1800)
    two = train("ddp", 2, tmp_path / "two", *options, "--train.sequence_parallel_size", "2", timeout_seconds=1800)
    expected, got = completions(one), completions(two)
    assert [row["completion"] for row in got] == [row["completion"] for row in expected]
    assert {row["tokens"] for row in got} == {TOKENS}
    learned = [{n: t for n, t in adapters(run).items() if "lora_B" in n} for run in (one, two)]
    assert all(float(tensor.norm()) > 0 for tensor in learned[0].values())
    assert relative_difference(*learned) <= 1e-4
