"""Every preset learns, and options that look at the whole batch do not depend on how it is spread over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, adapters, completions, launch, metrics, relative_difference, train, without_its_last_step
from safetensors.torch import load_file

from grpo_dist.config.names import presets

TOKEN_REWARD = '''
def digits(completion_ids, completions, answer, **columns):
    """One number a token, none at every third; and an outcome for some completions."""
    rows = zip(completion_ids, completions, answer)
    steps = lambda ids: [None if t % 3 == 2 else (i % 7) / 7 for t, i in enumerate(ids)]
    return [float(text.strip() == gold) if len(ids) % 2 else steps(ids) for ids, text, gold in rows]
'''
COMPARED = {"loss", "grad_norm", "kl", "kl_coeff", "value/error", "rollout/groups", "importance/mean"}
CASES = {
    "critic": (
        "--preset", "ppo", "--train.num_minibatches", "2", "--loss.entropy_coeff", "0.01", "--rollout.group_size", "3",
    ),
    "dynamic": (
        "--preset", "dapo", "--rollout.group_size", "2", "--loss.mask_truncated", "true",
        "--advantage.drop_zero_variance", "true", "--advantage.overlong_buffer", "12",
        "--data.train_file", "{configs/data/math_tasks_train.jsonl: 1, configs/data/math_tasks_eval.jsonl: 3}",
    ),
    "selective": (
        "--loss.top_entropy_quantile", "0.4", "--loss.ratio_level", "sequence", "--loss.importance_correction", "mask",
        "--loss.importance_level", "sequence", "--loss.kl_target", "0.001", "--loss.aggregation", "prompt_mean",
        "--loss.kl_coeff", "0.04", "--loss.kl_unbiased", "true",
    ),
    "tokens": (
        "--rewards", '[{name: math}, {name: "own:digits", weight: 0.5}]', "--loss.gamma", "0.9",
        "--advantage.several_rewards", "normalise_then_sum",
    ),
}  # fmt: skip


SLOW = pytest.mark.slow
FIRST_STEPS = ("--train.num_train_steps", "12")
"""The first part of the runs that docs/learning_curves.py draws."""
FEW_PROMPTS = ("--train.num_train_steps", "8", "--train.batch_size", "16")


@pytest.mark.parametrize(("name", "steps"), [("ppo", FEW_PROMPTS), *((name, FIRST_STEPS) for name in presets())])
@pytest.mark.slow
def test_each_preset_learns(name: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    """The quickstart of CI trains the default preset each time."""
    done = launch(
        None, 1, "--preset", name, "--config", "configs/quickstart.yaml", *steps, "--optim.scheduler", "constant",
        "--train.eval_every", "0", "--train.save_every", "0", "--train.output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = metrics(tmp_path / "run")
    assert lines[-1]["eval/accuracy"] >= lines[0]["eval/accuracy"] + 0.25
    assert lines[-1]["eval/greedy_accuracy"] >= 0.9


@pytest.mark.slow
def test_groups_without_signal_come_to_have_some(tmp_path: Path) -> None:
    """Written-out addition, where more than half of the groups are all wrong at first."""
    done = launch(
        None, 1, "--config", "configs/carry.yaml", "--train.num_train_steps", "12", "--optim.scheduler", "constant",
        "--loss.kl_coeff", "0", "--train.eval_every", "0", "--train.save_every", "0",
        "--train.output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = metrics(tmp_path / "run")
    without = [line["reward/groups_zero_std"] for line in lines[1:]]
    assert without[0] >= 0.4 and sum(without[4:9]) / 5 <= 0.35
    assert 20 < lines[1]["completion/length_mean"] < lines[-1]["completion/length_mean"] < 85
    assert lines[-1]["eval/accuracy"] >= lines[0]["eval/accuracy"] + 0.25


@pytest.mark.parametrize(
    ("name", "strategy", "ranks"),
    [("critic", "zero3", 2), ("dynamic", "ddp", 2), *(pytest.param(name, "zero3", 3, marks=SLOW) for name in CASES),
     pytest.param("critic", "fsdp2", 3, marks=SLOW)],
)  # fmt: skip
def test_ranks_do_not_matter(
    name: str, strategy: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(TOKEN_REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    options = (*CASES[name], "--train.num_train_steps", "2")
    one = train(None, 1, tmp_path / "one", *options)
    several = train(strategy, ranks, tmp_path / "several", *options)
    assert [row["completion"] for row in completions(several)] == [row["completion"] for row in completions(one)]
    assert [row["reward"] for row in completions(several)] == [row["reward"] for row in completions(one)]
    assert relative_difference(adapters(one), adapters(several)) <= 1e-5
    for a, b in zip(metrics(one)[1:], metrics(several)[1:], strict=True):
        for key in COMPARED & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
    if name == "dynamic":
        assert sum(line["rollout/groups_replaced"] for line in metrics(one)[1:]) > 0
    if name == "critic":
        heads = [load_file(directory / "checkpoints" / "step_2" / "state.safetensors")["weight/value_head.weight"]
                 for directory in (one, several)]  # fmt: skip
        assert float(heads[0].norm()) > 0 and torch.allclose(*heads, rtol=1e-3, atol=1e-6)


def test_a_critic_and_an_adapted_coefficient_resume(tmp_path: Path) -> None:
    """From the checkpoint of two steps of three: bit for bit what it would have been."""
    options = ("--preset", "ppo", "--loss.kl_target", "0.01", "--train.save_every", "1")
    whole = train(None, 1, tmp_path / "whole", *options)
    train(None, 1, without_its_last_step(whole, tmp_path / "parts"), *options)
    expected, got = (load_file(d / "checkpoints" / "step_3" / "state.safetensors") for d in (whole, tmp_path / "parts"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert metrics(whole)[-1]["kl_coeff"] == metrics(tmp_path / "parts")[-1]["kl_coeff"] != 0.01
