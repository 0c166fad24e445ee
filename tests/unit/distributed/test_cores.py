"""How many cores a process may use, and how its threads wait."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from grpo_dist.distributed import cores
from grpo_dist.distributed.cores import num_cores, quota_cores


def write(files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "150000 100000\n"}, 0.5),
        ("0::/a:b\n", {"a:b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n",
             "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("not such a file", {"cpu.max": "100000 100000\n"}, math.inf),
        (None, {"cpu.max": "100000 100000\n"}, math.inf),
    ],
)  # fmt: skip
def test_quotas(membership: str | None, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    """The smallest quota of the groups that this process is in counts, in both versions of control groups."""
    write(files, tmp_path / "cgroup")
    if membership is not None:
        write({"membership": membership}, tmp_path)
    assert quota_cores(tmp_path / "cgroup", tmp_path / "membership") == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.5, 2), (2, 2), (math.inf, 3)])
def test_cores(quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert num_cores() == expected


@pytest.mark.parametrize(("count", "expected"), [(4, 4), (None, 1)])
def test_cores_of_a_system_that_pins_no_process(
    count: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "quota_cores", lambda: math.inf)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert num_cores() == expected
