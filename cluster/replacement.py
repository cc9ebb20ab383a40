"""Should a worker that ended be replaced, and when? Pure; the budgets are its state.

A worker that had done something is replaced at once, each time: it ends with the
work. What comes to nothing again and again is a crash loop, and costs money: it
gets growing pauses, and an end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.model import WorkerStatus
from cluster.restarts import Restarts

#: Seconds over which fruitless ends are counted. Long, since where a platform takes minutes to
#: start a worker, a crash loop turns slowly.
WINDOW = 3600.0

#: A worker that was ready for this many seconds wasn't in vain, even if there was nothing to do.
LONG = 600.0

#: Replacements for workers that ended before they were ready, or before they had done anything,
#: whatever the cluster's size.
UNREADY_AT_LEAST = 3
IDLE_AT_LEAST = 10


@dataclass(slots=True)
class Replacements:
    """The budgets of one cluster.

    Args:
        wanted: how many workers it should have.
    """

    wanted: int
    _idle: Restarts = field(init=False)
    _unready: Restarts = field(init=False)

    def __post_init__(self) -> None:
        # All may be lost at the same moment, and be replaced at once.
        at_once = max(1, self.wanted)
        self._idle = Restarts(max(IDLE_AT_LEAST, 2 * self.wanted), WINDOW, at_once=at_once)
        self._unready = Restarts(max(UNREADY_AT_LEAST, self.wanted), WINDOW, at_once=at_once)

    def became_ready(self) -> None:
        """A worker did: they can."""
        self._unready.forget()

    def next(
        self, status: WorkerStatus, *, ready_for: float | None, done: int, now: float
    ) -> float | None:
        """Seconds until a replacement is to be launched, or ``None`` for never.

        Args:
            status: how the worker ended.
            ready_for: seconds since it was ready, or ``None`` if it never was.
            done: how many tasks it has done.
            now: seconds on a clock that only goes forward.
        """
        if status.final and not status.retryable:
            return None
        if done or (ready_for is not None and ready_for >= LONG):
            self._idle.forget()
            return 0.0
        return (self._unready if ready_for is None else self._idle).next(now)
