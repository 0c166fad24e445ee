"""The toy tasks: their splits and data files, their tokenizers, and what the shipped models can and cannot do."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import toy
import toy_carry
import toy_tools
from toy_training import MAX_MODEL_BYTES, Task, evaluate, last_integer, make_tokenizer
from transformers import AutoTokenizer

from grpo_dist.model.toy import toy_path

DATA = Path(__file__).parents[2] / "configs" / "data"
COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)")


def rows(name: str) -> list[dict[str, str]]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def operands(prompt: str) -> tuple[int, str, int]:
    found = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\? Answer with an integer\.", prompt)
    assert found is not None, prompt
    return int(found[1]), found[2], int(found[3])


def pairs(prompts: list[str]) -> set[tuple[int, int]]:
    return {(left, right) for left, _, right in map(operands, prompts)}


def test_held_out_pairs_are_in_neither_training_set() -> None:
    held_out = pairs([row["prompt"] for row in rows("math_tasks_eval")])
    assert held_out == pairs([problem.prompt for problem in toy.problems("eval")])
    assert held_out.isdisjoint(pairs([row["prompt"] for row in rows("math_tasks_train")]))
    assert held_out.isdisjoint(pairs([problem.prompt for problem in toy.problems("train")]))  # supervised


def test_splits_cover_every_problem_once_and_hold_out_a_tenth() -> None:
    train, held_out = toy.problems("train"), toy.problems("eval")
    assert len(set(train + held_out)) == len(train) + len(held_out) == 31 * 31 + 31 * 32 // 2
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert train == toy.problems("train")


def test_sums_are_held_out_and_of_every_length() -> None:
    train, held_out = toy_carry.problems("train"), toy_carry.problems("eval")
    assert len({*train, *held_out}) == 1200 + 120
    for split in (train, held_out):
        counts = Counter((len(str(row.left)), len(str(row.right))) for row in split)
        assert counts == {(digits, digits): len(split) // 6 for digits in range(3, 9)}
    known = {row.prompt for row in held_out}
    drawn = toy_carry.task().draw(dataclasses.replace(toy_carry.COLUMNS, batch_size=2000), random.Random(0))
    assert known.isdisjoint(prompt for prompt, _ in drawn)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_right(split: str) -> None:
    for row in rows(f"carry_{split}"):
        found = re.fullmatch(r"What is (\d+) \+ (\d+)\? Write out each column\.", row["prompt"])
        assert found is not None and row["answer"] == str(int(found[1]) + int(found[2]))
    for row in rows(f"products_{split}"):
        found = re.fullmatch(r"What is (\d+) \* (\d+)\?", row["prompt"])
        assert found is not None and row["answer"] == str(int(found[1]) * int(found[2]))
    for row in rows(f"math_tasks_{split}"):
        left, operation, right = operands(row["prompt"])
        assert row["answer"] == str(left + right if operation == "+" else left - right)


def test_data_files_are_what_the_command_writes(tmp_path: Path) -> None:
    toy.write_data(tmp_path)
    toy_carry.write_data(tmp_path)
    toy_tools.write_data(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    names = ("carry", "guess", "math_tasks", "products")
    assert written == [f"{name}_{split}.jsonl" for name in names for split in ("eval", "train")]
    for name in written:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"), [(" 5", 5), (" -12.", -12), ("3, no: 4", 4), (" I am not sure.", None), ("", None)]
)
def test_last_integer(text: str, expected: int | None) -> None:
    assert last_integer(text) == expected


def test_hedges_score_nothing() -> None:
    draw = random.Random(0)
    phase = dataclasses.replace(toy.HEDGING, fault_share=1.0)
    for problem in toy.problems("eval"):
        assert last_integer(toy.draw_target(problem, phase, draw)) != problem.answer


# --- written-out addition --------------------------------------------------------------------------------------------


def test_written_out_sums_are_right_where_nothing_is_forgotten() -> None:
    problem = toy_carry.Problem(368, 275)
    assert toy_carry.written_out(problem, 0.0, random.Random(0)) == " 8+5+0=13;6+7+1=14;3+2+1=06 so 643"
    assert toy_carry.written_out(toy_carry.Problem(999, 999), 0.0, random.Random(0)).endswith(";9+9+1=19 so 1998")
    for problem in toy_carry.problems("eval"):
        assert last_integer(toy_carry.written_out(problem, 0.0, random.Random(0))) == problem.answer


def test_carries_are_forgotten_by_digit_and_nothing_else_is_wrong() -> None:
    draw, kept, due = random.Random(1), [0] * 10, [0] * 10
    for problem in toy_carry.problems("train"):
        text = toy_carry.written_out(problem, toy_carry.CARELESS.fault_share, draw)
        before, answer = 0, ""
        for upper, lower, carry, total in (tuple(map(int, found)) for found in COLUMN.findall(text)):
            assert upper + lower + carry == total and carry <= before // 10
            kept[upper] += carry
            due[upper] += before // 10
            before, answer = total, f"{total % 10}{answer}"
        assert last_integer(text) == int(f"{before // 10}{answer}")
    assert all(abs(kept[d] / due[d] - 1 + toy_carry.forget_share(d, 0.6)) < 0.12 for d in range(10)), (kept, due)


def test_some_targets_are_guesses() -> None:
    draw = random.Random(1)
    targets = [toy_carry.draw_target(problem, toy_carry.CARELESS, draw) for problem in toy_carry.problems("train")]
    guesses = [target for target in targets if re.fullmatch(r" Maybe \d+", target)]
    assert 0.2 < len(guesses) / len(targets) < 0.28


@pytest.mark.parametrize(("name", "task"), [("toy", toy.task()), ("toy-carry", toy_carry.task())])
def test_tokenizer_splits_and_returns_digits_and_survives_a_save(name: str, task: Task, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = make_tokenizer(task.texts)
    made.save_pretrained(tmp_path)
    texts = [f" {number}" for number in range(-30, 61)] + [*task.texts, "naïve 漢字\n"]
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(toy_path(name))):
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

    path = toy_path("toy")
    assert (path / "model.safetensors").stat().st_size < MAX_MODEL_BYTES
    stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == ["Qwen2ForCausalLM"]
    assert stored["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (stored["eos_token_id"], stored["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    accuracy = evaluate(model, tokenizer, toy.problems("eval")[:100], 16, seed=1)
    assert accuracy.greedy >= 0.9
    # The band of the whole held-out set, 0.30 to 0.48, and two standard deviations of 800 samples.
    assert 0.27 <= accuracy.sampled <= 0.51
    assert accuracy.any_sample >= 0.9
    assert accuracy.ended >= 0.99


def test_shipped_model_adds_columns_and_forgets_carries() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = toy_path("toy-carry")
    assert (path / "model.safetensors").stat().st_size < MAX_MODEL_BYTES
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    problems = toy_carry.problems("eval")
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(1)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=96, do_sample=True, top_k=0)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = [tuple(map(int, found)) for text in texts for found in COLUMN.findall(text)]
    assert len(columns) > 400
    assert sum(left + right + carry == total for left, right, carry, total in columns) > 0.99 * len(columns)
    right = [last_integer(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
    assert 0.05 < sum(right) / len(right) < 0.3
    longest = [problem for problem in problems if problem.left >= 10**7]
    accuracy = evaluate(model, tokenizer, longest, 96, seed=1)
    assert accuracy.greedy < 0.3 and accuracy.any_sample < 0.7 and accuracy.ended > 0.98


# --- tools -----------------------------------------------------------------------------------------------------------


def test_what_the_model_learned_is_what_its_template_writes() -> None:
    """Rows that the model was trained on: the prompt, a call, and the answer of the tool."""
    tokenizer = AutoTokenizer.from_pretrained(toy_path("toy-tools"))
    problem = toy_tools.Problem(47, 86)
    call = toy_tools.call_of(problem)
    asked = [{"role": "user", "content": problem.question}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == toy_tools.rendered(problem)
    answer = {"role": "assistant", "content": call.strip()}
    result = {"role": "tool", "content": str(problem.answer)}
    text = tokenizer.apply_chat_template([*asked, answer, result], tokenize=False, add_generation_prompt=True)
    assert text == toy_tools.after_result(problem, call)


def test_one_of_three_guesses_is_careful() -> None:
    draw = random.Random(0)
    games = [game for game in (toy_tools.draw_game(draw) for _ in range(20000)) if game[0].count("Result") == 1]
    careless = expected = 0.0
    for row, guess in games:
        before, after = int(re.findall(r'"number": (\d)', row)[0]), int(re.findall(r"\d", guess)[0])
        careless += not (after > before if "higher" in row else after < before)
        expected += 0.67 * (before if "higher" in row else 8 - before) / 7
    assert careless / len(games) == pytest.approx(expected / len(games), abs=0.02)
