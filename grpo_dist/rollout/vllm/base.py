"""A quantised base as a plain model on disk, for servers.

vLLM quantises otherwise than the trainer, or computes with the codes in kernels that round otherwise. Servers
therefore load the values that the trainer's policy computes with: dequantised, in the policy's dtype, written once.
Adapters come on top, as always.
"""

from __future__ import annotations

import json
import shutil
import uuid
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config.schema import Config
from ...distributed.agreement import first_fault
from ...distributed.device import computes_on_gpu, resolve_dtype
from ...distributed.ranks import Ranks
from ...model.checks import stored_quantization
from ...model.config_files import load_tokenizer
from ...model.export import base_state, write_merged
from ...model.files import PACKAGE, model_path, stored_kind
from ...model.load import base_identity, load_causal_lm
from ...monitoring.machine import versions

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

DIRECTORY = "served_base"
"""In train.output_dir. It stays there: a run that goes on, and servers that are started again, need the same values."""
_NOTE = "written_from.json"


def is_dequantized(config: Config, model_config: PreTrainedConfig) -> bool:
    """Whether servers load a dequantised copy of the base, since it is quantised."""
    return stored_kind(config.model, stored_quantization(model_config)) is not None


def served_model(config: Config, model_config: PreTrainedConfig) -> str:
    """What a server of this run loads: the model as it is named, or the directory of the dequantised copy."""
    return str(_directory(config)) if is_dequantized(config, model_config) else model_path(config.model)


def provide_base(config: Config, model_config: PreTrainedConfig, model: nn.Module, ranks: Ranks) -> str | None:
    """Write the dequantised copy of `model`, the trainer's, where servers need one and it is not there; a collective.
    Returns what went wrong, the same on all ranks."""
    if not is_dequantized(config, model_config):
        return None
    if ranks.gather_objects(ranks.is_main and _is_written(config, model_config))[0]:
        return None
    state = base_state(model, ranks.is_main, resolve_dtype(config.model.dtype))
    problem = None
    if ranks.is_main:
        try:
            _write(config, model_config, model, state)
        except OSError as error:
            problem = str(error)
    ranks.wait_at("written the base for servers")
    return first_fault(ranks.gather_objects, problem)


def write_base_of(config: Config, model_config: PreTrainedConfig) -> None:
    """Load the base and write its dequantised copy, where servers need one and it is not there. Raises OSError."""
    if not is_dequantized(config, model_config) or _is_written(config, model_config):
        return
    dtype = resolve_dtype(config.model.dtype)
    device = torch.device("cuda") if computes_on_gpu() else None
    model = load_causal_lm(config.model, dtype, None, device)
    _write(config, model_config, model, base_state(model, True, dtype))


def _directory(config: Config) -> Path:
    return (Path(config.train.output_dir) / DIRECTORY).absolute()


def _is_written(config: Config, model_config: PreTrainedConfig) -> bool:
    try:
        return bool(
            json.loads((_directory(config) / _NOTE).read_text(encoding="utf-8")) == _origin(config, model_config)
        )
    except (OSError, ValueError):
        return False


def _origin(config: Config, model_config: PreTrainedConfig) -> dict[str, Any]:
    """What the values of the copy depend on."""
    place = Path(model_path(config.model))
    files = sorted(each for pattern in ("*.safetensors", "*.bin") for each in place.glob(pattern) if place.is_dir())
    package = metadata.version(PACKAGE) if util.find_spec(PACKAGE) else None
    return {
        "base": base_identity(config.model, model_config), "dtype": str(resolve_dtype(config.model.dtype)),
        # bitsandbytes may round otherwise on another device
        "device": "gpu" if computes_on_gpu() else "cpu", "versions": versions() | {PACKAGE: package},
        "files": [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files],
    }  # fmt: skip


def _write(config: Config, model_config: PreTrainedConfig, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Whole or not at all. Raises OSError."""
    target = _directory(config)
    draft = target.with_name(f"{DIRECTORY}.{uuid.uuid4().hex[:8]}")  # nodes that serve may write at the same time
    needed = sum(tensor.nbytes for tensor in state.values())
    try:
        draft.mkdir(parents=True)
        if (free := shutil.disk_usage(draft).free) < needed:
            raise OSError(f"{free / 2**30:,.2f} GiB are free")
        write_merged(model, state, load_tokenizer(config.model), draft)
        (draft / _NOTE).write_text(json.dumps(_origin(config, model_config)), encoding="utf-8")
        if not _is_written(config, model_config):
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
    except Exception as error:
        raise OSError(f"rollout.vllm: the dequantised base cannot be written to {target} for the servers, it takes "
                      f"{needed / 2**30:,.2f} GiB ({type(error).__name__}: {error}): free some space, or set "
                      "train.output_dir to another disk") from error  # fmt: skip
    finally:
        shutil.rmtree(draft, ignore_errors=True)
