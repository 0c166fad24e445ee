"""Mixtures, the curriculum, filters, long prompts and data that is read as needed."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_dist.config.data import CurriculumConfig
from grpo_dist.config.schema import Config, DataConfig, RewardConfig, TrainConfig
from grpo_dist.data.mixture import identifying, load_training, order_of
from grpo_dist.data.order import Curriculum, Mixture, Sampler
from grpo_dist.data.prompts import PromptReader
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.monitoring.metrics import pass_rates
from grpo_dist.rewards.registry import answer_checks
from grpo_dist.trainer.collect import further_places
from grpo_dist.types import Batch, Prompt

pytestmark = pytest.mark.quick

CHECKS = answer_checks([RewardConfig("math")])


@pytest.fixture(scope="module")
def load() -> Any:
    tokenizer = load_tokenizer(Config().model)
    return lambda config: load_training(PromptReader(config.data, tokenizer, CHECKS), config.train)


def write(path: Path, numbers: Iterable[int], **columns: Any) -> str:
    rows = [
        {"prompt": f"What is {n}?", "answer": n} | {key: value(n) for key, value in columns.items()} for n in numbers
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def config(**data: Any) -> Config:
    return Config(data=DataConfig(**{"eval_file": None, **data}), train=TrainConfig(batch_size=4))


def test_a_mixture_keeps_its_shares_and_goes_through_each_part() -> None:
    mixture = Mixture([30, 7, 500], [3, 2, 1], batch_size=10, seed=1)
    taken = [index for step in range(100) for index in mixture.batch_indices(step)]
    parts = Counter("a" if index < 30 else "b" if index < 37 else "c" for index in taken)
    assert parts == {"a": 500, "b": 333, "c": 167}
    first = Counter(index for index in taken if index < 30)
    assert len(first) == 30 and max(first.values()) - min(first.values()) <= 1, "in complete permutations"
    assert mixture.batch_indices(77) == Mixture([30, 7, 500], [3, 2, 1], 10, 1).batch_indices(77)
    assert mixture.batch_indices(0) != Mixture([30, 7, 500], [3, 2, 1], 10, 2).batch_indices(0)
    with pytest.raises(ValueError, match="thousandth"):
        Mixture([1, 1], [1, 1e6], 1, 0)
    with pytest.raises(ValueError, match="numbers above 0"):
        Mixture([1, 0], [1, 1], 1, 0)


def test_dynamic_sampling_takes_further_prompts_in_the_mixtures_shares() -> None:
    mixture = Mixture([30, 7, 500], [3, 2, 1], batch_size=10, seed=1)
    taken = [index for step in range(100) for index in further_places(mixture, step, 1)[:4]]
    parts = Counter("a" if index < 30 else "b" if index < 37 else "c" for index in taken)
    assert abs(parts["a"] - 200) < 40 and abs(parts["b"] - 133) < 40 and abs(parts["c"] - 67) < 40
    for sampler in (mixture, Sampler(40, 10, seed=1)):
        first = further_places(sampler, 3, 1)
        assert first == further_places(copy.deepcopy(sampler), 3, 1) and len(first) == 10
        others = [further_places(sampler, 3, 2), further_places(sampler, 4, 1), sampler.batch_indices(3)]
        assert first not in others
        assert sampler.batch_indices(3) == copy.deepcopy(sampler).batch_indices(3), "the sampler itself is unchanged"


def run_curriculum(curriculum: Curriculum, rates: dict[int, float], steps: int) -> list[int]:
    taken = []
    for step in range(steps):
        batch = curriculum.batch_indices(step)
        assert batch == curriculum.batch_indices(step)
        after = curriculum.epoch_after(step)
        curriculum.record([rates.get(index, 0.5) for index in batch])
        assert after == curriculum.epoch(step + 1)
        taken += batch
    return taken


def test_the_curriculum_passes_over_what_is_too_easy_or_too_hard() -> None:
    def make() -> Curriculum:
        return Curriculum(Sampler(12, 4, seed=0), 12, low=0.1, high=0.9, rest=2)

    rates = {1: 0.0, 2: 1.0, 3: math.nan}
    taken = run_curriculum(make(), rates, 30)
    assert sorted(taken[:12]) == list(range(12)), "a prompt without a pass rate is taken"
    assert not {1, 2} & set(taken[12:32]), "they rest for two passes"
    counts = Counter(taken)
    assert 1 <= counts[1] < counts[4] and counts[3] >= counts[4] - 1
    uninterrupted = make()
    run_curriculum(uninterrupted, rates, 7)
    resumed = make()
    resumed.restore(json.loads(json.dumps(uninterrupted.state())))
    assert run_curriculum(resumed, rates, 10) == run_curriculum(uninterrupted, rates, 10)
    hopeless = dict.fromkeys(range(12), 0.0)
    assert len(run_curriculum(make(), hopeless, 20)) == 80, "where nothing fits, prompts come in turn"


def test_without_history_the_curriculum_is_the_sampler() -> None:
    sampler = Sampler(10, 3, seed=4)
    curriculum = Curriculum(sampler, 10, 0.0, 1.0, 1)
    assert [each.epoch_after(0) for each in (sampler, curriculum)] == [0.3, 0.3]
    assert run_curriculum(curriculum, {}, 9) == [index for step in range(9) for index in sampler.batch_indices(step)]
    sampler.record([1.0])
    sampler.restore(sampler.state())
    assert sampler.state() == {}


def test_pass_rates() -> None:
    reward = torch.tensor([1.0, 0.0, math.nan, 1.0, math.nan], dtype=torch.float64)
    group, empty = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([])
    batch = Batch([Prompt(n, [1], "?") for n in range(3)], group, empty, empty, empty, empty, empty, empty, reward)
    assert pass_rates(batch, [1.0, -1.0])[:2] == [0.5, 1.0] and math.isnan(pass_rates(batch, [1.0])[2])


def test_mixtures_and_curricula_of_a_config(tmp_path: Path, load: Any) -> None:
    files = {write(tmp_path / "a.jsonl", range(6)): 1.0, write(tmp_path / "b.jsonl", range(6, 9)): 3.0}
    prompts, sampler = load(config(train_file=files))
    assert isinstance(sampler, Mixture) and [prompt.index for prompt in prompts] == list(range(9))
    assert prompts[7].text == "What is 7?" == prompts[-2].text and len(prompts[5:8]) == 3
    _, sampler = load(config(train_file=files, curriculum=CurriculumConfig()))
    assert isinstance(sampler, Curriculum)


def test_streaming_gives_the_same_prompts_in_the_same_order(tmp_path: Path, load: Any) -> None:
    path = write(tmp_path / "a.jsonl", range(300))
    with open(path, "a") as file:
        file.write("\n  \n" + json.dumps({"prompt": "é?", "answer": 1}) + "\n")
    loaded, sampler = load(config(train_file=path))
    streamed, same = load(config(train_file=path, streaming=True))
    assert list(streamed) == loaded and streamed[298:] == loaded[298:]
    assert sampler.batch_indices(50) == same.batch_indices(50)
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,answer\na?,1\nb?,2\n")
    prompts, _ = load(config(train_file=str(csv), streaming=True))
    assert [prompt.text for prompt in prompts] == ["a?", "b?"]
    with open(path, "a") as file:
        file.write('{"prompt": "x"}\n')
    prompts, _ = load(config(train_file=path, streaming=True))
    with pytest.raises(ValueError, match=r"row 304 cannot be used: no 'answer'"):
        prompts[301]
    with pytest.raises(ValueError, match=r"data\.streaming"):
        config(train_file=path, streaming=True, bad_rows="drop")


def test_a_streamed_mixture_is_the_loaded_one(tmp_path: Path, load: Any) -> None:
    """Its data is identified by the rows that are checked at the start of each part."""
    files = {write(tmp_path / "a.jsonl", range(150)): 1.0, write(tmp_path / "b.jsonl", range(150, 160)): 2.0}
    loaded, sampler = load(config(train_file=files))
    streamed, same = load(config(train_file=files, streaming=True))
    assert list(streamed) == list(loaded) and streamed[148:152] == loaded[148:152] and streamed[-1] == loaded[159]
    assert [prompt.index for prompt in loaded] == list(range(160)) and sampler.batch_indices(7) == same.batch_indices(7)
    for prompts in (loaded, streamed):
        with pytest.raises(IndexError):
            prompts[160]
    assert list(identifying(loaded)) == list(loaded)
    assert list(identifying(streamed)) == loaded[:100] + loaded[150:]


def test_what_decides_the_prompts_of_a_step() -> None:
    assert order_of(DataConfig(train_file="a")) == {"weights": None, "curriculum": None}
    mixed = DataConfig(train_file={"a": 1.0, "b": 3.0}, curriculum=CurriculumConfig(low=0.2, high=0.7, rest_epochs=5))
    assert order_of(mixed) == {"weights": [1.0, 3.0], "curriculum": {"low": 0.2, "high": 0.7, "rest_epochs": 5}}


def test_columns_that_only_later_rows_have_are_streamed_too(tmp_path: Path, load: Any) -> None:
    path = write(tmp_path / "a.jsonl", range(101))
    with open(path, "a") as file:
        file.write('{"prompt": "x", "answer": "1", "tests": 2}\n{"prompt": "x", "answer": "1", "completions": 2}\n')
    prompts, _ = load(config(train_file=path, streaming=True))
    assert prompts[100].columns == {"answer": 100} and prompts[101].columns == {"answer": "1", "tests": 2}
    with pytest.raises(ValueError, match=r"has the column\(s\) completions, which are names of other arguments"):
        prompts[102]


def test_filters_are_counted(tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", range(10), level=lambda n: n % 3, kind=lambda n: "xy"[n % 2])
    caplog.set_level(logging.INFO, "grpo_dist")
    prompts, _ = load(config(train_file=path, keep={"level": {"max": 1}, "kind": ["x"]}))
    assert [prompt.index for prompt in prompts] == [0, 4, 6]
    assert "keeps 3 of 10 rows (left out by level: 3, kind: 5)" in caplog.text
    for keep, message in (
        ({"levle": 1}, "no column 'levle'"), ({"level": {"most": 1}}, "min and max"),
        ({"level": 7}, "leave none of 10"), ({"kind": {"min": 1}}, "cannot be compared"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(config(train_file=path, keep=keep))


def test_what_is_evaluated_on_is_held_out(tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, others = write(tmp_path / "a.jsonl", range(10)), write(tmp_path / "b.jsonl", range(7, 12))
    evaluated = write(tmp_path / "eval.jsonl", [2, 7, 50])
    caplog.set_level(logging.INFO, "grpo_dist")
    mixed = config(train_file={path: 1.0, others: 1.0}, eval_file=evaluated, hold_out=True)
    prompts, sampler = load(mixed)
    assert [prompt.index for prompt in prompts] == [0, 1, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14]
    assert max(index for step in range(20) for index in sampler.batch_indices(step)) == len(prompts) - 1
    assert f"{path}: data.hold_out leaves out 2 of 10 prompts" in caplog.text
    assert f"{others}: data.hold_out leaves out 1 of 5 prompts" in caplog.text
    with pytest.raises(ValueError, match="has all 3 prompts"):
        load(config(train_file=evaluated, eval_file=evaluated, hold_out=True))
    for impossible in ({}, {"eval_file": evaluated, "streaming": True}):
        with pytest.raises(ValueError, match=r"data\.(hold_out|streaming): True given"):
            config(train_file=path, hold_out=True, **impossible)


def test_long_prompts(tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", range(8, 12))
    tokenizer = load_tokenizer(Config().model)
    short = len(tokenizer("What is 8?").input_ids)
    given = {"train_file": path, "max_prompt_length": short}
    with pytest.raises(ValueError, match="2 of 4 rows cannot be used"):
        load(config(**given))
    prompts, _ = load(config(**given, too_long="drop"))
    assert [prompt.index for prompt in prompts] == [0, 1]
    prompts, _ = load(config(**given, too_long="truncate"))
    assert len(prompts) == 4 and prompts[2].ids == tokenizer("What is 10?").input_ids[-short:]
    assert caplog.text.count("2 of 4 prompts have more than data.max_prompt_length") == 2
