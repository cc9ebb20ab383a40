"""How much memory this process may use, which the broker is a part of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

#: Where a container's limits are: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
#: and, for the first version, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
CGROUPS = Path("/sys/fs/cgroup")


def available(memberships: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int:
    """Bytes: what the machine has, or the least of the limits of the groups we are in."""
    return min([psutil.virtual_memory().total, *_limits(memberships, root)])


def _limits(memberships: Path, root: Path) -> Iterator[int]:
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        # cgroups(7): "hierarchy-ID:controller-list:cgroup-path"
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # A limit holds for the groups below it. In a container the path may be the host's,
        # and what is visible is our own group, as the root.
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            limit = _read(directory / file)
            if limit is not None:
                yield limit


def _read(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": none
