"""The cores that a process may use: those it may run on, or fewer where a container has a quota of CPU time.

Threads beyond a quota only use it up sooner, and then all of them stand still until the next period.
Imports only the standard library: launch/single_node.sh asks before torch is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def num_cores() -> int:
    """Cores that this process may keep busy, at least 1."""
    return max(1, math.ceil(min(allowed_cores(), quota_cores())))


def allowed_cores() -> int:
    """Cores that this process may run on, whatever its quota of time on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> float:
    """CPU seconds in a second that the control groups of this process grant; infinity without a quota.

    Linux documents cpu.max (version 2) and cpu.cfs_quota_us (version 1) under "CPU" and "CFS Bandwidth Control".
    """
    return min(_quotas(groups, membership), default=math.inf)


def _quotas(groups: Path, membership: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = groups / "cpu" if controllers else groups
            group = PurePosixPath(name.lstrip("/"))
            # a container may see its own group as the root of the tree
            for folder in (root / group, *(root / parent for parent in group.parents)):
                with suppress(OSError, ValueError):
                    yield _version_1(folder) if controllers else _version_2(folder)


def _version_1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    return quota / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8")) if quota > 0 else math.inf


def _version_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    return int(quota) / int(period) if quota != "max" else math.inf
