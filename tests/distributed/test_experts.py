"""A mixture of experts: routes travel with the rows, so that ranks, strategies and interruptions change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, TINY, adapters, check_same, completions, launch, metrics, train
from small_experts import make_experts

REWARDS = "[{name: 'tests.distributed.comparing:different_characters'}]"
OPTIONS = ("--data.max_prompt_length", "64", "--loss.kl_coeff", "0.04", "--train.updates_per_batch", "2",
           "--train.num_train_steps", "3", "--rewards", REWARDS, "--train.max_tokens_per_pack", "300",
           "--rollout.max_completion_length", "8", "--optim.learning_rate", "1e-3")  # fmt: skip

ON_EXPERTS = ("--lora.target_parameters", "[experts.gate_up_proj, experts.down_proj]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3-MoE."""
    return make_experts(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def one_process(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run all others are compared with."""
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", "--model.name", model, *OPTIONS)


def test_the_first_update_has_a_ratio_of_1(one_process: Path) -> None:
    first, *later = metrics(one_process)[1:]
    assert first["rollout/router_agreement"] == 1 and abs(first["rollout/kl"]) < 1e-9
    assert all(line["rollout/router_agreement"] > 0.99 for line in later)


def test_the_old_policy_takes_the_same_experts(model: str, tmp_path: Path) -> None:
    """Where a pass of its own computes the old policy, the first update's ratio is 1, without rounding."""
    reward = ("--loss.kl_in", "reward", "--train.updates_per_batch", "1", "--train.num_train_steps", "1")
    _, first = metrics(train(None, 1, tmp_path / "run", "--model.name", model, *OPTIONS, *reward))
    assert first["ratio/mean"] == first["ratio/max"] == 1 and first["rollout/router_agreement"] == 1


@pytest.mark.parametrize(
    ("strategy", "num_processes", "arguments"),
    [
        ("zero2", 2, ()),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("ddp", 2, ()),
                ("zero3", 2, ("--reference.placement", "shared")),
                ("fsdp2", 2, ("--model.gradient_checkpointing", "true")),
                ("ddp", 2, ("--train.sequence_parallel_size", "2")),
            ]
        ),
    ],
)
def test_ranks_change_nothing(
    strategy: str, num_processes: int, arguments: tuple[str, ...], model: str, one_process: Path, tmp_path: Path
) -> None:
    other = train(strategy, num_processes, tmp_path / "run", "--model.name", model, *OPTIONS, *arguments)
    check_same(one_process, other)
    assert [line["rollout/router_agreement"] for line in metrics(other)[1:]] == pytest.approx(
        [line["rollout/router_agreement"] for line in metrics(one_process)[1:]], abs=1e-3)  # fmt: skip


@pytest.mark.slow
def test_ranks_that_share_a_pack_have_the_sinks_of_their_heads(tmp_path: Path) -> None:
    """And windows that are shorter than the rows: gpt-oss."""
    model = make_experts(tmp_path / "model", "gpt_oss", sliding_window=8)
    options = ("--model.name", model, *OPTIONS, "--train.num_train_steps", "2")
    one = train(None, 1, tmp_path / "one", *options)
    two = train("ddp", 2, tmp_path / "two", *options, "--train.sequence_parallel_size", "2")
    check_same(one, two)


@pytest.fixture(scope="module")
def on_experts(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one process with adapters on experts, and one that goes on from its adapter."""
    one = train(None, 1, tmp_path_factory.mktemp("one") / "run", "--model.name", model, *OPTIONS, *ON_EXPERTS)
    adapter = str(one / "final" / "adapter")
    return one, train(None, 1, tmp_path_factory.mktemp("next") / "run", "--model.name", adapter, *OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["lora.target_parameters", "model.name", "lora.init_from"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2_cpu"])
def test_adapters_on_experts(
    strategy: str, names: str, model: str, on_experts: tuple[Path, Path], tmp_path: Path
) -> None:
    """New ones, and those that a run goes on from; ZeRO-3 here shards every weight, however small."""
    one, going_on = on_experts
    adapter = str(one / "final" / "adapter")
    given = {
        "lora.target_parameters": ("--model.name", model, *ON_EXPERTS), "model.name": ("--model.name", adapter),
        "lora.init_from": ("--model.name", model, "--lora.init_from", adapter),
    }[names]  # fmt: skip
    launch_config = strategy if strategy != "zero3" else sharding_all(tmp_path)
    expected = one if names == "lora.target_parameters" else going_on
    two = train(launch_config, 2, tmp_path / "two", *given, *OPTIONS)
    check_same(expected, two)


def sharding_all(folder: Path) -> str:
    """A launch config of ZeRO-3 that has no weights on every rank; by default, small ones stay in full."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    entries = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    del entries["mixed_precision"]
    entries["deepspeed_config"] = {
        "deepspeed_multinode_launcher": "standard", "deepspeed_config_file": str(folder / "zero.json"),
        "zero3_init_flag": True,
    }  # fmt: skip
    (folder / "zero3.yaml").write_text(yaml.safe_dump(entries))
    return str(folder / "zero3")


@pytest.mark.slow
def test_stopped_with_routes_in_flight(model: str, tmp_path: Path) -> None:
    """Between the two updates of a step, when a batch is kept, and the next one is drawn already."""
    options = ("--model.name", model, *OPTIONS, "--rollout.lag", "1")
    one, run = train(None, 1, tmp_path / "one", *options), tmp_path / "run"
    stopped = launch(None, 1, *TINY, *options, "--train.output_dir", str(run), program=["tests/fault/faulty.py"],
                     environment={"PYTHONPATH": str(ROOT), "FAULT": "usr1@update:4"})  # fmt: skip
    assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped.stderr[-4000:]
    again = train(None, 1, run, *options)
    assert [row["completion"] for row in completions(again)] == [row["completion"] for row in completions(one)]
    assert all(torch.equal(adapters(one)[name], tensor) for name, tensor in adapters(again).items())
