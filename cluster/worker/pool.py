"""The pool of processes that a worker runs tasks in: Celery's prefork, with a quicker end."""

from __future__ import annotations

from typing import Any

from billiard.pool import CLOSE, RUN
from celery.concurrency import prefork

#: For ``app.Worker(pool=...)``.
NAME = f"{__name__}:TaskPool"


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """Ends at once: when it is told to, :mod:`cluster.worker.drain` has seen to it that nothing
    runs any more. Celery's goes on firing the event loop's timers for tasks that do, from a
    thread that sleeps for half a second at a time.
    """

    def on_stop(self) -> None:
        if self._pool is not None and self._pool._state in (RUN, CLOSE):
            self._pool.close()
            self._pool.join()
            self._pool: Any = None
