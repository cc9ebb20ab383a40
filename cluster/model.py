"""The data that the parts pass to each other: frozen, without behaviour of its own."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster import tables


class State(StrEnum):
    """Where a cluster is in its life."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    SCALING = "scaling"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


#: From each state, the states that may follow.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.NEW: frozenset({State.STARTING}),
        State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPING}),
        State.READY: frozenset({State.SCALING, State.FAILED, State.STOPPING}),
        State.SCALING: frozenset({State.READY, State.FAILED, State.STOPPING}),
        State.FAILED: frozenset({State.STOPPING}),
        State.STOPPING: frozenset({State.STOPPED}),
        State.STOPPED: frozenset(),
    }
)


class Phase(StrEnum):
    """What a platform says of one worker it was asked to start."""

    PENDING = "pending"  # accepted, not running yet
    RUNNING = "running"  # its process runs; whether it is ready, only its ping tells
    EXITED = "exited"  # ended by itself with code 0
    FAILED = "failed"  # ended in any other way
    MISSING = "missing"  # the platform knows nothing of it (any more)


@dataclass(frozen=True, slots=True, order=True)
class WorkerRef:
    """A worker as its platform knows it: the name ``launch`` gave out."""

    id: str
    launcher: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How a worker is, by its platform.

    ``final``: it won't change any more. ``retryable``: another one in its
    place may do better. ``reason``: in words, with the remedy where one is known.
    """

    phase: Phase
    final: bool = False
    retryable: bool = True
    reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker needs to boot, the same on every platform.

    ``environment`` holds the run's secret: it is left out of the repr.
    ``workers`` is how many there are to be in all.
    ``directory`` is the run's own on the manager's machine, for what a
    launcher keeps there meanwhile; it is removed when the cluster ends.
    """

    cluster_id: str
    workers: int
    directory: Path
    environment: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the broker listens, the run's one secret, and as whom it is to be spoken to.

    ``user``: one of the broker's, or an empty string for the manager.
    """

    host: str
    port: int
    secret: str = field(repr=False)
    user: str = ""

    @property
    def tls(self) -> bool:
        """Whether it speaks TLS: it does wherever others than this machine could listen."""
        return not ipaddress.ip_address(self.host).is_loopback

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for a sign of life, and how much there may be of something.

    ``liveness_timeout``: seconds after which who is silent counts as dead.
    ``orphan_timeout``: seconds after which a worker ends that doesn't reach the broker.
    ``max_deliveries``: how often a task's process may die.
    ``broker_memory``: bytes for queued tasks and results.
    ``message_limit``: bytes for one of them.
    """

    liveness_timeout: float
    orphan_timeout: float
    max_deliveries: int
    broker_memory: int
    message_limit: int


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the broker must listen so that a launcher's workers reach it."""

    host: str  # an IP address


class Severity(StrEnum):
    """What to do about a finding: go on, say it, or refuse."""

    INFORM = "inform"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a launcher's preflight noticed, in words, with the remedy."""

    severity: Severity
    message: str


@dataclass(frozen=True, slots=True)
class LauncherDefaults:
    """What a launcher takes where the caller leaves something out.

    ``workers``: how many (``None``: the caller must say). ``timeout``: seconds
    to wait for them. ``resizable``: whether more can be launched later.
    ``launches``: whether it starts workers itself or only waits for them.
    ``tls``: whether they reach the broker over a network, where it speaks TLS.
    """

    workers: int | None
    timeout: float
    resizable: bool
    launches: bool
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Registration:
    """A worker as it announced itself: its node name, its platform id, where it runs; the
    versions it runs, its tasks, and what it has to say of the app's settings."""

    node: str
    worker: str
    host: str
    pid: int
    versions: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker in a :class:`ClusterStatus`. ``node`` is empty until it has registered."""

    id: str
    node: str
    ready: bool
    status: WorkerStatus


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What ``Cluster.status()`` returns; prints as a table."""

    id: str
    state: State
    launcher: str
    broker: str  # HOST:PORT, or empty where there is none (any more)
    wanted: int
    workers: tuple[WorkerView, ...]

    def __str__(self) -> str:
        return "\n".join([self._head, *([tables.text(self._rows)] if self.workers else [])])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython shows it as it prints."""
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return tables.as_html(self._head, self._rows)

    @property
    def _head(self) -> str:
        ready = sum(worker.ready for worker in self.workers)
        where = f", broker at {self.broker}" if self.broker else ""
        return (
            f"cluster {self.id}: {self.state}, {ready} of {self.wanted} workers ready "
            f"({self.launcher}{where})"
        )

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            ("worker", "state", "node", ""),
            *(
                (
                    worker.id,
                    "ready" if worker.ready else str(worker.status.phase),
                    worker.node or "-",
                    worker.status.reason,
                )
                for worker in self.workers
            ),
        ]


class WorkerLogs(dict[str, Sequence[str]]):
    """What ``Cluster.logs()`` returns: lines by worker; prints as a text."""

    def __str__(self) -> str:
        parts = []
        for worker, lines in self.items():
            parts += [f"--- {worker} ---", *lines]
        return "\n".join(parts)
