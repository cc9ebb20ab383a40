"""Should a worker that ended be replaced, and when? Pure; the budgets are its state."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.model import WorkerStatus
from cluster.restarts import Restarts

#: Seconds over which deaths are counted.
WINDOW = 60.0

#: Replacements for workers that ended before they were ready. Few: what
#: happens at the start tends to happen again.
UNREADY = 3

#: Replacements for workers that had been ready, whatever the cluster's size.
READY_AT_LEAST = 10


@dataclass(slots=True)
class Replacements:
    """The budgets of one cluster.

    Args:
        wanted: how many workers it should have.
    """

    wanted: int
    _ready: Restarts = field(init=False)
    _unready: Restarts = field(init=False)

    def __post_init__(self) -> None:
        self._ready = Restarts(limit=max(READY_AT_LEAST, 2 * self.wanted), window=WINDOW)
        self._unready = Restarts(limit=UNREADY, window=WINDOW)

    def next(self, status: WorkerStatus, *, was_ready: bool, now: float) -> float | None:
        """Seconds until a replacement is to be launched, or ``None`` for never.

        Args:
            status: how the worker ended.
            was_ready: whether it had been ready.
            now: seconds on a clock that only goes forward.
        """
        if status.final and not status.retryable:
            return None
        return (self._ready if was_ready else self._unready).next(now)
