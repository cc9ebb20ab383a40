"""Celery's request, which also tells the ledger when a task took its process with it."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Reject
from celery.worker.request import Request as CeleryRequest

from cluster.wire.transport import current_ledger


class Request(CeleryRequest):  # type: ignore[misc]
    """``Task.Request`` in a worker of ours."""

    _wanted_back = False

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        exception = exc_info.exception
        # Celery wraps what a task raised to keep its traceback.
        self._wanted_back = isinstance(getattr(exception, "exc", exception), Reject)
        return super().on_failure(exc_info, *args, **kwargs)

    def reject(self, requeue: bool = False) -> None:
        ledger = current_ledger()
        if requeue and not self._wanted_back and ledger is not None:
            ledger.note_death(self.message.delivery_tag)
        super().reject(requeue=requeue)
