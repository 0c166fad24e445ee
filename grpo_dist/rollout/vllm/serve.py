"""Become a server for a training: what launch/slurm_vllm.sbatch starts on the nodes that serve.

    python -m grpo_dist.rollout.vllm.serve PYTHON PORT OPTIONS_OF_THE_TRAINING [-- ARGUMENTS_OF_THE_SERVER]

PYTHON is that of vLLM's environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ...config.parse import parse_config
from ...model.adapter import with_adapter
from ...model.config_files import load_model_config
from ..replay import needs_routes
from .base import served_model, write_base_of
from .server import server_command, server_environment


def command_of(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The server's command and environment. Ends the program with status 2 on a mistake in an option."""
    python, port, *rest = words
    place = rest.index("--") if "--" in rest else len(rest)
    config = with_adapter(parse_config(rest[:place]))
    model_config = load_model_config(config.model)
    write_base_of(config, model_config)
    model, with_routes = served_model(config, model_config), needs_routes(config.rollout, model_config)
    command = server_command(config, python, model, "0.0.0.0", int(port), with_routes)
    return [*command, *rest[place + 1 :]], server_environment(config)


if __name__ == "__main__":
    command, environment = command_of(sys.argv[1:])
    print(*command, flush=True)
    os.execve(command[0], command, environment)
