"""Tasks of reasoning-gym: rows from its data sets, and answers scored as each data set scores them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.data.rows import load_rows, open_rows
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.reasoning_gym import ReasoningGymReward
from grpo_dist.rewards.scores import Item

SUMS = "reasoning_gym:chain_sum?size=5&max_terms=2&max_digits=1"


def test_without_the_library_an_error_names_the_extra(tmp_path: Path) -> None:
    code = ("import sys; sys.modules['reasoning_gym'] = None\n"
            "from grpo_dist.data.rows import load_rows\nfrom grpo_dist.config.schema import RewardConfig\n"
            "from grpo_dist.rewards.registry import resolve\n"
            f"for use in (lambda: load_rows({SUMS!r}, 'train'), lambda: resolve(RewardConfig('reasoning_gym'))):\n"
            "    try: use()\n    except ValueError as error: print(error)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    messages = done.stdout.splitlines()
    assert len(messages) == 2 and all("pip install 'grpo_dist[reasoning]'" in each for each in messages), messages


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> <answer> 2 </answer></answer>", "2"), ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1 <answer>2</answer>", "1 <answer>2"), (" 3 ", "3"), ("</answer><answer>", "</answer><answer>"),
        ("<answer></answer>", None), ("", None), ("<answer>" * 10**5, "<answer>" * 10**5),
    ],
    ids=range(8),
)  # fmt: skip
def test_the_answer_is_in_the_last_pair_of_tags(text: str, answer: str | None) -> None:
    begun = time.perf_counter()
    assert ReasoningGymReward.read_completion(text) == answer
    assert time.perf_counter() - begun < 3


class TestWithTheLibrary:
    """What needs reasoning-gym."""

    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("reasoning_gym")

    def test_rows_are_the_same_each_time_and_follow_the_options(self) -> None:
        rows = load_rows(SUMS, "train")
        assert rows == load_rows(SUMS, "train") == [open_rows(SUMS, "train")[place] for place in range(5)]
        assert [row.number for row in rows] == [1, 2, 3, 4, 5]
        assert load_rows(f"{SUMS}&seed=3", "train")[0].columns["prompt"] == rows[3].columns["prompt"], "seeds count on"
        columns = rows[0].columns
        assert columns["answer"] == columns["entry"]["answer"] and columns["prompt"] == columns["entry"]["question"]
        assert {row.columns["entry"]["metadata"]["num_digits"] for row in rows} == {1}
        assert load_rows("reasoning_gym:graph_color?size=1", "train")[0].columns["answer"] == "", (
            "any colouring will do"
        )

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("chain_sums", "no data set 'chain_sums' .* near it: chain_sum"),
            ("chain_sum?max_term=2", "'max_term=2' given, expected option=value .* did you mean 'max_terms'"),
            ("chain_sum?size", "'size' given, expected option=value"),
            ("chain_sum?min_terms=3&max_terms=2", "max_terms must be >= min_terms"),
            ("chain_sum?size=many", "'reasoning_gym:chain_sum.size=many'"),
        ],
    )
    def test_a_mistake_is_named(self, path: str, expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            load_rows(f"reasoning_gym:{path}", "train")

    def test_answers_are_scored_by_the_data_set_that_their_prompt_comes_from(self) -> None:
        sums, factors = (load_rows(path, "train")[0].columns for path in
                         (SUMS, "reasoning_gym:prime_factorization?size=1&max_value=12"))  # fmt: skip
        gold, product = sums["answer"], factors["answer"]
        cases = [
            (sums, gold, 1.0), (sums, f" {gold}.\n", 1.0),
            (sums, f"<answer>9 9</answer> no, <answer> {gold} </answer>", 1.0),
            (sums, f"it is {gold}", len(gold) / len(f"it is {gold}")), (sums, "no idea", 0.0), (sums, " ", 0.0),
            (sums, ".", 0.0), (factors, product, 1.0), (factors, "no idea", 0.0),
        ]  # fmt: skip
        with ScorerPool([RewardConfig("reasoning_gym")], ScoringConfig(num_workers=1)) as pool:
            scores = pool.score([Item("?", text, [], columns) for columns, text, _ in cases])
        assert not scores.failed.any(), scores.failures
        assert scores.values[:, 0].tolist() == pytest.approx([score for *_, score in cases])
        assert scores.metrics["reasoning_gym/unreadable"][0] == 1, "the text that is no product"

    def test_rows_of_a_file_are_scored_by_the_data_set_that_the_config_names(self) -> None:
        row = load_rows(SUMS, "train")[0].columns
        scored = ReasoningGymReward("chain_sum")([row["prompt"]], [row["answer"]], answer=[row["answer"]])
        assert scored == [1.0]
        with pytest.raises(ValueError, match="no column `entry`"):
            ReasoningGymReward()([row["prompt"]], [row["answer"]], answer=[row["answer"]])
        with pytest.raises(ValueError, match="near it: chain_sum"):
            ReasoningGymReward("chain_sums")

    @pytest.mark.parametrize(("name", "expected"), [
        ("sudoku", r"raises KeyError\(.*\) for its answer"), ("sokoban", "gives 0 to its answer .*, expected 1"),
        ("rubiks_cube", r"raises KeyError"), ("quantum_lock", r"raises KeyError"),
    ])  # fmt: skip
    def test_a_row_that_lacks_what_its_data_set_reads_is_no_wrong_answer(self, name: str, expected: str) -> None:
        """Every completion would score 0."""
        row = load_rows(f"reasoning_gym:{name}?size=1", "train")[0].columns
        with pytest.raises(ValueError, match=f"the data set {name} cannot score the row .*{expected}"):
            ReasoningGymReward(name)([row["prompt"]], ["abc"], answer=[row["answer"]])
        assert ReasoningGymReward()([row["prompt"]], ["abc"], entry=[row["entry"]])[0] < 1

    def test_a_damaged_entry_is_no_wrong_answer(self) -> None:
        row = load_rows("reasoning_gym:calendar_arithmetic?size=1", "train")[0].columns
        damaged = {**row["entry"], "metadata": {"source_dataset": "calendar_arithmetic", "difficulty": {}}}
        with pytest.raises(ValueError, match="cannot score the row"):
            ReasoningGymReward()([row["prompt"]], ["abc"], entry=[damaged])

    @pytest.mark.parametrize("error", [MemoryError, ImportError, OSError])
    def test_what_the_machine_lacks_is_no_wrong_answer(self, error: type[Exception]) -> None:
        def score(answer: str, entry: object) -> float:
            raise error

        row = load_rows(SUMS, "train")[0].columns
        reward = ReasoningGymReward()
        reward._scoring = lambda name: score
        with pytest.raises(error):
            reward([row["prompt"]], ["abc"], entry=[row["entry"]])
