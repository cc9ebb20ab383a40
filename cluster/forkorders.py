"""What the local launcher and its fork server say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fork:
    """Start these workers. ``environment`` holds the run's secret."""

    workers: tuple[str, ...]  # their ids
    environment: Mapping[str, str] = field(repr=False)  # all of it
    cwd: str
    logs: str  # directory; each writes to <its id>.log there


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker runs."""

    worker: str
    pid: int


@dataclass(frozen=True, slots=True)
class NotForked:
    """A worker couldn't be started."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker's main process has ended, and what it left behind was killed."""

    worker: str
    code: int  # as in subprocess: negative for a signal


Event = Forked | NotForked | Ended

#: For :func:`cluster.jsonlines.decode`.
EVENTS = (Forked, NotForked, Ended)
