"""What the manager and the guardian say to each other.

The manager says what to start, and when there are workers to look after; after
that it only holds the pipe open: its end, however it comes about, is the order
to stop. The guardian answers with events.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Order:
    """What to start. Holds the run's secret."""

    server: str
    host: str
    secret: str = field(repr=False)
    directory: str  # the run's own; the guardian removes it at the end
    workers: int  # how many to make room for
    memory: int  # bytes for all that is in it
    liveness_timeout: float  # seconds
    max_deliveries: int
    port: int = 0  # 0: a free one; else there was a server, and its data is in the directory


@dataclass(frozen=True, slots=True)
class Watch:
    """Workers take part from now on: look after them."""


@dataclass(frozen=True, slots=True)
class Started:
    """The broker answers at this port."""

    port: int
    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The broker didn't come up, or not again."""

    reason: str
    log: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Restarted:
    """The broker had ended and is up again, at its port and with its data."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dead:
    """A worker counts as dead; the ``held`` messages it had are back in their queues."""

    node: str
    held: int
    why: str


@dataclass(frozen=True, slots=True)
class Full:
    """The broker's memory is used up, to a degree at which something is refused."""

    used: int
    memory: int
    results: bool  # these as well, not only what is sent from outside of workers


@dataclass(frozen=True, slots=True)
class Room:
    """There is room in the broker again."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The guardian is at work; said again and again, so that its silence means something."""


Event = Started | Failed | Restarted | Dead | Full | Room | Alive

#: For :func:`cluster.jsonlines.decode`.
EVENTS = (Started, Failed, Restarted, Dead, Full, Room, Alive)
