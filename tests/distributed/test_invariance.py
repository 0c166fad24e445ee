"""Promise 1: the number of ranks and the strategy change neither the tokens that are drawn nor what is learned."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import (
    EVALUATED,
    adapters,
    check_same,
    completions,
    merged_equals_adapter,
    metrics,
    relative_difference,
    train,
)
from safetensors.torch import load_file

from grpo_dist.model.toy import toy_path

SELDOM = [("cpu", 1), ("zero1", 2), ("zero3", 2), ("zero3_offload", 2)]
VARIANTS = [pytest.param("ddp", 2, marks=pytest.mark.quick), ("zero2", 2), ("zero3", 3), ("fsdp2_cpu", 2),
            *(pytest.param(*each, marks=pytest.mark.slow) for each in SELDOM)]  # fmt: skip
COMPARING = '[{name: math}, {name: "tests.distributed.comparing:shortest", weight: 0.5}]'
KL = ("--loss.kl_coeff", "0.04", "--rewards", COMPARING, "--train.num_train_steps", "2")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run all others are compared with: plain Python, one process."""
    return train(None, 1, tmp_path_factory.mktemp("one"), *KL, *EVALUATED)


def learned(directory: Path) -> dict[str, float]:
    """Norm of the learned part: B starts at zero, so it holds nothing but updates."""
    return {name: float(tensor.norm()) for name, tensor in adapters(directory).items() if "lora_B" in name}


