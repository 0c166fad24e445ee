"""`python -m grpo_dist examples`: copy the shipped configs and their data, to run and to change them.

    python -m grpo_dist examples my_project

After `pip install grpo_dist` the commands of the documentation run in that directory as in a checkout.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..config.checks import require
from ..config.shipped import Folder, shipped


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), metavar="DIR", help="target directory (.)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Copy, and print the next command. Raises ValueError, FileExistsError."""
    require(not rest, "arguments", list(rest), "a directory alone")
    for folder in copy_examples(options.directory):
        print(f"made {folder}/")
    place = "" if options.directory == Path() else f"cd {options.directory} && "
    print(f"now: {place}python -m grpo_dist.train --config configs/quickstart.yaml")
    return 0


def copy_examples(directory: Path) -> list[Path]:
    """Copy the shipped folders into a directory and return the copies. Raises FileExistsError if one exists."""
    folders: tuple[Folder, ...] = ("configs", "accelerate_configs", "launch")
    targets = [directory / folder for folder in folders]
    there = [str(target) for target in targets if target.exists()]
    if there:
        raise FileExistsError(f"{', '.join(there)} already exist; choose another directory, or move them")
    try:
        for folder, target in zip(folders[:2], targets[:2], strict=True):
            shutil.copytree(shipped(folder), target, ignore=shutil.ignore_patterns("__pycache__"))
    except shutil.Error as error:  # it has a list of the files and why each could not be copied, often the same reason
        raise OSError(f"{target} is not complete: {error.args[0][0][2]}") from error
    targets[2].mkdir()
    shutil.copy(shipped("launch") / "slurm.sbatch", targets[2])
    return targets
