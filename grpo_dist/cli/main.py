"""`python -m grpo_dist VERB` for what needs no launcher.

A verb is a module with a docstring, `add_options(parser)` and `run(options, rest)`, which returns the exit status: put
it into VERBS. It is imported when it is asked for, and should import torch only once it runs, so that a mistake is
answered at once. What a verb does not know of the command line is left to it as the rest, for the options of a run
(`cli_config.parse_config`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Container, Sequence

from ..config.own_options import OwnOptions
from ..text.plain import plain_lines

VERBS = {
    # verb: its module, and what it does in a few words
    "bench": ("grpo_dist.cli.bench.bench", "time a step, against TRL if you like"),
    "chat": ("grpo_dist.cli.chat", "talk to what a run has trained, beside its base model"),
    "check": ("grpo_dist.cli.check", "look at a config before a run, and name all problems at once"),
    "completion": ("grpo_dist.cli.shell_completion", "print the script with which a shell completes `grpo-dist`"),
    "examples": ("grpo_dist.cli.examples", "copy the shipped configs and their data into a directory"),
    "export": ("grpo_dist.cli.export", "take home what a run has trained: merged, as an adapter, towards GGUF"),
    "init": ("grpo_dist.cli.init", "write a commented config to begin with"),
    "plan": ("grpo_dist.cli.plan", "predict memory of each GPU and the arithmetic of a step, on any number of them"),
    "report": ("grpo_dist.report", "write one page about a run, or about several"),
    "schema": ("grpo_dist.cli.schema", "print the options as a JSON schema, for editors"),
    "score": ("grpo_dist.cli.score", "print a table of scored completions"),
    "train": (
        "grpo_dist.cli.train",
        "train in this one process (several: accelerate launch --num_processes N -m grpo_dist.train)",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: 2 for a mistake of the user."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(words[:1])
    options, rest = parser.parse_known_args(words)
    try:
        return options.run(options, rest)
    except (ValueError, OSError) as error:
        print(plain_lines(f"error: {error}"), file=sys.stderr)
        return 2


def make_parser(wanted: Container[str]) -> argparse.ArgumentParser:
    """Return the parser of all verbs, with the options of those that are wanted; only their modules are imported."""
    told = "What needs no launcher. For training itself: `python -m grpo_dist.train --help`."
    parser = OwnOptions(prog="python -m grpo_dist", description=told)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in wanted:
            found = importlib.import_module(module)
            verb.description = found.__doc__
            found.add_options(verb)
            verb.set_defaults(run=found.run)
    return parser
