"""An app whose tasks wait with the worker that has taken them, for their time or their turn."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from celery import Celery, Task

app = Celery("later")

#: Of these a worker takes several at a time: each queue has its messages to itself.
ahead = Celery("ahead")
ahead.conf.update(
    worker_disable_prefetch=False,
    worker_prefetch_multiplier=4,
    broker_transport_options={"priority_steps": [0, 3, 6, 9]},
)

#: Seconds after which a task that waits for its test gives up.
PATIENCE = 45.0


def note(log: str, line: str) -> None:
    with Path(log).open("a") as file:
        file.write(line + "\n")


def wait_for_file(path: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


@app.task(bind=True)
def write(self: Task, log: str, line: str) -> bool:
    """Returns whether it runs at its time or after, and not before."""
    note(log, line)
    eta = self.request.eta
    return eta is None or datetime.fromisoformat(eta) <= datetime.now(UTC)


@app.task(rate_limit="1/m")
def limited(log: str, line: str) -> str:
    note(log, line)
    return line


@app.task(bind=True)
def try_again(self: Task, log: str, countdown: float) -> int:
    note(log, f"try {self.request.retries}")
    if self.request.retries == 0:
        raise self.retry(countdown=countdown)
    return self.request.retries


@app.task
def hold(go: str, log: str) -> str:
    note(log, f"hold {os.getpid()} {os.getppid()}")
    wait_for_file(go)
    return "held"


@ahead.task
def hold_up(go: str, log: str) -> str:
    note(log, "hold")
    wait_for_file(go)
    return "held"


@ahead.task
def put_down(log: str, line: str) -> str:
    note(log, line)
    return line


@ahead.task
def kill_worker(go: str, log: str) -> None:
    """Each time when there is one more of the files."""
    note(log, "start")
    wait_for_file(f"{go}{len(Path(log).read_text().splitlines())}")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(PATIENCE)  # until it hears of it
