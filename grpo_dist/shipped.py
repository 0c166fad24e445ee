"""The files that ship beside the code: configs with their data, and the launcher's configs.

In a checkout they lie at its top level, in an installation inside the package. `python -m grpo_dist examples` puts a copy
into a directory of one's own, where every command of the documentation then runs as it stands.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
FOLDERS = ("configs", "accelerate_configs", "launch")
INSTALLED = {"launch": "slurm.sbatch"}
"""What of a folder an installation has, where not all: the other scripts set up a checkout."""


def shipped(folder: str) -> Path:
    """Where one of FOLDERS lies."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def copy_examples(directory: Path) -> list[Path]:
    """Copy what ships into `directory`; returns the folders. Raises FileExistsError before it would overwrite one."""
    targets = [directory / folder for folder in FOLDERS]
    there = [str(target) for target in targets if target.exists()]
    if there:
        raise FileExistsError(f"{', '.join(there)} already there: choose another directory, or move them away")
    for target in targets:
        if target.name in INSTALLED:
            target.mkdir(parents=True)
            shutil.copy(shipped(target.name) / INSTALLED[target.name], target)
        else:
            shutil.copytree(shipped(target.name), target, ignore=shutil.ignore_patterns("__pycache__"))
    return targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `examples`."""
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), metavar="DIR", help="where to (here)")


def examples(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Copy and say what can be run now. Raises ValueError, OSError."""
    if rest:
        raise ValueError(f"{rest[0]!r} is no option of `examples`")
    copied = copy_examples(options.directory)
    print("\n".join(f"made {folder}/" for folder in copied))
    place = "" if options.directory == Path() else f"cd {options.directory} && "
    print(f"now run: {place}python -m grpo_dist.train --config configs/quickstart.yaml")
    return 0
