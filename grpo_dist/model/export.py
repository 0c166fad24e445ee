"""Export a policy as a merged model or an adapter, and check the written files by reopening them."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from ..distributed.deepspeed import name_device, unsharded_loading
from ..distributed.device import dtype_name
from ..distributed.sharding import gathered
from .dequantization import form_of
from .expert_adapters import adapted_weight, delta_weight
from .load import adapted_layers, plain_name
from .peft import ADAPTER, PeftModel
from .policy import Policy
from .quantized import quantized_layers

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that servers need for a model with inputs other than text. Training changes none of them."""
MAX_SHARD_SIZE = "5GB"
"""Most bytes of one weight file. Larger models have several files and an index."""
ENOUGH = 0.99
"""Share of the update that merged weights must keep."""


@torch.no_grad()
def kept_shares(policy: Policy, dtypes: Sequence[torch.dtype], keep: bool) -> list[float | None]:
    """Share of the adapters' update that merged weights keep in each of some dtypes: 1 - |R|² / |ΔW|² with
    ΔW = scaling · B A and R the rounding error of W + ΔW; 0 if |R| is larger.

    Rounding errors of both signs count. None without adapters, while the adapters are zero, and on ranks that do not
    `keep` the result. A collective if weights are sharded.
    """
    rounding, total = [0.0] * len(dtypes), 0.0
    for layer in adapted_layers(policy).values():
        with gathered(list(layer.parameters())):
            if keep:
                weight, update = adapted_weight(layer), delta_weight(layer)
                exact = weight.double() + update
                total += float(update.double().square().sum())
                for place, dtype in enumerate(dtypes):
                    written = _merged(weight, update).to(_dtype_in_file(policy.causal_lm, weight, dtype))
                    rounding[place] += float((written - exact).square().sum())
    return [max(0.0, 1 - each / total) if total else None for each in rounding]


def choose_dtype(policy: Policy, keep: bool, asked: torch.dtype | None = None) -> tuple[torch.dtype, str]:
    """The dtype of merged weights, and a line about the share that it keeps. The dtype is `asked`, else the policy's if
    that keeps enough of the update, else float32. A collective if weights are sharded."""
    own = asked or policy.causal_lm.dtype
    share, share_in_float32 = kept_shares(policy, [own, torch.float32], keep)
    if share is None:
        return own, f"weights in {dtype_name(own)}"
    shares = {torch.float32: share_in_float32, own: share}
    chosen = own if asked or share >= ENOUGH else torch.float32
    merged = f"weights in {dtype_name(chosen)}" + _base(policy.causal_lm)
    line = f"{merged}, which keep {shares.pop(chosen):.1%} of what the adapters have learned"
    others = "".join(f" ({dtype_name(other)}: {kept:.1%})" for other, kept in shares.items())
    return chosen, line + others if share < ENOUGH else line


def _base(model: nn.Module) -> str:
    """What a line says about the base that adapters are merged into, where it was quantised."""
    if (form := form_of(model)) is not None:
        return f" (the base dequantised from {form})"
    return " (the base dequantised)" if quantized_layers(model) else ""


def _merged(weight: Tensor, update: Tensor) -> Tensor:
    """W + ΔW in float32."""
    return weight.float() + update


