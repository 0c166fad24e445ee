"""The files that ship beside the code: configs with their data, the files of the launchers, and the documentation.

A checkout has them at its top level, an installation inside the package. `python -m grpo_dist examples` copies all but
the documentation, of which `--help` says where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[1]


Folder = Literal["configs", "accelerate_configs", "launch", "docs"]


def shipped(folder: Folder) -> Path:
    """The path of a folder. An installation has only slurm.sbatch of `launch`: the other scripts set up a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder
