"""What the probes of faults run, whatever runs it: each writes down that it started."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: The file whose existence keeps a new worker from starting: this module, which each imports,
#: can't be imported then.
BROKEN = "FAULTS_BROKEN"

#: Seconds after which a task that waits for its probe gives up.
PATIENCE = 150.0

if Path(os.environ.get(BROKEN, os.devnull)).is_file():
    raise RuntimeError("The licence has run out.")


def wait_for(log: str, name: str, go: str) -> str:
    """Until the file ``go`` exists."""
    note(log, name)
    deadline = time.monotonic() + PATIENCE
    while not Path(go).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(go)
        time.sleep(0.01)
    return name


def short(log: str, name: str) -> str:
    note(log, name)
    time.sleep(0.05)
    return name


def long(log: str, name: str) -> str:
    note(log, name)
    time.sleep(3600)
    return name


def note(log: str, name: str) -> None:
    """One line, in one piece: who started, when by the clock of all processes, and where."""
    line = f"{name} {time.monotonic()} {os.getpid()} {os.getppid()}\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