def _dtype_in_file(model: nn.Module, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or the parameter's own dtype if it differs from that of the model."""
    return dtype if parameter.dtype == model.dtype else parameter.dtype


def merged_state(policy: Policy, keep: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of the trained model by the plain model's names, on the CPU. One layer is gathered at a time.

    Weights are merged in float32 and rounded to `dtype`. Parameters whose dtype differs from that of the model keep it.
    A quantised base is dequantised: its values are those that the adapters were trained on. A collective if weights are
    sharded. Ranks that do not `keep` the result get an empty dict.
    """
    return _state(policy.causal_lm, adapted_layers(policy), keep, dtype)


def base_state(model: nn.Module, keep: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a transformers model without the adapters in it, dequantised, as `merged_state` has them."""
    return _state(model, {}, keep, dtype)


@torch.no_grad()
def _state(model: nn.Module, layers: Mapping[str, Any], keep: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model with the adapters of `layers` merged into them."""
    quantized, stored = quantized_layers(model), set(model.state_dict())
    state: dict[str, Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        if ".lora_" in name or not parameter.is_floating_point():
            continue
        key = plain_name(name)
        layer = layers.get(key.removesuffix(".weight"))
        with gathered([parameter, *(layer.parameters() if layer else ())]):
            if keep:
                parameter = model.get_parameter(name)
                value = _merged(parameter, delta_weight(layer)) if layer else parameter
                state[key] = value.to(_dtype_in_file(model, parameter, dtype)).cpu().clone()
    for name, base in quantized.items() if keep else ():
        key = plain_name(f"{name}.weight")
        layer, value = layers.get(key.removesuffix(".weight")), base.weight
        value = (_merged(value, delta_weight(layer)) if layer else value).to(dtype).cpu()
        state[key] = value.T.contiguous() if base.is_transposed else value
    if keep:
        state |= {plain_name(name): buffer.cpu().clone() for name, buffer in model.named_buffers() if name in stored}
    return state


def adapter_state(policy: Policy, keep: bool) -> dict[str, Tensor]:
    """All weights of the adapters by their names, on the CPU. A collective like `merged_state`."""
    names = [name for name, _ in policy.model.named_parameters() if ".lora_" in name]
    with gathered([policy.model.get_parameter(name) for name in names]):
        full = {name: policy.model.get_parameter(name) for name in names}
        return {name: p.detach().cpu().clone() for name, p in full.items()} if keep else {}


def save_final(policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: Path, is_main: bool) -> None:
    """Write the merged model, the tokenizer and the adapter, then reopen and check the files.

    A collective if weights are sharded.
    """
    dtype, line = choose_dtype(policy, is_main)
    log.info("%s: %s", directory, line)
    state, adapters = merged_state(policy, is_main, dtype), adapter_state(policy, is_main)
    if is_main:
        write_merged(policy.causal_lm, state, tokenizer, directory)
        if isinstance(policy.model, PeftModel):
            write_adapter(policy.model, adapters, directory / "adapter")


def write_merged(
    model: nn.Module, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None, directory: Path,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:  # fmt: skip
    """Write a plain model like `model` of these weights, with its tokenizer if given, and check the files. Raises
    RuntimeError."""
    with unsharded_loading(), torch.device("meta"):
        plain = model._from_config(model.config, dtype=next(iter(state.values())).dtype)
    plain.load_state_dict(_by_all_names(state, plain), strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    if missing:
        raise RuntimeError(f"the merged model lacks {len(missing)} weights, among them {missing[:3]}")
    plain.generation_config = GenerationConfig()
    name_device()
    plain.save_pretrained(directory, max_shard_size=max_shard_size)
    if plain.can_generate():
        # not by save_pretrained: it refuses what published files have, such as a temperature with do_sample: false;
        # older releases of transformers in every file, newer ones in those that were changed
        model.generation_config.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for name in PROCESSORS:
        given = cached_file(model.name_or_path, name, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if given is not None:
            shutil.copyfile(given, directory / name)
    # files may name and group the weights differently than memory does; tied weights are written once
    expected = _size_and_norm({tensor.data_ptr(): tensor for tensor in plain.state_dict().values()}.values())
    written = _size_and_norm(_tensors(directory))
    if expected[0] != written[0] or not math.isclose(expected[1], written[1], rel_tol=1e-9):
        raise RuntimeError(f"{directory}: the files have {written[0]} numbers of norm {written[1]}, the model in "
                           f"memory has {expected[0]} of norm {expected[1]}")  # fmt: skip


def _by_all_names(state: dict[str, Tensor], plain: nn.Module) -> dict[str, Tensor]:
    """The weights, with those that share a tensor under each of its names: of a tied head, some models name the head
    first, and others the embeddings."""
    names: dict[int, list[str]] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    given = ((group, state[name]) for group in names.values() for name in group if name in state)
    return state | {name: tensor for group, tensor in given for name in group}


def write_adapter(model: PeftModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write a PEFT adapter and reopen it, because ZeRO-3 can leave it empty. Raises RuntimeError."""
    name_device()
    config = model.peft_config[ADAPTER]
    for option, value in list(vars(config).items()):
        if isinstance(value, set):  # written in an order that each process has anew
            setattr(config, option, sorted(value))
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
    """The count of the numbers, and their norm."""
    count, squares = 0, 0.0
    for tensor in tensors:
        count, squares = count + tensor.numel(), squares + float(tensor.double().pow(2).sum())
    return count, math.sqrt(squares)
