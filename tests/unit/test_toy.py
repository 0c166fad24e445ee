"""The toy base: its splits and data files, its tokenizer, and what the shipped model can and cannot do."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_dist import toy

DATA = Path(__file__).parents[2] / "configs" / "data"


def rows(split: str) -> list[dict[str, str]]:
    lines = (DATA / f"math_tasks_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def operands(prompt: str) -> tuple[int, str, int]:
    found = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\? Answer with an integer\.", prompt)
    assert found is not None, prompt
    return int(found[1]), found[2], int(found[3])


def pairs(prompts: list[str]) -> set[tuple[int, int]]:
    return {(left, right) for left, _, right in map(operands, prompts)}


def test_held_out_pairs_are_in_neither_training_set() -> None:
    held_out = pairs([row["prompt"] for row in rows("eval")])
    assert held_out == pairs([problem.prompt for problem in toy.problems("eval")])
    assert held_out.isdisjoint(pairs([row["prompt"] for row in rows("train")]))
    assert held_out.isdisjoint(pairs([problem.prompt for problem in toy.problems("train")]))  # supervised


def test_splits_cover_every_problem_once_and_hold_out_a_tenth() -> None:
    train, held_out = toy.problems("train"), toy.problems("eval")
    assert len(set(train + held_out)) == len(train) + len(held_out) == 31 * 31 + 31 * 32 // 2
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert train == toy.problems("train")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_right(split: str) -> None:
    for row in rows(split):
        left, operation, right = operands(row["prompt"])
        assert row["answer"] == str(left + right if operation == "+" else left - right)


def test_data_files_are_what_the_command_writes(tmp_path: Path) -> None:
    toy.write_data(tmp_path)
    for split in ("train", "eval"):
        name = f"math_tasks_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"), [(" 5", 5), (" -12.", -12), ("3, no: 4", 4), (" I am not sure.", None), ("", None)]
)
def test_last_integer(text: str, expected: int | None) -> None:
    assert toy.last_integer(text) == expected


def test_hedges_score_nothing() -> None:
    draw = random.Random(0)
    phase = dataclasses.replace(toy.HEDGING, hedging_share=1.0)
    for problem in toy.problems("eval"):
        assert toy.last_integer(toy.draw_target(problem, phase, draw)) != problem.answer


def test_tokenizer_splits_and_returns_digits_and_survives_a_save(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = toy.make_tokenizer()
    made.save_pretrained(tmp_path)
    texts = [f" {number}" for number in range(-30, 61)] + ["What is 12 - 7? Answer with an integer.", "naïve 漢字\n"]
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(toy.toy_path())):
        assert tokenizer.get_vocab() == made.get_vocab()
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.bos_token_id is None
        assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["1", "2"]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids == made(text)["input_ids"]
            assert tokenizer.decode(ids) == text


def test_shipped_model_knows_the_arithmetic_and_hedges() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = toy.toy_path()
    assert (path / "model.safetensors").stat().st_size < toy.MAX_MODEL_BYTES
    stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == ["Qwen2ForCausalLM"]
    assert stored["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (stored["eos_token_id"], stored["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    accuracy = toy.evaluate(model, tokenizer, toy.problems("eval")[:100], seed=1)
    assert accuracy.greedy >= 0.9
    # The band of the whole held-out set, 0.30 to 0.48, and two standard deviations of 800 samples.
    assert 0.27 <= accuracy.sampled <= 0.51
    assert accuracy.any_sample >= 0.9
    assert accuracy.ended >= 0.99


def test_a_missing_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    with pytest.raises(FileNotFoundError, match=r"python -m grpo_dist\.toy"):
        toy.toy_path()


def test_import_is_light() -> None:
    code = "import sys, grpo_dist.toy; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DATA.parents[1])
