"""From a policy to what others load: the merged model, the adapter, and a check of what was written by reopening it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from .distributed import unsharded_loading, whole
from .models import adapted_layers, plain_name
from .policy import Policy

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that servers ask for of a model that takes more than text; training changes none of them."""
MAX_SHARD_SIZE = "5GB"
"""Larger models are written as several files of at most this size, with an index."""


@torch.no_grad()
def merged_state(policy: Policy, keep: bool) -> dict[str, Tensor]:
    """The trained model's whole weights by the plain model's names, on the CPU; collected one layer at a time.

    Merged in float32, then rounded to the policy's dtype. A collective under ZeRO-3; ranks that do not `keep` the
    result get an empty one.
    """
    layers = adapted_layers(policy) if isinstance(policy.model, PeftModel) else {}
    stored = set(policy.causal_lm.state_dict())
    state: dict[str, Tensor] = {}
    for name, parameter in policy.causal_lm.named_parameters():
        if ".lora_" in name:
            continue
        key = plain_name(name)
        layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        with whole([parameter, *(layer.parameters() if layer else ())]):
            if keep:
                value = parameter.float() + layer.get_delta_weight("default").float() if layer else parameter
                state[key] = value.to(parameter.dtype).cpu().clone()
    if keep:
        state |= {plain_name(name): buffer.cpu().clone() for name, buffer in policy.causal_lm.named_buffers()
                  if name in stored}  # fmt: skip
    return state


def adapter_state(policy: Policy, keep: bool) -> dict[str, Tensor]:
    """The adapters' whole weights by their names, on the CPU; a collective as `merged_state` is."""
    adapters = {name: p for name, p in policy.model.named_parameters() if ".lora_" in name}
    with whole(list(adapters.values())):
        return {name: p.detach().cpu().clone() for name, p in adapters.items()} if keep else {}


def save_final(policy: Policy, tokenizer: Any, directory: Path, is_main: bool) -> None:
    """Write the merged model and the tokenizer, and the adapter beside it; then reopen and check what was written.

    A collective under ZeRO-3.
    """
    state, adapters = merged_state(policy, is_main), adapter_state(policy, is_main)
    if is_main:
        write_merged(policy, state, tokenizer, directory)
        if isinstance(policy.model, PeftModel):
            write_adapter(policy.model, adapters, directory / "adapter")


def write_merged(
    policy: Policy, state: dict[str, Tensor], tokenizer: Any, directory: Path, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write a plain model of these weights, with its tokenizer, and check the files. Raises RuntimeError."""
    with unsharded_loading(), torch.device("meta"):
        plain = type(policy.causal_lm)._from_config(policy.causal_lm.config, dtype=next(iter(state.values())).dtype)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    if missing:
        raise RuntimeError(f"the merged model lacks {len(missing)} weights, among them {missing[:3]}")
    plain.generation_config = policy.causal_lm.generation_config
    plain.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    for name in PROCESSORS:
        given = cached_file(policy.causal_lm.name_or_path, name, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if given is not None:
            shutil.copyfile(given, directory / name)
    # the same weights may be named and grouped otherwise in files than in memory; tied ones are written once
    expected = _size_and_norm({tensor.data_ptr(): tensor for tensor in plain.state_dict().values()}.values())
    written = _size_and_norm(_tensors(directory))
    if expected[0] != written[0] or not math.isclose(expected[1], written[1], rel_tol=1e-9):
        raise RuntimeError(f"{directory}: the files hold {written[0]} numbers of norm {written[1]}, the model in "
                           f"memory {expected[0]} of norm {expected[1]}")  # fmt: skip


def write_adapter(model: PeftModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write a PEFT adapter and reopen it: under ZeRO-3 they have been known to come out empty. Raises RuntimeError."""
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    written = load_file(directory / "adapter_model.safetensors")
    if len(written) != len(state):
        raise RuntimeError(f"{directory}: {len(written)} tensors were written, {len(state)} expected")
    for name, value in state.items():
        key = name.replace(".default.", ".")
        if key not in written or not torch.equal(written[key], value):
            raise RuntimeError(f"{directory}: the tensor {key} differs from the one in memory")


def _tensors(directory: Path) -> Iterable[Tensor]:
    """Every tensor of a saved model, one at a time."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                yield tensors.get_tensor(name)


def _size_and_norm(tensors: Iterable[Tensor]) -> tuple[int, float]:
    """How many numbers there are, and their norm."""
    count, squares = 0, 0.0
    for tensor in tensors:
        count, squares = count + tensor.numel(), squares + float(tensor.double().pow(2).sum())
    return count, math.sqrt(squares)
