"""What each process of a cluster is, by its command line and its place in the tree.

A process that was forked and runs nothing else has the command line of its parent, so the place
counts as well. What isn't known stands under its own command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import psutil

MANAGER = "manager"
GUARDIAN = "guardian"
BROKER = "broker"
FORK_SERVER = "fork server"
WORKER = "worker, main process"
POOL = "worker, pool process"

_FORK_SERVER = re.compile(r"\bcluster\.\S*fork")
_CELERYS_TITLE = re.compile(r"celeryd: .*(MainProcess|PoolWorker)")  # where setproctitle is there


def roles(manager: psutil.Process) -> dict[psutil.Process, str]:
    """The manager and all below it."""
    found = {manager: MANAGER}
    waiting = [manager]
    while waiting:  # parents before their children
        parent = waiting.pop()
        for child in parent.children():
            found[child] = role(child.cmdline(), found[parent])
            waiting.append(child)
    return found


def role(command: Iterable[str], parent: str) -> str:
    """What a process is.

    Args:
        command: its command line.
        parent: its parent's role.
    """
    words = list(command)
    line = " ".join(words)
    program = Path(words[0]).name if words else ""
    title = _CELERYS_TITLE.search(line)
    # The first that holds.
    tests = {
        POOL: parent in (WORKER, POOL) or (title is not None and title[1] == "PoolWorker"),
        GUARDIAN: "cluster.broker.guardian" in words,
        BROKER: re.search("redis|valkey", program) is not None,
        WORKER: parent == FORK_SERVER or "cluster.worker" in words or title is not None,
        FORK_SERVER: _FORK_SERVER.search(line) is not None,
    }
    unknown = " ".join([program, *words[1:]])[:60] or "(no command line)"
    return next((name for name, holds in tests.items() if holds), unknown)
