"""Which container this process runs in, if any. Pure but for :func:`own_id`."""

from __future__ import annotations

import re
from pathlib import Path

_ID = r"([0-9a-f]{64})"

#: What a path of cgroup v1 ends with: plain Docker (``/docker/ID``), Docker under systemd
#: (``/system.slice/docker-ID.scope``), ECS and Batch (``/ecs/TASK/ID``), GitHub's runners
#: (``/actions_job/ID``).
_CGROUP = re.compile(rf"(?:/|docker-){_ID}(?:\.scope)?$", re.MULTILINE)

#: With cgroup v2 and a namespace of its own a container sees nothing but ``0::/``. But Docker
#: mounts files of the container's directory into it, and the mount says where they come from:
#: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
_MOUNT = re.compile(rf"/containers/{_ID}/(?:hostname|hosts|resolv\.conf) /etc/")


def container_id(cgroup: str, mountinfo: str) -> str:
    """The id of the container that a process runs in, or an empty string.

    Args:
        cgroup: its ``/proc/self/cgroup``.
        mountinfo: its ``/proc/self/mountinfo``.
    """
    found = _MOUNT.search(mountinfo) or _CGROUP.search(cgroup)
    return found[1] if found else ""


def own_id(proc: Path = Path("/proc/self")) -> str:
    """That of this process's container."""
    try:
        return container_id((proc / "cgroup").read_text(), (proc / "mountinfo").read_text())
    except OSError:
        return ""  # no Linux
