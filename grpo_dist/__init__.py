"""grpo_dist: GRPO under Accelerate and DeepSpeed, the same result however it is run.

    from grpo_dist import Config, parse_config, run_training

docs/python.md shows a training from Python.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from .distributed.spinning import set_count

__version__ = "0.1.0"
__all__ = ["Config", "parse_config", "run_training"]

if TYPE_CHECKING:
    from .cli.train import run_training
    from .config.parse import parse_config
    from .config.schema import Config

set_count(os.environ)  # before anything imports torch

_PLACES = {
    "Config": "grpo_dist.config.schema", "parse_config": "grpo_dist.config.parse", "run_training": "grpo_dist.cli.train"
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: `import grpo_dist` alone imports nothing heavy."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
