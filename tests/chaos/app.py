"""The tasks. Each has a result that can be told in advance, however often it is run."""

from __future__ import annotations

import time
import uuid
from typing import Any

from celery import Celery, Task

from chaos.record import executing

app = Celery("chaos")


def child_id(parent: str, number: int) -> str:
    """The id of a task that a task sends: the same whenever that one is run."""
    return str(uuid.uuid5(uuid.UUID(parent), str(number)))


@app.task(bind=True)
def short(self: Task, x: int) -> int:
    with executing(self.request):
        return 2 * x + 1


@app.task(bind=True)
def echo(self: Task, text: str) -> str:
    with executing(self.request):
        return text


@app.task(bind=True)
def slow(self: Task, x: int, seconds: float) -> int:
    with executing(self.request):
        time.sleep(seconds)
        return 2 * x + 1


@app.task(bind=True)
def more(self: Task, x: int, y: int) -> int:
    with executing(self.request):
        return x + y


@app.task(bind=True)
def total(self: Task, numbers: list[int]) -> list[int]:
    """In order, so that one that is there twice or in another place is seen."""
    with executing(self.request):
        return [sum(numbers), *numbers]


@app.task(bind=True)
def spread(self: Task, x: int, n: int) -> list[str]:
    """Send ``n`` tasks, and wait for none."""
    with executing(self.request):
        ids = [child_id(self.request.id, i) for i in range(n)]
        for i, id_ in enumerate(ids):
            short.apply_async((x + i,), task_id=id_)
        return ids


@app.task(bind=True, max_retries=None)
def flaky(self: Task, x: int, times: int) -> Any:
    """Ask to be tried again, ``times`` times."""
    with executing(self.request):
        if self.request.retries < times:
            raise self.retry(countdown=0.05)
        return 2 * x + 1


@app.task(bind=True)
def fail(self: Task, x: int) -> None:
    with executing(self.request):
        raise ValueError(f"on purpose {x}")
