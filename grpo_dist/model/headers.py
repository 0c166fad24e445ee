"""What the headers of a checkpoint's files say against its model, before any of its weights are read.

transformers loads the model with tensors that have the names and shapes of the files and no memory. Its renamings, the
experts that it joins, tied weights and its lists of names to ignore are thus those of the run. Nothing is said about
files that are no safetensors, quantised checkpoints, and models that do not load without values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from ..config.schema import ModelConfig
from ..distributed.deepspeed import unsharded_loading
from .checks import CANNOT, stored_quantization
from .files import UnfitModel, model_path, shapes_of, some_names, stored_file, weight_files
from .load import blank_causal_lm
from .loaded import lacks_weights, require_stored, unexpected_weights

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")


def compare_headers(model: ModelConfig, model_config: PreTrainedConfig) -> str | None:
    """Compare the names and shapes in a model's files with those that it has by its config. Returns a note on weights
    that it has no use for, or None.

    Raises UnfitModel where `load_causal_lm` would refuse the loaded model, by the same words.
    """
    shapes = _stored_shapes(model, model_config)
    if not shapes:
        return None
    try:
        blank, report = _load_blank(model, model_config, shapes)
    except (*CANNOT, ImportError, OSError):  # also where experts that are joined are not of the same number
        _require_whole_experts(model.name, shapes)
        return None
    if report["mismatched_keys"]:
        _require_whole_experts(model.name, shapes)
    require_stored(model.name, blank, report)
    beside = [name for name in unexpected_weights(blank, report) if name.endswith("weight")]
    if not beside:
        return None
    return (f"{len(beside)} weights of {model.name!r} are beside what {type(blank).__name__} computes "
            f"({some_names(beside)}): they are not loaded, and the final model is without them")  # fmt: skip


def _stored_shapes(model: ModelConfig, model_config: PreTrainedConfig) -> dict[str, list[int]]:
    """The shape of each tensor of the model's files on this machine; none where they are not all here, cannot be read,
    or are not what the model is loaded from as it is."""
    elsewhere = getattr(model_config, "transformers_weights", None) or getattr(type(model_config), "extra_files", None)
    config_file = stored_file(model_path(model), "config.json", model.revision)
    if elsewhere or config_file is None or stored_quantization(model_config):
        return {}
    try:
        return shapes_of(weight_files(config_file.parent))
    except (SafetensorError, OSError, ValueError, KeyError):  # those who read the weights report it
        return {}


def _load_blank(
    model: ModelConfig, model_config: PreTrainedConfig, shapes: dict[str, list[int]]
) -> tuple[nn.Module, Any]:
    """The model on the meta device, as transformers loads it from tensors of these shapes, and its report."""
    with unsharded_loading(), _without_report():
        made: Any = blank_causal_lm(model, model_config, torch.float32, None)
        stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        loaded, report = type(made).from_pretrained(
            None, config=made.config, state_dict=stored, device_map={"": "meta"}, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    return loaded, report


@contextmanager
def _without_report() -> Iterator[None]:
    """Inside, transformers prints nothing about weights: it would again when it loads them."""
    before, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shows_bars:
            logging.enable_progress_bar()


def _require_whole_experts(name: str, stored: Iterable[str]) -> None:
    """Raise UnfitModel where some experts of a layer lack a tensor that its others have in the files."""
    layers: dict[str, dict[str, set[str]]] = {}
    for match in filter(None, map(_EXPERT.fullmatch, stored)):
        layers.setdefault(match[1], {}).setdefault(match[3], set()).add(match[2])
    missing = [f"{experts}.{number}.{part}"
               for experts, parts in layers.items()
               for part, numbers in parts.items()
               for number in set().union(*parts.values()) - numbers]  # fmt: skip
    if missing:
        raise UnfitModel(lacks_weights(name, sorted(missing), "its experts"))
