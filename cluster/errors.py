"""Everything this package raises on purpose, as one tree.

::

    ClusterError
    ├── ConfigurationError   (also a ValueError)    a bad argument or setting; nothing was started
    ├── StateError           (also a RuntimeError)  not possible in the cluster's present state
    ├── MessageTooLarge      (also a ValueError)    arguments or a result beyond the limit
    ├── BrokerError
    │   ├── BrokerStartError                        the broker didn't come up
    │   ├── BrokerFull                              there is no room for another message
    │   └── BrokerLost                              the broker is gone and can't come back
    ├── LaunchError                                 the platform refused or failed to start workers
    ├── WorkersNotReady      (also a TimeoutError)  too few workers at the deadline
    ├── VersionMismatch                             workers run other code than the manager
    └── WorkerLost                                  a task kills its workers, or none are left

Data travels as attributes; the message is for people and says what to do.
An exception that a task's result carries (``WorkerLost``, ``BrokerFull``,
``MessageTooLarge``) can be rebuilt from its ``args``, as JSON has them, since
that is all Celery's result keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.model import WorkerRef, WorkerStatus

__all__ = [
    "BrokerError",
    "BrokerFull",
    "BrokerLost",
    "BrokerStartError",
    "ClusterError",
    "ConfigurationError",
    "LaunchError",
    "MessageTooLarge",
    "StateError",
    "VersionMismatch",
    "WorkerLost",
    "WorkersNotReady",
]


class ClusterError(Exception):
    """The root: ``except cluster.ClusterError`` catches all that is ours."""


class ConfigurationError(ClusterError, ValueError):
    """An argument or a setting can't be used. Nothing was started."""


class StateError(ClusterError, RuntimeError):
    """The call isn't possible in the present state."""


class MessageTooLarge(ClusterError, ValueError):
    """A task's arguments, or its result, are too large to be sent through the broker.

    ``size`` and ``limit`` are in bytes. Nothing was sent.
    """

    def __init__(self, message: str, size: int = 0, limit: int = 0) -> None:
        super().__init__(message, size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return str(self.args[0])


class BrokerError(ClusterError):
    """Something about the broker."""


class BrokerFull(BrokerError):
    """The broker has no room for another message. It wasn't sent; later it may be."""


class BrokerStartError(BrokerError):
    """The broker didn't come up. ``log`` holds the last lines it wrote."""

    def __init__(self, message: str, *, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = tuple(log)

    def __str__(self) -> str:
        return _with_log(self.args[0], {"broker": self.log})


class BrokerLost(BrokerError):
    """The broker is gone for good; results that weren't fetched are lost."""


class LaunchError(ClusterError):
    """The platform refused or failed to start workers.

    ``accepted`` holds the workers it did accept before that, so that the
    caller can take them back.
    """

    def __init__(self, message: str, *, accepted: Sequence[WorkerRef] = ()) -> None:
        super().__init__(message)
        self.accepted = tuple(accepted)


class WorkersNotReady(ClusterError, TimeoutError):
    """Too few workers were ready at the deadline, or enough had failed for good.

    ``ready``, ``wanted``, ``minimum`` are counts, ``elapsed`` is in seconds,
    ``statuses`` says how each launched worker was, ``logs`` holds the last
    lines of those that failed. All that was launched has been cancelled.
    """

    def __init__(
        self,
        message: str,
        *,
        ready: int,
        wanted: int,
        minimum: int,
        elapsed: float,
        statuses: Mapping[WorkerRef, WorkerStatus],
        logs: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__(message)
        self.ready = ready
        self.wanted = wanted
        self.minimum = minimum
        self.elapsed = elapsed
        self.statuses = dict(statuses)
        self.logs = {worker: tuple(lines) for worker, lines in logs.items()}

    def __str__(self) -> str:
        return _with_log(self.args[0], self.logs)


class VersionMismatch(ClusterError):
    """Too few workers are left since they run what can't work with this manager: another major
    version of Celery, say, or none of its tasks. All that was launched has been cancelled.

    ``logs`` holds the last lines of those that ended for it.
    """

    def __init__(self, message: str, *, logs: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.logs = {worker: tuple(lines) for worker, lines in (logs or {}).items()}

    def __str__(self) -> str:
        return _with_log(self.args[0], self.logs)


class WorkerLost(ClusterError):
    """A task took its workers with it again and again, or no worker is left to run it.

    ``deaths`` says who died, and how: pairs of a node name and words. ``logs``
    holds their last lines.
    """

    def __init__(
        self,
        message: str,
        deaths: Iterable[Sequence[str]] = (),
        logs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.deaths = tuple((node, how) for node, how in deaths)
        self.logs = {worker: tuple(lines) for worker, lines in (logs or {}).items()}
        super().__init__(message, self.deaths, self.logs)

    def __str__(self) -> str:
        return _with_log(self.args[0], self.logs)


def _with_log(message: str, logs: Mapping[str, Sequence[str]]) -> str:
    parts = [message]
    for source, lines in logs.items():
        if lines:
            parts.append(f"--- last lines of {source} ---")
            parts.extend(lines)
    return "\n".join(parts)
