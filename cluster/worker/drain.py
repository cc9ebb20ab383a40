"""How a worker leaves: it takes nothing more, finishes what it can, hands back the rest.

Celery's own soft shutdown sleeps in a signal handler, still holds an
outstanding pop and answers no pings (celery/worker/worker.py,
wait_for_soft_shutdown). Here the event loop goes on until the end.
"""

from __future__ import annotations

import time
from typing import Any

from celery.utils.log import get_logger
from celery.worker import state

from cluster.wire.ledger import CONNECTION_ERRORS
from cluster.wire.transport import current_ledger, stop_taking
from cluster.worker.processes import end_now
from cluster.worker.wake import Wake

logger = get_logger(__name__)

#: Seconds between looks at whether the running tasks are done.
LOOK_EVERY = 0.05

#: Seconds for the loop to come round. With none at all its timer waits for a second.
SOON = 0.001

#: Seconds that Celery gets to shut down its parts after that.
SHUTDOWN_ALLOWANCE = 2.0


class Drain:
    """The worker's way out; it is taken once."""

    def __init__(self) -> None:
        self._hub: Any = None
        self._warned = False
        self._code: int | None = None
        self._until = float("inf")
        self._wake = Wake()

    @property
    def overdue(self) -> int | None:
        """The exit code, if the loop should have ended by now and hasn't."""
        return self._code if time.monotonic() > self._until + SHUTDOWN_ALLOWANCE else None

    @property
    def attached(self) -> bool:
        """Whether there is an event loop that can carry it out."""
        return self._hub is not None

    def attach(self, hub: Any) -> None:
        """Use the worker's event loop, from now on."""
        self._hub = hub
        self._wake.attach(hub, self._on_wake)

    def begin(self, code: int, grace: float) -> None:
        """Leave. From any thread or a signal handler; a later call can only shorten the grace.

        Args:
            code: the exit code; that of the first call counts.
            grace: seconds that running tasks get.
        """
        until = time.monotonic() + grace
        if self._code is None:
            self._code = code
        self._until = min(self._until, until)
        self._wake()

    def _on_wake(self) -> None:
        stop_taking()
        # By the loop's timer, which comes after what it was to do soon: Celery
        # puts off the acknowledgement of a task that has just ended to that
        # (celery/worker/consumer/consumer.py, call_soon).
        self._hub.call_later(SOON, self._look)

    def _look(self) -> None:
        if state.should_stop is not None:
            return
        running = _running()
        in_time = time.monotonic() < self._until
        if in_time and (running or not self._hand_back()):
            self._hub.call_later(LOOK_EVERY, self._look)
            return
        if not in_time:
            self._hand_back()
        # What waits for its time or its turn must not begin any more.
        self._hub.timer.clear()
        assert self._code is not None
        if running:
            # Their messages are with others by now; Celery would take its time.
            end_now(self._code)
        state.should_stop = self._code
        self._wake()  # the loop is about to wait for something to happen

    def _hand_back(self) -> bool:
        ledger = current_ledger()
        if ledger is None:
            return True
        try:
            ledger.release("it left")
        except CONNECTION_ERRORS as error:
            # If there is no more time, the guardian does it when it misses us.
            if not self._warned:
                logger.warning("Can't hand back what is unfinished yet (%s).", error)
            self._warned = True
            return False
        return True


def _running() -> bool:
    """Whether a task runs, or is about to, since the pool has it. One that waits for its ETA, or
    for the rate limit of its kind, isn't."""
    return bool(state.active_requests) or any(
        request._apply_result is not None for request in tuple(state.reserved_requests)
    )
