"""Keeps hold of all that a probe starts, and ends it.

Peers put their processes into sessions of their own, or let go of them. On Linux a subreaper
gets whatever loses its parent, so the tree below this process has them all; elsewhere what left
a killed probe's process group as well may stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

#: Seconds between two looks at processes that end.
LOOK_EVERY = 0.01


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own; Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descendants() -> list[psutil.Process]:
    """What runs below this process; those that ended are reaped, the adopted ones too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    with contextlib.suppress(ChildProcessError):  # there are none at all
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return found


def wait_until_gone(seconds: float) -> list[psutil.Process]:
    """What still runs below this process after that time at most."""
    deadline = time.monotonic() + seconds
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    return left


def end_descendants(seconds: float) -> int:
    """Kill all that runs below this process, and wait for it.

    Returns:
        How many there were.

    Raises:
        RuntimeError: some are still there.
    """
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + seconds
    while left := descendants():
        if time.monotonic() > deadline:
            raise RuntimeError(f"These don't end: {left}.")
        killed.update(left)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_EVERY)
    return len(killed)
