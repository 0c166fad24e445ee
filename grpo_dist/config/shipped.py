"""Where the files lie that ship beside the code: configs with their data, and what the launchers need.

In a checkout they are at its top level, in an installation inside the package. `python -m grpo_dist examples` makes a
copy of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[1]


Folder = Literal["configs", "accelerate_configs", "launch"]


def shipped(folder: Folder) -> Path:
    """Where a folder lies; of `launch`, an installation has only slurm.sbatch: the other scripts set up a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder
