"""What a launcher says of the ranks, and who prints an error that ends their start."""

from __future__ import annotations

import os
import sys

from ..config.parse import is_first_rank, let_first_rank_answer
from ..text.plain import plain_lines, write_lines
from .device import computes_on_gpu

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables with the number of processes that MPI has started."""


class LaunchError(ValueError):
    """The ranks cannot start a run; the message says which, and what to do."""

    def __init__(self, message: str, by_all: bool = False) -> None:
        """`by_all`: all ranks raise it, so one of them can print it."""
        super().__init__(message)
        self.by_all = by_all


def is_of_one_rank(error: Exception) -> bool:
    """Whether other ranks may not know of an error in the start, so that this rank has to print it."""
    return isinstance(error, LaunchError) and not error.by_all


def tell_error_of_start(error: Exception) -> None:
    """Print an error that ends the start, on the rank that has to. The others wait, so that it comes to that."""
    if is_first_rank() or is_of_one_rank(error):
        write_lines(plain_lines(f"error: {error}"), sys.stderr)
    else:
        let_first_rank_answer("RANK")


def place_in_launch() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher's variables say. Raises LaunchError."""
    for name in MPI_SIZES if "WORLD_SIZE" not in os.environ else ():  # Accelerate would take it for WORLD_SIZE
        if (given := os.environ.get(name, "1")) != "1":
            raise LaunchError(f"{name}={given} in the environment, but WORLD_SIZE not, as mpirun and srun start it: "
                              f"start ranks with `accelerate launch`, or unset {name} for one process")  # fmt: skip
    rank, num_ranks = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not rank.isdecimal() or not num_ranks.isdecimal() or int(rank) >= int(num_ranks):
        given = num_ranks if "WORLD_SIZE" in os.environ else "(not set)"
        raise LaunchError(
            f"RANK={rank}, WORLD_SIZE={given} in the environment, expected a rank below WORLD_SIZE: start ranks "
            "with `accelerate launch`, or unset both for one process"
        )
    if int(num_ranks) > 1 or os.environ.get("LOCAL_RANK", "-1") != "-1":  # Accelerate joins a process group for either
        # without LOCAL_RANK, Accelerate would take each process on a GPU for a run of its own
        needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *(["LOCAL_RANK"] if computes_on_gpu() else [])]
        missing = [name for name in needed if not os.environ.get(name)]
        given = f"WORLD_SIZE={num_ranks}" if int(num_ranks) > 1 else f"LOCAL_RANK={os.environ['LOCAL_RANK']}"
        if missing:
            raise LaunchError(f"{given} in the environment, but {' and '.join(missing)} not: start ranks with "
                              "`accelerate launch`, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"
                              )  # fmt: skip
        for name in ("LOCAL_RANK", "MASTER_PORT"):
            number = os.environ.get(name, "0")
            if not number.isdecimal() or int(number) > 65_535:
                raise LaunchError(f"{name}={number} in the environment, expected a number from 0 to 65535: start ranks "
                                  "with `accelerate launch`, which sets it")  # fmt: skip
    return int(rank), int(num_ranks)
