"""Celery's request, which also tells the ledger when a task took its process with it."""

from __future__ import annotations

from typing import Any

import celery.worker.request
from billiard.exceptions import WorkerLostError
from celery.exceptions import Reject
from celery.worker.request import Request as CeleryRequest
from celery.worker.state import task_ready

from cluster.wire.givenup import POOL_PROCESS
from cluster.wire.transport import current_ledger


class Request(CeleryRequest):  # type: ignore[misc]
    """What stands for a message in a worker of ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Behind others, or for the limit of its kind. What has an ETA the broker sees by itself.
        self._waits = bool(self.task.rate_limit or not self._app.conf.worker_disable_prefetch)
        ledger = current_ledger()
        if self._waits and ledger is not None:
            ledger.wait(self._message.delivery_tag)

    _wanted_back = False
    _death = ""

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        exception = exc_info.exception
        # Celery wraps what a task raised to keep its traceback.
        exception = getattr(exception, "exc", exception)
        self._wanted_back = isinstance(exception, Reject)
        if isinstance(exception, WorkerLostError):
            # billiard's words (billiard/pool.py, mark_as_worker_lost), less the pool's own number.
            how = str(exception).partition("prematurely: ")[2].partition(" Job: ")[0]
            self._death = f"{POOL_PROCESS}: {how.rstrip('.')}" if how else ""
        if isinstance(exception, MemoryError):
            # Celery would end the whole worker (celery/worker/request.py,
            # on_failure), and the task would be run again by the next one. The
            # process that raised it has lived to store it as the task's result.
            task_ready(self)
            if self.task.acks_late:
                self.acknowledge()
            return None
        return super().on_failure(exc_info, *args, **kwargs)

    def _success_was_stored(self) -> Any:
        """What is stored of a task that was done when its process died, and need not run again. A
        chord's member is only done once it has been counted, which comes after that; it is
        counted once, however often it runs."""
        return False if self.chord else super()._success_was_stored()

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        ledger = current_ledger()
        if (self.eta or self._waits) and ledger is not None:
            ledger.start(self.message.delivery_tag)
        super().on_accepted(pid, time_accepted)

    def reject(self, requeue: bool = False) -> None:
        ledger = current_ledger()
        if requeue and not self._wanted_back and ledger is not None:
            ledger.note_death(self.message.delivery_tag, self._death or POOL_PROCESS)
        super().reject(requeue=requeue)


def use_for_all_tasks() -> None:
    """Make it Celery's, before the app is imported: a request class of the app's own then
    inherits from it, too."""
    celery.worker.request.Request = Request
