"""`python -m grpo_dist VERB` for what needs no launcher.

A verb is a function that adds its options to a parser and names what runs: put it into VERBS. What a verb does not know
of the command line is left to it as the rest, for the options of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .score import add_score

VERBS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (add_score,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m grpo_dist", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in VERBS:
        add(verbs)
    options, rest = parser.parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
