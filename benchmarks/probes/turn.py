"""Probes that wait for a minute may do so side by side; what comes before is measured alone."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

#: The file to lock, in the environment; without one there is nobody else.
VARIABLE = "BENCHMARK_TURN"

#: Seconds after a fault in which a quick system has recovered from it.
QUICK = 4.0

_descriptor = -1


def take() -> None:
    """Wait until no other probe starts its system or has just had its fault."""
    global _descriptor
    path = os.environ.get(VARIABLE)
    if path is not None:
        # Closed on exec, so that what is started here doesn't hold it.
        _descriptor = os.open(Path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(_descriptor, fcntl.LOCK_EX)


def pass_on_soon() -> None:
    """The fault happens now: the next one may begin when a quick system is through."""
    timer = threading.Timer(QUICK, pass_on)
    timer.daemon = True
    timer.start()


def pass_on() -> None:
    """The next one may begin."""
    if _descriptor != -1:
        fcntl.flock(_descriptor, fcntl.LOCK_UN)
