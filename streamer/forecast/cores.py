"""Count the cores that this process may use."""

from __future__ import annotations

import math
from pathlib import Path

from streamer.storage.system import affinity_cores


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Count the cores that this process may use, by its affinity mask and its control group's quota, rounded up.

    Parameters
    ----------
    cgroups, membership
        Directories where Linux mounts control groups, and the file that names this process' groups.
    """
    return max(1, math.ceil(min(affinity_cores(), _quota(cgroups, membership))))


def _quota(cgroups: Path, membership: Path) -> float:
    """Read the number of cores that this process' control groups allow, from innermost to outermost; infinite if none sets a limit."""
    quota = math.inf
    try:
        lines = membership.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return quota
    for line in lines:  # such as 0::/user.slice/job (version 2) and 4:cpu,cpuacct:/job (version 1)
        _, controllers, inner = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        group = root / inner.lstrip("/")
        # In a container the path may be the host's; the root of the mount is then the container's own group.
        for directory in {root, *(p for p in (group, *group.parents) if root in p.parents)}:
            quota = min(quota, _quota_of(directory, bool(controllers)))
    return quota


def _quota_of(group: Path, first_version: bool) -> float:
    try:
        if first_version:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii").strip() for name in ("quota", "period"))
        else:
            most, period = (group / "cpu.max").read_text("ascii").split()
        return float(most) / float(period) if most not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
