"""The entries of a launch config: they may place the work, and they never change what is computed.

`accelerate config` asks for gradient accumulation and mixed precision, and a DeepSpeed file may name batch sizes,
dtypes, an optimizer. Where such an entry contradicts the run's own options, the options win and a line says so. Entries
that would compute something else and cannot be set aside are refused before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.checks import require
from ..config.schema import OptimConfig

DECIDED = {
    "gradient_accumulation_steps": "train.max_tokens_per_pack says how packs are added up",
    "gradient_clipping": "optim.max_grad_norm clips",
    "train_batch_size": "train.batch_size counts the prompts of a step",
    "train_micro_batch_size_per_gpu": "train.max_tokens_per_pack bounds what is computed at once",
    "optimizer": "the options under optim set up AdamW",
    "scheduler": "optim.scheduler and optim.warmup_steps set the learning rate",
    "bf16": "model.dtype decides",
    "fp16": "model.dtype decides",
    "amp": "model.dtype decides",
    "torch_autocast": "model.dtype decides",
    "data_types": "gradients are added up in float32",
    "communication_data_type": "gradients are exchanged in float32",
    "fp32_allreduce": "gradients are exchanged in float32",
    "prescale_gradients": "the loss is scaled by the number of ranks",
    "gradient_predivide_factor": "the loss is scaled by the number of ranks",
    "sparse_gradients": "gradients are dense",
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW",
}
"""DeepSpeed entries that the run overrides, with the reason."""
HARMLESS = {
    "activation_checkpointing", "aio", "checkpoint", "comet", "comms_logger", "csv_monitor", "disable_allgather",
    "dump_state", "flops_profiler", "load_universal_checkpoint", "memory_breakdown", "monitor_config", "nebula",
    "steps_per_print", "tensorboard", "timers", "use_node_local_storage", "wall_clock_breakdown", "wandb",
    "zero_optimization",
}  # fmt: skip
"""DeepSpeed entries that place the work or report on it."""
FSDP_DECIDED = {
    "activation_checkpointing": ("false", "model.gradient_checkpointing decides"),
    "ignored_modules": ("", "all weights are sharded"),
    "reshard_after_forward": ("true", "rollouts need the memory of gathered weights"),
}
"""Entries of fsdp_config with a value that is always used, and the reason."""
LOSSY = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""Entries of zero_optimization that round weights or gradients."""
IN_FILE = {
    "gradient_accumulation_steps", "gradient_clipping", "mixed_precision", "offload_optimizer_device",
    "offload_param_device", "offload_param_nvme_path", "zero3_save_16bit_model", "zero_stage",
}  # fmt: skip
"""Entries of a launch config that Accelerate refuses beside a DeepSpeed file."""
FOREIGN = {
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
"""What Accelerate's launcher sets for engines that this trainer does not support."""
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
"""What Accelerate's launcher sets where ranks have parts of the optimizer's state."""


def require_known_launch(environment: Mapping[str, str]) -> None:
    """Raise ValueError where the launch would change what is computed, or names a file that cannot be used."""
    for variable, entry in FOREIGN.items():
        if asks_for(environment, variable):
            raise ValueError(f"launch config: {entry} given, expected one process, DDP (MULTI_GPU), DEEPSPEED or FSDP: "
                             "see accelerate_configs/")  # fmt: skip
    if asks_for(environment, "ACCELERATE_USE_FSDP"):
        _require_fsdp2(environment)
    if zero_stage(environment) is None:
        return
    _require_memory(environment)
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        _require_known_entries(file, _read(file))
        beside = sorted(IN_FILE & set(environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")))
        if beside:
            raise ValueError(f"launch config: {', '.join(beside)} given beside deepspeed_config_file, expected in "
                             f"{file} alone; take it out of the launch config")  # fmt: skip


def _require_memory(environment: Mapping[str, str]) -> None:
    """Raise ValueError where weights or the optimizer's state would lie on NVMe. Checkpoints have whole tensors, and
    what DeepSpeed has swapped out is an empty one."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    zero = {} if file == "none" else _read(file)["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        given = zero.get(name, {"device": environment.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE")})
        if isinstance(given, dict) and given.get("device") == "nvme":
            raise ValueError(f"launch config: {name} to nvme given, expected none or cpu: checkpoints could not be "
                             "written; accelerate_configs/zero3_offload.yaml uses the memory of the host")  # fmt: skip


def shards_weights(environment: Mapping[str, str]) -> bool:
    """Whether the launch asks for ZeRO-3 or FSDP2. Raises ValueError as `zero_stage` does."""
    return asks_for(environment, "ACCELERATE_USE_FSDP") or zero_stage(environment) == "3"


def zero_stage(environment: Mapping[str, str]) -> str | None:
    """The ZeRO stage that the launch asks for, from 1 to 3; None without DeepSpeed.

    Raises ValueError for another stage, and for a DeepSpeed file that cannot be read.
    """
    if not asks_for(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    # a file without a stage means none, to DeepSpeed
    stage = "auto" if file == "none" else str(_read(file)["zero_optimization"].get("stage", 0))
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if stage == "auto" else stage
    if stage not in ("1", "2", "3"):
        raise ValueError(f"launch config: zero_stage {stage} given, expected 1, 2 or 3: see accelerate_configs/, where "
                         "ddp.yaml divides nothing")  # fmt: skip
    return stage


def asks_for(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a variable of the launcher says yes."""
    return environment.get(variable, "false").lower() in ("true", "1")


def require_optimizer(optim: OptimConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError for an optimizer that is not installed, or that cannot do its work in parts.

    Muon makes a matrix orthogonal and 8-bit moments have a scale for each 256 numbers: on parts of a weight, the result
    would depend on the number of ranks.
    """
    name = optim.optimizer
    if name == "adamw":
        return
    sharding = [kind for variable, kind in SHARDED.items() if asks_for(environment, variable)]
    require(not sharding, "optim.optimizer", name, f"adamw with {' and '.join(sharding)}, or DDP "
            "(accelerate_configs/ddp.yaml): it needs each weight in one piece")  # fmt: skip
    require(name != "adamw_8bit" or importlib.util.find_spec("bitsandbytes") is not None, "optim.optimizer", name,
            "bitsandbytes to be installed: pip install 'grpo_dist[quantized]'")  # fmt: skip


def _require_fsdp2(environment: Mapping[str, str]) -> None:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"launch config: fsdp_version {version} given, expected 2: see accelerate_configs/fsdp2.yaml, "
                         "or run `accelerate to-fsdp2` on your file")  # fmt: skip
    if asks_for(environment, "FSDP_OFFLOAD_PARAMS"):
        raise ValueError("launch config: fsdp_offload_params true given, expected false; for weights in host memory "
                         "use accelerate_configs/zero3_offload.yaml")  # fmt: skip


def set_aside_fsdp(environment: Mapping[str, str]) -> list[str]:
    """A line for each entry of fsdp_config that asks for something else than what is done."""
    given = {name: environment.get(f"FSDP_{name.upper()}", "none").lower() for name in FSDP_DECIDED}
    return [f"launch config: fsdp_{name} {given[name]} is set aside: {reason}"
            for name, (used, reason) in FSDP_DECIDED.items() if given[name] not in ("none", used)]  # fmt: skip


def _read(file: str) -> dict[str, Any]:
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"launch config: deepspeed_config_file {file} cannot be read ({error}); name a JSON file, as "
                         "a path from where the launch starts") from error  # fmt: skip
    if not isinstance(entries, dict) or not isinstance(entries.get("zero_optimization"), dict):
        raise ValueError(f"launch config: {file} has no entry zero_optimization, expected at least "
                         '{"zero_optimization": {"stage": 2}}')  # fmt: skip
    return entries


def _require_known_entries(file: str, entries: Mapping[str, Any]) -> None:
    refused = [name for name, value in entries.items()
               if name not in {*DECIDED, *HARMLESS} and not _is_off(value)]  # fmt: skip
    refused += [f"zero_optimization.{name}" for name in LOSSY if entries["zero_optimization"].get(name)]
    if refused:
        raise ValueError(f"launch config: {file} has {', '.join(refused)}, which would change what is computed; take "
                         "it out")  # fmt: skip


def _is_off(value: Any) -> bool:
    return not value or (isinstance(value, dict) and not value.get("enabled", True))


def settle_deepspeed(entries: dict[str, Any], max_grad_norm: float) -> list[str]:
    """Override in place the entries of a DeepSpeed config that the run decides; returns a line for each entry that
    said something else.

    An entry `auto` is decided by the run or by DeepSpeed's defaults.
    """
    own = {"gradient_accumulation_steps": 1, "gradient_clipping": max_grad_norm, "train_micro_batch_size_per_gpu": 1,
           "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    lines = []
    for name, reason in DECIDED.items():
        given = entries.pop(name, "auto")
        if given not in ("auto", own.get(name)) and not _is_off(given) and not _leaves_open(given):
            lines.append(f"launch config: DeepSpeed's {name} ({json.dumps(given)}) is set aside: {reason}")
    entries |= own
    zero = entries["zero_optimization"]
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]
    return lines


def _leaves_open(given: Any) -> bool:
    return isinstance(given, dict) and given.get("enabled") == "auto"


def set_aside_precision(environment: Mapping[str, str], used: str) -> list[str]:
    """A line where the launch asks for another mixed precision than the one in use (`bf16` or `no`)."""
    given = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if given in ("no", used):  # the default of every launch says no
        return []
    return [f"launch config: mixed_precision {given} is set aside: model.dtype decides ({used} is used)"]
