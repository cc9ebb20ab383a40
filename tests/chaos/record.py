"""What is written down while a run lasts, and read back at its end.

Each execution of a task adds one line as it starts and one as it ends, by itself, into one file:
what a killed process has written is there, what it hadn't isn't. Times are those of the monotonic
clock, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

#: Where a worker finds the name of the file.
VARIABLE = "CHAOS_RECORD"

#: Characters of a result above which it is only compared, and not shown.
LONG = 1000


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of a task's body.

    ``message`` is the mark a message gets as it is published: two executions with the same one
    are one message that was handed out twice, two with different ones were two messages. ``end``
    is ``None`` if it never got there.
    """

    task: str
    retries: int
    message: str
    node: str
    pid: int
    start: float
    end: float | None = None

    @property
    def worker(self) -> str:
        """The launcher's name for it, of which the node's is made."""
        return self.node.partition("@")[0].rpartition("-")[0]


class Effect(StrEnum):
    """What a fault does to the executions around it, whatever it was."""

    NODE_ENDED = "node ended"  # all that these workers ran runs again
    CHILD_ENDED = "child ended"  # what ran in these processes runs again
    NODE_FENCED = "node fenced"  # frozen for too long: as if it had ended
    TOLD_TO_LEAVE = "told to leave"  # may finish what it runs: nothing runs again
    BROKER = "broker"  # no execution is repeated; a publish that was under way may be
    NONE = "none"  # a delay


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that was done to the cluster, and to which workers, by their launcher's names."""

    kind: str
    effect: Effect
    at: float
    workers: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """A task that was sent, by the driver or by another task, and what must come of it.

    Args:
        task: its id.
        outcome: as :func:`outcome` makes it.
        sent: from when to when the driver published it; ``None`` if a task did.
        after: the tasks that publish it. Of a chord's body these are all of its header: it is
            published once, by whichever comes last.
    """

    task: str
    outcome: str
    sent: tuple[float, float] | None = None
    after: tuple[str, ...] = ()


def outcome(value: Any) -> str:
    """A result as text, to be compared and shown."""
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    text = json.dumps(value)
    if len(text) > LONG:
        return f"{len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()}"
    return text


@contextlib.contextmanager
def executing(request: Any) -> Iterator[None]:
    """In a task: write down that it starts, and how it ends."""
    message = request.properties["delivery_tag"]
    entry = [request.id, request.retries, message, request.hostname, os.getpid()]
    _write(["start", *entry, time.monotonic()])
    try:
        yield
    finally:
        _write(["end", *entry, time.monotonic()])


def _write(entry: list[Any]) -> None:
    # One write of a line is never mixed with another's, where all append:
    # https://pubs.opengroup.org/onlinepubs/9799919799/functions/write.html
    file = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(file)


def read(path: Path) -> list[Execution]:
    """All executions, in the order they started."""
    found: dict[tuple[Any, ...], Execution] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        what, task, retries, message, node, pid, at = json.loads(line)
        key = (task, retries, message, node, pid)
        if what == "start":
            # The same child may run the same message twice: the first is done by then.
            while key in found:
                key = (*key, "again")
            found[key] = Execution(task, retries, message, node, pid, at)
        else:
            while (*key, "again") in found:
                key = (*key, "again")
            began = found[key]
            found[key] = Execution(task, retries, message, node, pid, began.start, at)
    return sorted(found.values(), key=lambda execution: execution.start)