@pytest.mark.parametrize(("strategy", "num_processes"), VARIANTS)
def test_same_tokens_and_weights(strategy: str, num_processes: int, one_process: Path, tmp_path: Path) -> None:
    # gathered for each pass, as the policy's are; the plain reference of ZeRO-3 is in test_packs_and_ranks_are_summed
    shared = ("--reference.placement", "shared") if strategy == "zero3" else ()
    other = train(strategy, num_processes, tmp_path / "run", *KL, *EVALUATED, *shared)
    expected, got = completions(one_process), completions(other)
    assert [row["completion"] for row in got] == [row["completion"] for row in expected]
    for name in ("advantage", "reward/math", "reward/shortest"):
        assert [row[name] for row in got] == [row[name] for row in expected], name
    assert all(norm > 0 for norm in learned(one_process).values())
    only_learned = [{n: t for n, t in adapters(d).items() if "lora_B" in n} for d in (one_process, other)]
    assert relative_difference(*only_learned) <= 1e-4
    assert relative_difference(adapters(one_process), adapters(other)) <= 1e-5
    assert merged_equals_adapter(other)
    for a, b in zip(metrics(one_process)[1:], metrics(other)[1:], strict=True):
        for name in ("loss", "kl", "grad_norm", "reward/mean", "entropy"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    for a, b in zip(metrics(one_process), metrics(other), strict=True):
        assert b.get("eval/accuracy") == a.get("eval/accuracy")
    assert {"eval/accuracy", "eval/greedy_accuracy"} <= metrics(other)[-1].keys()


@pytest.mark.parametrize(("strategy", "num_processes"), [(None, 1), pytest.param("ddp", 2, marks=pytest.mark.slow)])
def test_forks_make_the_run_of_fresh_processes(
    strategy: str | None, num_processes: int, one_process: Path, tmp_path: Path
) -> None:
    """Bit for bit. All forks hash strings alike and fresh processes do not: nothing that is computed depends on that.
    CI's fresh ranks are those of the quickstart."""
    words = *KL, *EVALUATED
    fresh = train(strategy, num_processes, tmp_path / "fresh", *words, fresh=True)
    forked = train(strategy, num_processes, tmp_path / "forked", *words) if strategy else one_process
    expected, got = adapters(fresh), adapters(forked)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert completions(fresh) == completions(forked)
    measured = re.compile("time/|memory/|.*second")
    for a, b in zip(metrics(fresh), metrics(forked), strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if not measured.match(k)} == {k: b[k] for k in a if not measured.match(k)}


@pytest.mark.quick
def test_nothing_has_moved_before_the_first_update(one_process: Path) -> None:
    """Promise 4: the ratio is exactly 1 and the KL to the reference 0 before anything was learned."""
    first = metrics(one_process)[1]
    assert first["step"] == 1
    assert first["ratio/mean"] == first["ratio/max"] == 1.0
    assert abs(first["kl"]) < 1e-9
    assert first["rollout/logprob_gap_max"] < 1e-4


@pytest.mark.parametrize(
    ("strategy", "num_processes", "arguments"),
    [
        pytest.param("zero3", 2, ("--reference.placement", "shared"), marks=pytest.mark.slow),
        pytest.param("zero3", 2, ("--model.gradient_checkpointing", "true"), marks=pytest.mark.slow),
        pytest.param(
            "fsdp2",
            3,
            ("--reference.placement", "shared", "--model.gradient_checkpointing", "true"),
            marks=pytest.mark.slow,
        ),
        pytest.param("zero2", 2, ("--train.max_tokens_per_pack", "80"), marks=pytest.mark.slow),
        ("ddp", 2, ("--train.sequence_parallel_size", "2", "--train.max_tokens_per_pack", "80")),
        pytest.param(
            "fsdp2",
            4,
            ("--train.sequence_parallel_size", "2", "--model.gradient_checkpointing", "true"),
            marks=pytest.mark.slow,
        ),
        pytest.param("ddp", 2, ("--model.attn_implementation", "sdpa"), marks=pytest.mark.slow),
        ("zero1", 2, ("--rollout.engine", "paged")),
    ],
)
def test_what_changes_only_speed_and_memory(
    strategy: str, num_processes: int, arguments: tuple[str, ...], one_process: Path, tmp_path: Path
) -> None:
    other = train(strategy, num_processes, tmp_path / "run", *KL, *arguments)
    check_same(one_process, other)


@pytest.mark.parametrize(
    "arguments", [("--loss.objective", "reinforce", "--loss.kl_coeff", "0.01"), ("--train.updates_per_batch", "3")]
)
@pytest.mark.slow
def test_other_objectives(arguments: tuple[str, ...], tmp_path: Path) -> None:
    one = train(None, 1, tmp_path / "one", *arguments)
    three = train("zero3", 3, tmp_path / "three", *arguments)
    check_same(one, three, 1e-5)


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [("fsdp2", 2), *(pytest.param(each, 3, marks=pytest.mark.slow) for each in ("fsdp2", "zero3"))],
)
def test_ranks_change_nothing_where_all_weights_are_trained(strategy: str, num_processes: int, tmp_path: Path) -> None:
    arguments = (*KL, "--lora", "null", "--optim.learning_rate", "1e-4")
    one = train(None, 1, tmp_path / "one", *arguments)
    other = train(strategy, num_processes, tmp_path / "other", *arguments)
    assert [row["completion"] for row in completions(other)] == [row["completion"] for row in completions(one)]
    base = load_file(toy_path() / "model.safetensors")
    learned = [{name: tensor - base[name] for name, tensor in load_file(run / "final" / "model.safetensors").items()}
               for run in (one, other)]  # fmt: skip
    assert all(float(tensor.norm()) > 0 for tensor in learned[0].values())
    assert relative_difference(*learned) <= 1e-3


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param("muon", marks=pytest.mark.slow),
        pytest.param("adamw_8bit", marks=[
            pytest.mark.slow, pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra `quantized`")
        ]),
    ],
)  # fmt: skip
def test_other_optimizers(optimizer: str, tmp_path: Path) -> None:
    one, two = (
        train(*shape, tmp_path / str(shape[1]), "--optim.optimizer", optimizer) for shape in ((None, 1), ("ddp", 2))
    )
    check_same(one, two)


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process whose adapters have dropout."""
    return train(None, 1, tmp_path_factory.mktemp("dropout"), *DROPOUT)


DROPOUT = (*KL, "--lora.dropout", "0.1", "--train.updates_per_batch", "2")


@pytest.mark.parametrize(
    ("strategy", "num_processes", "arguments"),
    [
        ("ddp", 2, ("--train.max_tokens_per_pack", "80", "--model.gradient_checkpointing", "true")),
        pytest.param("zero3", 2, (), marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, (), marks=pytest.mark.slow),
        pytest.param("zero2", 3, ("--model.attn_implementation", "sdpa"), marks=pytest.mark.slow),
    ],
)
def test_dropout(
    strategy: str, num_processes: int, arguments: tuple[str, ...], with_dropout: Path, one_process: Path, tmp_path: Path
) -> None:
    """What adapters drop depends on token and layer, wherever they are computed and beside whatever else."""
    other = train(strategy, num_processes, tmp_path / "run", *DROPOUT, *arguments)
    check_same(with_dropout, other, 1e-5)
    assert relative_difference(adapters(with_dropout), adapters(one_process)) > 1e-3


BFLOAT16 = (*KL, "--model.dtype", "bfloat16", "--reference.dtype", "bfloat16", "--train.num_train_steps", "1",
            "--train.save_every", "1", "--train.max_tokens_per_pack", "80")  # fmt: skip


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of one process in bfloat16, in many packs."""
    return train(None, 1, tmp_path_factory.mktemp("bfloat16"), *BFLOAT16)


@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        ("zero2", 1e-6),
        pytest.param("ddp", 1e-6, marks=pytest.mark.slow),
        pytest.param("zero1", 1e-6, marks=pytest.mark.slow),
        ("zero3", 5e-3),
        ("fsdp2", 1e-6),
    ],
)
def test_packs_and_ranks_are_summed_in_float32(strategy: str, most: float, in_bfloat16: Path, tmp_path: Path) -> None:
    """In bfloat16 each pack's gradient is rounded, their sum is not; ZeRO-3 adds adapters to rounded outputs."""
    other = train(strategy, 2, tmp_path / "run", *BFLOAT16)
    one, two = (
        load_file(directory / "checkpoints" / "step_1" / "state.safetensors") for directory in (in_bfloat16, other)
    )
    means = [{name: t for name, t in state.items() if name.startswith("exp_avg/")} for state in (one, two)]
    assert relative_difference(*means) <= most
