"""What a launch config says never changes what is computed: it is set aside with a line, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_dist.distributed.launch_config import (
    require_known_launch,
    set_aside_fsdp,
    set_aside_precision,
    settle_deepspeed,
    shards_weights,
    zero_stage,
)

pytestmark = pytest.mark.quick

STAGE = {"zero_optimization": {"stage": 2}}
TYPICAL = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "sub_group_size": 1e9,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 2000, "wall_clock_breakdown": False,
}  # fmt: skip
"""What guides to DeepSpeed have users copy."""


def launched(tmp_path: Path, entries: Any, **more: str) -> dict[str, str]:
    """The environment of a launch with a DeepSpeed file."""
    file = tmp_path / "deepspeed.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), **more}


@pytest.mark.parametrize(
    "entries",
    [STAGE, TYPICAL, STAGE | {"curriculum_learning": {"enabled": False}, "amp": {"enabled": True}},
     STAGE | {"tensorboard": {"enabled": True, "output_path": "x"}}],
)  # fmt: skip
def test_entries_that_change_nothing_are_taken(entries: dict[str, Any], tmp_path: Path) -> None:
    """They are not refused, as one that DeepSpeed alone knows is beside them."""
    require_known_launch({})
    require_known_launch(launched(tmp_path, entries))
    assert zero_stage(launched(tmp_path, entries)) == str(entries["zero_optimization"]["stage"])
    with pytest.raises(ValueError, match="has no_such, which would change what is computed"):
        require_known_launch(launched(tmp_path, entries | {"no_such": True}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (STAGE | {"progressive_layer_drop": {"enabled": True, "theta": 0.5}}, "has progressive_layer_drop, which"),
        (STAGE | {"compression_training": {"weight_quantization": {}}, "no_such": 1},
         "has compression_training, no_such, which"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
         r"zero_optimization\.zero_quantized_gradients"),
        ({"bf16": {"enabled": True}}, "has no entry zero_optimization"),
        ({"zero_optimization": {}}, "zero_stage 0 given, expected 1, 2 or 3"),
        ("{", "cannot be read"),
    ],
)  # fmt: skip
def test_entries_that_change_what_is_computed_are_refused(entries: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"launch config: .*{message}"):
        require_known_launch(launched(tmp_path, entries))


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_nvme_is_refused(name: str, tmp_path: Path) -> None:
    zero = {"zero_optimization": {"stage": 3, name: {"device": "nvme", "nvme_path": "/nvme"}}}
    variable = {f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE": "nvme"}
    for environment in (launched(tmp_path, zero), {"ACCELERATE_USE_DEEPSPEED": "true", **variable}):
        with pytest.raises(ValueError, match=f"launch config: {name} to nvme given, expected none or cpu"):
            require_known_launch(environment)
    zero["zero_optimization"][name] = {"device": "cpu"}
    require_known_launch(launched(tmp_path, zero))


def test_a_file_that_is_missing_or_contradicted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        require_known_launch({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none.json"})
    with pytest.raises(ValueError, match="zero_stage given beside deepspeed_config_file"):
        require_known_launch(launched(tmp_path, STAGE, ACCELERATE_CONFIG_DS_FIELDS="deepspeed_config_file,zero_stage"))


def test_the_stage_is_the_files_or_else_the_variables(tmp_path: Path) -> None:
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    assert zero_stage({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) is None
    assert zero_stage(variables) == "1"
    assert zero_stage(launched(tmp_path, TYPICAL, **variables)) == "3"
    assert zero_stage(launched(tmp_path, {"zero_optimization": {"stage": "auto"}}, **variables)) == "1"
    with pytest.raises(ValueError, match=r"zero_stage 0 given, expected 1, 2 or 3"):
        require_known_launch(variables | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"})


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
"""What the launcher sets for accelerate_configs/fsdp2.yaml, among others."""


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"FSDP_VERSION": "1"}, "fsdp_version 1 given, expected 2"),
     ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true given, expected false")],
)  # fmt: skip
def test_fsdp_is_taken_in_its_second_version_on_one_device(entries: dict[str, str], message: str) -> None:
    require_known_launch(FSDP2)
    with pytest.raises(ValueError, match=f"launch config: {message}"):
        require_known_launch(FSDP2 | entries)


def test_entries_of_fsdp_config_that_the_run_decides_are_set_aside_with_a_line_each() -> None:
    defaults = {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}  # fmt: skip
    assert set_aside_fsdp(FSDP2 | defaults) == []
    others = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true",
              "FSDP_IGNORED_MODULES": "lm_head"}  # fmt: skip
    lines = set_aside_fsdp(FSDP2 | others)
    assert len(lines) == 3 and all("launch config: fsdp_" in line and "is set aside: " in line for line in lines)


def test_weights_are_sharded_by_zero3_and_fsdp2() -> None:
    zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert [shards_weights(zero | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}) for stage in "123"] == [
        False,
        False,
        True,
    ]
    assert shards_weights(FSDP2) and not shards_weights(FSDP2 | {"ACCELERATE_USE_FSDP": "false"})
    assert not shards_weights({}) and not shards_weights(zero)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM"])
def test_engines_the_trainer_does_not_run_under_are_refused(variable: str) -> None:
    with pytest.raises(ValueError, match="expected one process, DDP"):
        require_known_launch({variable: "true"})
    require_known_launch({variable: "false"})


def test_what_the_run_decides_is_set_aside_with_a_line_each() -> None:
    entries = STAGE | {
        "gradient_accumulation_steps": 8, "gradient_clipping": 0.3, "train_batch_size": 64, "bf16": {"enabled": True},
        "optimizer": {"type": "Lamb"}, "scheduler": {"type": "WarmupLR"}, "train_micro_batch_size_per_gpu": 1,
        "communication_data_type": "fp16",
    }  # fmt: skip
    lines = settle_deepspeed(entries, max_grad_norm=0.5)
    assert len(lines) == 7 and all("is set aside" in line for line in lines)
    assert entries == STAGE | {
        "gradient_accumulation_steps": 1, "gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def test_auto_is_filled_in_without_a_line() -> None:
    entries = json.loads(json.dumps(TYPICAL))
    lines = settle_deepspeed(entries, 1.0)
    assert [line.split("'s ")[1].split()[0] for line in lines] == ["optimizer", "scheduler"]
    assert entries["zero_optimization"] == {"stage": 3, "overlap_comm": True, "sub_group_size": 1e9}
    assert settle_deepspeed(STAGE | {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}, 1.0) == []


def test_mixed_precision_is_the_runs() -> None:
    assert set_aside_precision({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16") == []
    assert set_aside_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16") == []
    for given in ("fp16", "fp8", "bf16"):
        (line,) = set_aside_precision({"ACCELERATE_MIXED_PRECISION": given}, "no")
        assert f"mixed_precision {given} is set aside" in line
