"""`python -m grpo_dist VERB`: the commands that need no launcher.

A verb is a module with a docstring, `add_options(parser)` and `run(options, rest)`, which returns the exit status.
VERBS lists it. The module is imported when its verb is used. It should import torch only in `run`, so that errors in
the options come at once. `rest` has the arguments that the verb's parser does not know: the options of a run.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Container, Sequence
from typing import NoReturn

from ..config.checks import did_you_mean
from ..config.own_options import OwnOptions
from ..config.shipped import shipped
from ..distributed.process import end, open_streams
from ..text.output import NO_READER, reader_is_gone
from ..text.plain import plain_lines

VERBS = {
    # verb: (module, summary)
    "bench": ("grpo_dist.cli.bench.bench", "time a step, optionally against TRL"),
    "chat": ("grpo_dist.cli.chat", "talk to a trained model and its base model"),
    "check": ("grpo_dist.cli.check", "check a config before a run, and report all problems at once"),
    "completion": ("grpo_dist.cli.shell_completion", "print the script for shell completion of `grpo-dist`"),
    "evaluate": (
        "grpo_dist.cli.evaluate",
        "evaluate a model in one process (`evaluate --help` shows how to launch several)",
    ),
    "examples": ("grpo_dist.cli.examples", "copy the shipped configs and their data into a directory"),
    "export": ("grpo_dist.cli.export", "export a trained model: merged, as an adapter, or for GGUF"),
    "init": ("grpo_dist.cli.init", "write a commented config to start from"),
    "plan": ("grpo_dist.cli.plan", "predict the memory of each GPU, for any number of GPUs"),
    "report": ("grpo_dist.report", "write one page about one or several runs"),
    "schema": ("grpo_dist.cli.schema", "print the options as a JSON schema, for editors"),
    "score": ("grpo_dist.cli.score", "print a table of scored completions"),
    "train": (
        "grpo_dist.cli.train",
        "train in one process (`train --help` shows how to launch several)",
    ),
    "watch": ("grpo_dist.report.live", "show the report of runs while they go on"),
}


def program() -> NoReturn:
    """The command `grpo-dist`."""
    open_streams()
    end(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status, which is 2 for an error of the user, and that of a shell for Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(words[:1])
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in VERBS:
        parser.error(f"{words[0]!r} given, expected one of {', '.join(VERBS)}{did_you_mean(words[0], VERBS)}")
    options, rest = parser.parse_known_args(words)
    try:
        return options.run(options, rest)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return NO_READER
        print(plain_lines(f"error: {error}"), file=sys.stderr)
        return 2


def make_parser(verbs: Container[str]) -> argparse.ArgumentParser:
    """Return the parser of all verbs, with the options of `verbs`. It imports only their modules."""
    description = ("Commands that need no launcher. For training see `python -m grpo_dist.train --help`. "
                   f"The documentation is in {shipped('docs')}; begin with first_task.md.")  # fmt: skip
    parser = OwnOptions(prog="python -m grpo_dist", description=description)
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        verb = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in verbs:
            imported = importlib.import_module(module)
            verb.description = imported.__doc__
            imported.add_options(verb)
            verb.set_defaults(run=imported.run)
    return parser
