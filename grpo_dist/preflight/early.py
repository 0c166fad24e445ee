"""What can be said against a training before torch is imported, which takes longer than all of this.

It is a part of what `trainer.build` checks, by the same functions.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from ..config.parse import let_first_rank_answer, refuse_mistaken_options
from ..config.places import require_writable
from ..config.schema import Config
from ..data.rows import check_file
from ..distributed.launch_config import asks_for, require_known_launch, require_optimizer, shards_weights
from ..model.adapter import require_fitting, require_own_values, with_adapter
from ..model.files import (
    UnfitModel,
    model_path,
    read_entries,
    require_divisors,
    require_fit_files,
    require_quantizable,
    require_unsharded,
    stored_file,
)
from ..model.names import require_known_names, require_loaded_in_parts
from ..text.plain import plain_lines, write_lines


def refuse_mistakes(arguments: list[str] | None = None, before_launch: bool = False) -> None:
    """End the program with status 2 on a mistake in a run's options, its launch, or the files of a local model.

    The number of ranks is not known `before_launch`. A dry run reports all of them by itself. If nodes have disks of
    their own, the ranks have to hear of one another's mistakes: a launch on several nodes is checked later.
    """
    config = refuse_mistaken_options(sys.argv[1:] if arguments is None else arguments)
    if config is None or not _is_one_node(os.environ):
        return
    try:
        require_possible(config, os.environ, None if before_launch else int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, OSError) as error:
        let_first_rank_answer()
        write_lines(plain_lines(f"error: {error}"), sys.stderr)
        sys.exit(2)


def _is_one_node(environment: Mapping[str, str]) -> bool:
    ranks = environment.get("WORLD_SIZE", "1")
    return ranks.isdigit() and environment.get("LOCAL_WORLD_SIZE", "1") == ranks


def _require_program(python: str) -> None:
    if shutil.which(os.path.expanduser(python)) is None:
        raise ValueError(f"rollout.vllm.python: {python!r} given, which is no program here: launch/setup_vllm.sh makes "
                         "an environment and prints the path")  # fmt: skip


def require_possible(config: Config, environment: Mapping[str, str], num_ranks: int | None) -> None:
    """Raise ValueError or FileNotFoundError for what the launch's variables and local files say against a run;
    `num_ranks` is None where it is not known yet."""
    require_known_launch(environment)
    for path in config.data.train_files:
        check_file(path)
    if config.data.eval_file is not None:
        check_file(config.data.eval_file)
    require_writable(Path(config.train.output_dir))
    require_optimizer(config.optim, environment)
    if (servers := config.rollout.vllm) is not None and servers.python is not None:
        _require_program(servers.python)
    shards = shards_weights(environment)
    require_divisors(config, num_ranks, None)
    if config.model.quantization is not None:
        require_quantizable(config, None)
        require_unsharded(True, shards)
    config = with_adapter(config, asks_hub=False)
    place = model_path(config.model)
    file = stored_file(place, "config.json", config.model.revision)
    if file is None or (entries := read_entries(file.parent)) is None:
        return
    try:
        require_fit_files(config, file.parent, entries, num_ranks, shards)
        require_known_names(config.model, config.lora, config.rollout, file.parent, entries)
        require_own_values(config, shards)
        if shards and asks_for(environment, "ACCELERATE_USE_DEEPSPEED"):
            require_loaded_in_parts(entries)
        if config.lora is not None and config.lora.init_from is not None and not entries.get("quantization_config"):
            require_fitting(config.lora.init_from, file.parent)
    except ValueError as error:
        if Path(place).is_dir():
            raise
        raise UnfitModel(f"{error} (by what the hub's cache has of it, {file.parent}; `hf download {place}` brings it "
                         "up to date)") from error  # fmt: skip
