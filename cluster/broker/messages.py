"""What the manager and the guardian say to each other: one JSON object a line.

The manager says one thing, what to start, and after that only holds the pipe
open: its end, however it comes about, is the order to stop. The guardian
answers with events.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Order:
    """What to start. Holds the run's secret."""

    server: str
    host: str
    secret: str = field(repr=False)
    directory: str  # the run's own; the guardian removes it at the end
    workers: int  # how many to make room for


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

_EVENTS: dict[str, type[Event]] = {
    event.__name__: event for event in (Started, Failed, Restarted, Dead)
}


def encode(message: Order | Event) -> bytes:
    """One line."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode_order(line: bytes) -> Order:
    fields = json.loads(line)
    del fields["kind"]
    return Order(**fields)


def decode_event(line: bytes) -> Event:
    fields = json.loads(line)
    event = _EVENTS[fields.pop("kind")]
    if event is Failed:
        fields["log"] = tuple(fields["log"])
    return event(**fields)
