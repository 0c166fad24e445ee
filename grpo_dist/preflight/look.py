"""Check the command line of a training and print the result."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from ..config.mistakes import Options, read_options
from ..config.parse import is_first_rank
from ..config.schema import LoraConfig
from ..config.values import flat, redacted
from ..distributed.launch_config import require_known_launch, require_optimizer
from ..distributed.process import imports
from ..text.output import printing_results
from ..text.plain import plain, write_stage
from ..text.result_console import ResultConsole
from .early import require_possible
from .findings import Findings

_SHOWN_CHARACTERS = 1000


def dry_run(words: Sequence[str]) -> int:
    """Check from inside a launch, once on each node. Only rank 0 prints everything. No rank waits for another."""
    if not is_first_rank("LOCAL_RANK"):
        return 0
    is_main = is_first_rank()
    options, num_ranks = read_options(words), int(os.environ.get("WORLD_SIZE", "1"))
    with printing_results():
        return check(options, num_ranks, heading="" if is_main else socket.gethostname())


def check(options: Options, num_ranks: int | None, heading: str = "", with_defaults: bool = False) -> int:
    """Check the options of a training and print the result, the problems at the end. With a `heading`, print only
    remarks and problems."""
    findings = Findings(options.problems)
    console = ResultConsole(highlight=False, soft_wrap=True)
    of_options = len(findings.problems)
    with findings.attempt():
        require_possible(options.config, os.environ, num_ranks)
    early = findings.problems[of_options:]
    if findings.problems:  # what needs torch is looked at for ten seconds more
        _print_block(console, f"{heading} the check goes on after".strip(), findings.problems, "red")
    _look(options, num_ranks, findings, early, _say_nothing if heading else write_stage)
    if not heading:
        _print_config(console, options, with_defaults)
        for name, lines in findings.results.items():
            _print_block(console, name, lines)
    if findings.remarks:
        _print_block(console, f"{heading} worth a look".strip(), findings.remarks, "yellow")
    if findings.problems:
        numbered = [f"{number}. {problem}" for number, problem in enumerate(findings.problems, 1)]
        _print_block(console, f"{heading} {len(numbered)} problem(s)".strip(), numbered, "red")
    elif not heading:
        console.print(Text("\nno problems found", style="bold green"))
    return 2 if findings.problems else 0


def _say_nothing(stage: str) -> None:
    """For nodes of a launch other than the first."""


def _look(
    options: Options, num_ranks: int | None, findings: Findings, early: Sequence[str], say: Callable[[str], None]
) -> None:
    """Note what the libraries and the model are needed for. What the problems noted `early` are about is left out."""
    with imports(say):
        import torch

        from ..model.adapter import with_adapter
        from ..monitoring.console import set_up_logging
        from . import contents, machine, servers, sizes, trackers

    set_up_logging()
    config, ranks = options.config, num_ranks or max(1, torch.cuda.device_count())
    if any(problem.startswith("lora.target_") for problem in early):
        config = replace(config, lora=LoraConfig())
    with findings.attempt():
        require_known_launch(os.environ)
    has_model = not any(problem.startswith(("model.name:", "lora.init_from:")) for problem in early)
    if has_model:
        with findings.attempt():
            has_model = False
            config = with_adapter(config)
            has_model = True
    with findings.attempt():
        require_optimizer(config.optim, os.environ)
    say("reading tokenizer, config of the model and data")
    read = contents.read_contents(config, ranks, findings, has_model)
    contents.describe_prompts(config, read, findings)
    say("trying the rewards on gold answers")
    contents.try_rewards(config, read, findings)
    sizes.describe_steps(config, read, ranks, findings)
    say("predicting the memory of a rank, by a trace of the model without its weights")
    counts = sizes.describe_memory(config, read, ranks, findings)
    say("looking at disk, checkpoints, servers and trackers")
    machine.check_disk(config, read, counts, findings)
    machine.check_resuming(config, read, findings)
    with findings.attempt():
        servers.check_servers(config, read.model_config, findings)
    trackers.check_trackers(config.logging.trackers, findings)


def _print_config(console: ResultConsole, options: Options, with_defaults: bool) -> None:
    """Print the options that are given, with their values and sources, and `with_defaults` all others too."""
    values = flat(redacted(asdict(options.config)))
    sources = {key: given.source for key, given in options.given.items()}
    given = {key: source for key in values if (source := _source(key, sources))}
    lines = [f"{key}: {_yaml(values[key])}   # {_short(source)}" for key, source in given.items()]
    _print_block(console, f"{len(given)} options given", lines)
    defaults = [f"{key}: {_yaml(value)}" for key, value in values.items() if key not in given]
    if with_defaults:
        _print_block(console, f"{len(defaults)} options at their defaults", defaults, "dim")
    else:
        lines = ["`python -m grpo_dist check --defaults` lists them"]
        _print_block(console, f"{len(defaults)} options at their defaults", lines, "dim")


def _source(key: str, sources: dict[str, str]) -> str | None:
    """Return the source of an option, or of the group that it is in."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return None


def _short(source: str) -> str:
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else source


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _print_block(console: ResultConsole, title: str, lines: Sequence[str], style: str = "") -> None:
    console.print(Text(f"\n{title}", style=f"bold {style}".strip()))
    for line in lines:
        console.print(Text(f"  {plain(line, _SHOWN_CHARACTERS)}", style=style))
