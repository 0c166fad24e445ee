"""What ranks send one another, over gloo."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from grpo_dist.distributed.ranks import Ranks


def gather(rank: int, store: str, dtype: torch.dtype) -> None:
    """One rank of two, which has one row more than the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    ranks = object.__new__(Ranks)
    ranks.accelerator = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"))  # type: ignore
    ranks.collectives_entered = 0
    own, whole = torch.tensor([[rank, 300]] * (rank + 1)).to(dtype), torch.tensor([[0, 300], *[[1, 300]] * 2]).to(dtype)
    for given, expected in ((own, whole), (own[:, 1], whole[:, 1]), (own[:0], whole[:0])):
        assert torch.equal(ranks.gather(given), expected) and ranks.gather(given).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_tensors_of_any_type_are_gathered(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of int16, in which routes of more than 255 experts are."""
    start = multiprocessing.get_context("fork").Process
    both = [start(target=gather, args=(rank, f"file://{tmp_path}/store", dtype)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert [each.exitcode for each in both] == [0, 0]
