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
    """A worker's connection is gone; the ``held`` messages it had are back in their queues."""

    node: str
    held: int


Event = Started | Failed | Restarted | Dead

#: For :func:`cluster.jsonlines.decode`.
EVENTS = (Started, Failed, Restarted, Dead)
