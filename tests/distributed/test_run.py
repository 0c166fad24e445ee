"""What a run leaves behind, a user's own data and reward, and the recipe's own snippet."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from launching import EVALUATED, ROOT, TINY, adapters, completions, launch, merged_equals_adapter, metrics, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

METRICS = """
step epoch reward/mean reward/std reward/math/mean reward/groups_zero_std reward/unscored advantage/abs_mean
loss loss/policy kl entropy ratio/mean ratio/max clip/low clip/high grad_norm learning_rate completion/length_mean
completion/length_max completion/truncated tokens/completion tokens/computed tokens/useful_share
rollout/logprob_gap_max rollout/tokens_per_second time/rollout time/reward time/reference time/update time/sync
time/step memory/peak_gib
""".split()  # noqa: SIM905

OWN_REWARD = '''
import os
def shortness(prompts, completions, completion_ids, hint, **columns):
    """Reads a column of the data; does not apply to empty completions."""
    assert "answer" in columns and len(prompts) == len(hint)
    rows = zip(completions, completion_ids, hint)
    return [None if not text else 1.0 / len(ids) + (text.strip() == h) for text, ids, h in rows]
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under ZeRO-2 on two ranks, with evaluation."""
    return train("zero2", 2, tmp_path_factory.mktemp("recipe") / "checkpoints", *EVALUATED, "--train.eval_every", "2",
                 "--logging.show_completions_every", "2", "--logging.profile_step", "2")  # fmt: skip


def test_every_step_has_its_metrics(recipe: Path) -> None:
    lines = metrics(recipe)
    assert [line["step"] for line in lines] == list(range(4))
    for line in lines[1:]:
        assert set(METRICS) <= line.keys()
        assert line["tokens/useful_share"] >= 0.95
    for line in (lines[0], lines[2], lines[3]):
        assert 0 <= line["eval/accuracy"] <= 1 and 0 <= line["eval/greedy_accuracy"] <= 1


def test_a_run_leaves_its_config_records_and_report(recipe: Path) -> None:
    assert (recipe / "config.yaml").is_file() and (recipe / "report.html").is_file()
    (start,) = map(json.loads, (recipe / "environment.jsonl").read_text().splitlines())
    assert (start["engine"], len(start["ranks"]), start["first_step"]) == ("DeepSpeed ZeRO-2", 2, 0)
    assert list((recipe / "tensorboard").rglob("events.out.*"))
    events = EventAccumulator(str(recipe / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0}).Reload()
    for name in ("reward/distribution", "advantage/distribution", "completion/lengths"):
        assert [each.histogram_value.num for each in events.Histograms(name)] == [7 * 5] * 3
    for name in ("completions/sample/text_summary", "completions/answers/text_summary"):
        assert [each.step for each in events.Tensors(name)] == [2]
    rows = completions(recipe)
    assert len(rows) == 3 * 7 * 5
    assert {"step", "prompt", "completion", "reward", "advantage", "reward/math"} <= rows[0].keys()
    for step in range(1, 4):
        for group in range(7):
            advantages = [row["advantage"] for row in rows if row["step"] == step and row["group"] == group]
            assert len(advantages) == 5 and abs(sum(advantages)) < 1e-6


def test_each_rank_writes_a_profile_of_the_step(recipe: Path) -> None:
    for rank in range(2):
        (file,) = (recipe / "profile").glob(f"*_rank_{rank}.json.gz")
        assert file.name.startswith("step_2_")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        spans = {event["name"]: event["ts"] for event in events if event.get("cat") == "user_annotation"}
        assert {"rollout", "reward", "update", "sync"} <= spans.keys() and spans["rollout"] < spans["update"]
        assert any(event["name"] == "aten::mm" and event["ts"] > spans["update"] for event in events)


def test_the_recipes_snippet(recipe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(recipe / "final")
    tokenizer = AutoTokenizer.from_pretrained(recipe / "final")
    prompt = "What is 12 - 7? Answer with an integer."
    inputs = tokenizer(prompt, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(outputs[0], skip_special_tokens=True).removeprefix(prompt).strip()[-1].isdigit()


def test_merged_model_equals_adapter(recipe: Path) -> None:
    assert merged_equals_adapter(recipe)
    assert all(float(tensor.norm()) > 0 for tensor in adapters(recipe).values())


def test_own_data_and_reward(tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    rows = [{"question": f"What is {a} + 1? Answer with an integer.", "gold": str(a + 1), "hint": str(a + 1)}
            for a in range(9)]  # fmt: skip
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    rewards = json.dumps(
        [{"name": "own_reward:shortness", "weight": 0.5}, {"name": "math", "args": {"correct_reward": 2}}]
    )
    done = launch(
        "ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"), "--train.num_train_steps", "2",
        "--data.train_file", str(data), "--data.eval_file", "null", "--data.prompt_column", "question",
        "--data.answer_column", "gold", "--rewards", rewards, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = completions(tmp_path / "run")
    assert all(row["reward"] == pytest.approx(0.5 * row["reward/shortness"] + row["reward/math"]) for row in rows)
    assert {row["reward/math"] for row in rows} <= {0.0, 2.0}


def test_a_run_goes_on_decoding_as_it_did(tmp_path: Path) -> None:
    """Begun without a compiler, it does not take to the kernel when there is one: the rest would round otherwise."""
    told = []
    for steps, environment in ((1, {"CXX": "false"}), (2, {})):
        done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"), "--train.num_train_steps",
                      str(steps), "--train.save_every", "1", environment=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        told.append(done.stderr + done.stdout)
    assert "decoding in few operations, which is slower than decoding in C++ (false " in told[0]
    assert "resumed from" in told[1] and "decoding in few operations" in told[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--data.train_file", "no/such.jsonl"), "no/such.jsonl"),
        (("--rewards", "[{name: maths}]"), "math"),
        (("--data.max_prompt_length", "3"), "line 1"),
        (("--rollout.group_size", "1"), "rollout.group_size"),
    ],
)
def test_a_users_mistake_ends_in_a_message(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
