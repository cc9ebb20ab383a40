"""The pool of processes that a worker runs tasks in: Celery's prefork, with a quicker end."""

from __future__ import annotations

from typing import Any

from billiard.pool import CLOSE, RUN
from celery.concurrency import prefork
from celery.worker import state

#: For ``app.Worker(pool=...)``.
NAME = f"{__name__}:TaskPool"


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """Ends at once where nothing runs any more, as :mod:`cluster.worker.drain` sees to it.

    Celery's goes on firing the event loop's timers for tasks that do, from a
    thread that sleeps for half a second at a time. It is left to that where a
    worker is told to shut down in another way, by ``app.control.shutdown()``.
    """

    def on_stop(self) -> None:
        if state.active_requests or self._pool is None or self._pool._state not in (RUN, CLOSE):
            super().on_stop()
            return
        self._pool.close()
        self._pool.join()
        self._pool: Any = None
