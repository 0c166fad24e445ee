"""Step times on other numbers of ranks: each piece of the arithmetic against a slow twin or a case known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from grpo_dist.cli.main import main
from grpo_dist.model.packing import piece_cost
from grpo_dist.planning.memory import ModelCounts
from grpo_dist.planning.recorded import read_run
from grpo_dist.planning.scaling import (
    HOST_PER_TOKEN,
    Costs,
    Group,
    Link,
    Message,
    RecordedStep,
    Setting,
    fit,
    heaviest,
    messages,
    not_negative_fit,
    predict,
    rollout_seconds,
    shares,
)

COUNTS = ModelCounts(parameters=5000, adapters=300, adapted=4000, joined=900, kept_whole=1000, num_layers=4,
                     query_heads=4, cache_width=16, vocabulary=100)  # fmt: skip
SETTING = Setting(COUNTS, zero_stage=0, policy_bytes=2, trained_bytes=4, max_tokens_per_pack=400, optimizer_steps=2,
                  shares_prompts=True)  # fmt: skip
COSTS = Costs(per_token=2e-3, per_position=5e-3, per_prompt_token=1e-4, update=3e-3, reference=1e-3, reward=0.01,
              fixed=0.5)  # fmt: skip
FAST = Link(1e9, 0.0)


def random_groups(count: int, seed: int) -> tuple[Group, ...]:
    """Groups of 4 of uneven lengths."""
    numbers = np.random.default_rng(seed)
    return tuple(Group(int(numbers.integers(5, 50)), tuple(numbers.integers(1, 90, size=4).tolist()))
                 for _ in range(count))  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 3, 7, 40])
def test_shares_equal_the_loop(num_ranks: int) -> None:
    groups = random_groups(6, num_ranks)
    flat = [(g, length) for g, group in enumerate(groups) for length in group.completions]
    tokens, longest, prompts = shares(groups, num_ranks)
    for rank in range(num_ranks):
        mine = [each for n, each in enumerate(flat)
                if len(flat) * rank // num_ranks <= n < len(flat) * (rank + 1) // num_ranks]  # fmt: skip
        assert tokens[rank] == sum(length for _, length in mine)
        assert longest[rank] == max((length for _, length in mine), default=0)
        assert prompts[rank] == sum(groups[g].prompt for g in {g for g, _ in mine})


def test_a_fit_finds_what_made_the_numbers() -> None:
    columns = np.random.default_rng(0).uniform(1, 9, (20, 3))
    assert not_negative_fit(columns, columns @ [2.0, 0.0, 0.5]) == pytest.approx([2.0, 0.0, 0.5], abs=1e-9)
    assert (not_negative_fit(columns, columns @ [2.0, -1.0, 0.5]) >= 0).all()


def recorded(num_ranks: int, setting: Setting = SETTING, count: int = 8) -> list[RecordedStep]:
    """Steps as they would be if the costs were exactly COSTS."""
    steps = []
    for seed in range(count):
        groups = random_groups(12, seed)
        cost, _ = heaviest(groups, num_ranks, setting)
        tokens, longest, prompts = (part.max() for part in shares(groups, num_ranks))
        seconds = {"rollout": 2e-3 * tokens + 5e-3 * longest + 1e-4 * prompts, "update": 3e-3 * cost,
                   "reference": 1e-3 * cost, "reward": 0.01 * 48 / num_ranks}  # fmt: skip
        host = HOST_PER_TOKEN * sum(sum(group.completions) for group in groups)
        steps.append(RecordedStep(groups, seconds | {"step": sum(seconds.values()) + host + 0.5}))
    return steps


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_costs_are_found_again(num_ranks: int) -> None:
    found = fit(recorded(num_ranks), num_ranks, SETTING)
    assert list(vars(found).values()) == pytest.approx(list(vars(COSTS).values()), rel=1e-6)
    with pytest.raises(ValueError, match="at least 3"):
        fit(recorded(num_ranks, count=2), num_ranks, SETTING)


def test_one_rank_takes_the_sum_and_more_ranks_the_slowest() -> None:
    steps = recorded(1, count=3)
    one = predict(COSTS, steps, 12, 1, SETTING, FAST)
    assert one.straggling == pytest.approx(0) and one.seconds["sent"] == 0
    four = predict(COSTS, steps, 12, 4, SETTING, FAST)
    assert one.seconds["rollout"] / 4 < four.seconds["rollout"] < one.seconds["rollout"]
    assert 0 < four.straggling < 1
    assert one.seconds["update"] / 4 <= four.seconds["update"] < one.seconds["update"] / 3
    assert four.step == pytest.approx(sum(four.seconds.values()))
    flat = [RecordedStep((Group(10, (20,) * 4),) * 12, {"step": 1.0})]
    assert predict(COSTS, flat, 12, 4, SETTING, FAST).straggling == pytest.approx(0)


def test_the_slowest_rank_is_the_maximum() -> None:
    groups = (Group(10, (1, 1, 1, 1)), Group(10, (1, 1, 1, 90)))
    seconds = rollout_seconds(COSTS, groups, 2)
    assert seconds.tolist() == pytest.approx([2e-3 * 4 + 5e-3 + 1e-3, 2e-3 * 93 + 5e-3 * 90 + 1e-3])


def test_ranks_that_meet_at_every_pack_wait_for_the_heaviest_of_each_turn() -> None:
    groups = random_groups(40, 1)
    apart, packs = heaviest(groups, 3, SETTING)
    together, same = heaviest(groups, 3, replace(SETTING, zero_stage=2))
    assert packs == same > 1 and together >= apart
    whole = sum(piece_cost(group.prompt, list(group.completions)) for group in groups)
    assert heaviest(groups, 1, replace(SETTING, max_tokens_per_pack=10**6))[0] == pytest.approx(whole)


def test_bytes_of_a_step() -> None:
    groups = (Group(10, (3, 4)), Group(10, (5, 6)))

    def sent(stage: int) -> dict[str, float]:
        setting = replace(SETTING, zero_stage=stage)
        return {each.name: each.passes * each.num_bytes * each.times for each in messages(groups, 3, setting)}

    batch = 18 * 8 + 4 * 40
    assert sent(0) == {"batch": batch, "gradients": 2 * 1200 * 2}
    assert sent(1) == {"batch": batch, "gradients": 2 * 1200 * 2, "stepped weights": 1200 * 2}
    assert sent(2) == {"batch": batch, "gradients": 1200 * 3 * 2, "stepped weights": 1200 * 2}
    assert sent(3) == {"batch": batch, "gradients": 1200 * 3 * 2, "gathered weights": (8000 + 1200) * 3 * 2,
                       "adapters for the copy": 1200}  # fmt: skip


def test_a_message_takes_its_bytes_and_its_start() -> None:
    gradient = Message("gradients", 1e9, passes=2, times=1)
    assert gradient.seconds(1, Link(8, 1.0)) == 0
    assert gradient.seconds(2, Link(8, 0.0)) == pytest.approx(1.0)
    assert gradient.seconds(8, Link(8, 0.0)) == pytest.approx(2 * 7 / 8)
    assert replace(gradient, num_bytes=0, times=5).seconds(8, Link(8, 1e-3)) == pytest.approx(5 * 2 * 3e-3)


# --- a run as it is read ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of six steps leaves behind, as far as it matters here."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "toy"}}))
    (tmp_path / "environment.jsonl").write_text(json.dumps({"ranks": ["a", "a", "b"]}) + "\n")
    (tmp_path / "completions").mkdir()
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    for step in range(1, 7):
        groups = random_groups(4, step)
        rows = [(g, length) for g, group in enumerate(groups) for length in group.completions]
        table = {"group": [g for g, _ in rows], "tokens": [n for _, n in rows], "prompt": ["What is 1 + 1?"] * 16}
        pq.write_table(pa.table(table), tmp_path / "completions" / f"step_{step:06d}.parquet")
        lines.append({"step": step, "time/rollout": 0.3, "time/update": 0.5, "time/step": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_is_read_after_its_first_step(run: Path) -> None:
    steps, num_ranks = read_run(run)
    assert len(steps) == 5 and num_ranks == 3
    assert [group.completions for group in steps[0].groups] == [group.completions for group in random_groups(4, 2)]
    assert len({group.prompt for group in steps[0].groups}) == 1 and steps[0].groups[0].prompt > 3
    assert steps[0].seconds == {"rollout": 0.3, "reward": 0.0, "reference": 0.0, "update": 0.5, "step": 1.0}


def test_what_is_missing_of_a_run_is_named(run: Path, tmp_path: Path) -> None:
    (run / "completions" / "step_000003.parquet").unlink()
    with pytest.raises(ValueError, match=r"step_000003.parquet does not exist; .*log_completions"):
        read_run(run)
    with pytest.raises(ValueError, match=r"--from: .*metrics.jsonl does not exist; expected the train.output_dir"):
        read_run(tmp_path / "nowhere")
    with (run / "environment.jsonl").open("a") as file:
        file.write(json.dumps({"ranks": ["a"]}) + "\n")
    with pytest.raises(ValueError, match="ran on 1 and 3 ranks by turns"):
        read_run(run)


def test_the_verb_prints_strong_and_weak_scaling(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "configs/quickstart.yaml", "--device", "cpu", "--ranks", "1,2", "--from", str(run)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "5 steps of" in told and "1.000 s measured" in told
    assert "Strong scaling, 32 prompts a step" in told and "Weak scaling" in told and "gathered weights" in told
