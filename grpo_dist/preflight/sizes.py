"""Counts of a step (completions, packs, updates), the size of the model, and the memory of a rank."""

from __future__ import annotations

import os

import psutil
import torch

from ..config.schema import Config
from ..distributed.device import resolve_dtype, slow_here
from ..distributed.launch_config import asks_for, zero_stage
from ..model.checks import bitsandbytes_config, stored_quantization
from ..model.files import dequantized_form, kind_of, require_unsharded
from ..model.load import attention_for
from ..model.reference import doubt_of_copy
from ..planning.memory import RESERVE, SHARDS_WEIGHTS, MemoryInputs, ModelCounts, Strategy, memory_per_rank, peaks
from ..planning.predict import Predictor, batch_arithmetic
from .contents import Contents
from .findings import Findings

OF_MODELS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""Errors of models' own code."""


def describe_steps(config: Config, contents: Contents, num_ranks: int, findings: Findings) -> None:
    """Note the work of a step and the number of epochs."""
    train = config.train
    counts = batch_arithmetic(config, num_ranks, _shares_prompts(config, contents))
    findings.results["steps"] = lines = [
        f"{train.batch_size} prompts × {config.rollout.group_size} = {counts.completions} completions, up to "
        f"{counts.completions_per_rank} on each of {num_ranks} rank(s)",
        f"if all sequences had full length: {counts.packs_per_rank} pack(s) on each rank, of up to "
        f"{counts.largest_pack_tokens} tokens",
        f"{counts.optimizer_steps} update(s) a step, {counts.optimizer_steps * train.num_train_steps} in all",
    ]
    if counts.completions < num_ranks:
        findings.remarks.append(f"{counts.completions} completions a step cannot keep {num_ranks} ranks busy: raise "
                                "train.batch_size")  # fmt: skip
    if contents.prompts:
        epochs = train.num_train_steps * train.batch_size / len(contents.prompts)
        lines.append(f"{train.num_train_steps} steps: {epochs:.2f} epochs of {len(contents.prompts)} prompts")
        if train.batch_size > len(contents.prompts):
            findings.remarks.append(f"train.batch_size: {train.batch_size} prompts a step, but the data has only "
                                    f"{len(contents.prompts)}: some prompts come more than once in a step")  # fmt: skip


def _shares_prompts(config: Config, contents: Contents) -> bool:
    """Whether a pack has each prompt once; taken for granted of a model whose config or code is of no use, about which
    others speak."""
    if contents.model_config is None:
        return True
    try:
        return attention_for(config.model, contents.model_config, config.max_sequence_length)[1] is None
    except OF_MODELS:
        return True


def describe_memory(config: Config, contents: Contents, num_ranks: int, findings: Findings) -> ModelCounts | None:
    """Note the size of the model and the peak memory of a rank, and whether it fits. Returns the sizes."""
    if contents.model_config is None:
        return None
    if slow := slow_here(resolve_dtype(config.model.dtype)):
        findings.remarks.append(slow)
    on_gpu = torch.cuda.is_available()
    strategy: Strategy | None = None
    with findings.attempt():
        strategy = strategy_of_launch(num_ranks)
        kind = kind_of(config.model, bitsandbytes_config(contents.model_config))
        require_unsharded(kind is not None, strategy in SHARDS_WEIGHTS)
    if strategy is None:
        return None
    try:
        most_bytes = int(_gpu_bytes() * (1 - RESERVE)) if on_gpu else None
        predictor = Predictor(config, contents.model_config, "gpu" if on_gpu else "cpu", most_bytes)
        inputs = predictor.inputs(num_ranks, strategy)
    except OF_MODELS as error:
        if str(error) not in findings.problems:
            findings.remarks.append(f"memory and disk space cannot be predicted for {config.model.name}: {error}")
        return None
    if inputs.copy_bytes and (rounded := doubt_of_copy(predictor.policy_dtype, predictor.copy_dtype)):
        findings.remarks.append(rounded)
    counts = inputs.counts
    trained = counts.adapters or counts.parameters
    stored = f", {counts.quantized / 1e6:,.2f} M of them in {predictor.quantization}" if counts.quantized else ""
    if form := dequantized_form(stored_quantization(contents.model_config)):
        stored += f", dequantised from {form} when loaded"
    findings.results["model"] = [f"{config.model.name}: {counts.parameters / 1e6:,.2f} M parameters{stored}, "
                                 f"{trained / 1e6:,.2f} M trained"]  # fmt: skip
    _compare(config, inputs, on_gpu, findings)
    if (line := predictor.describe_servers()) is not None:
        findings.results["memory"].append(line)
    return counts


def _compare(config: Config, inputs: MemoryInputs, on_gpu: bool, findings: Findings) -> None:
    """Note the memory that a rank needs and has."""
    phase, needed = max(peaks(memory_per_rank(inputs)).items(), key=lambda each: each[1])
    if on_gpu:
        room = _gpu_bytes()
    else:
        room = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", inputs.num_ranks))
    strategy = "one process" if (inputs.strategy, inputs.num_ranks) == ("DDP", 1) else inputs.strategy
    memory = (f"{gib(needed)} of tensors on each rank at the peak, in the phase {phase}, with {strategy}; a rank has "
              f"{gib(room)}")  # fmt: skip
    findings.results["memory"] = [memory]
    if needed > room:
        findings.problems.append(
            f"memory: {memory}. Lower train.max_tokens_per_pack (now {config.train.max_tokens_per_pack}) or "
            f"rollout.max_tokens_in_flight (now {config.rollout.max_tokens_in_flight}), turn on "
            "model.gradient_checkpointing, or use a higher ZeRO stage or FSDP2; `python -m grpo_dist plan` shows every "
            "part"
        )


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def strategy_of_launch(num_ranks: int) -> Strategy:
    """The strategy of the launcher. Without a launcher: that of launch/single_node.sh. Raises ValueError for a launch
    that cannot be."""
    if (stage := zero_stage(os.environ)) is not None:
        return f"ZeRO-{stage}"  # type: ignore[return-value]
    if num_ranks == 1:
        return "DDP"
    if "WORLD_SIZE" not in os.environ:
        return "ZeRO-2"
    return "FSDP2" if asks_for(os.environ, "ACCELERATE_USE_FSDP") else "DDP"


def gib(num_bytes: float) -> str:
    """Return bytes in GiB."""
    return f"{num_bytes / 2**30:,.2f} GiB"
