"""An app whose tasks take and return much, and wait for their test through files."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery, Task

from cluster.wire import backend

#: In the workers of these tests, chords don't wait for long.
backend.CHORD_PATIENCE = 2.0

app = Celery("bulk")

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


@app.task
def swell(size: int, mark: int = 0) -> list[object]:
    """``mark``, so that results differ, and as many characters as asked for."""
    return [mark, "x" * size]


@app.task
def swell_later(go: str, size: int, mark: int = 0) -> list[object]:
    wait_for_file(go)
    return [mark, "x" * size]


@app.task(bind=True)
def retry_later(self: Task, go: str) -> int:
    wait_for_file(go)
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task
def length(text: str, mark: int = 0) -> list[int]:
    return [mark, len(text)]


@app.task
def marks(values: list[list[object]]) -> list[object]:
    """The marks of what several of the others returned."""
    return [value[0] for value in values]


@app.task
def mark_of(value: list[object]) -> object:
    return value[0]


@app.task
def fail_at_length(size: int) -> None:
    raise ValueError("x" * size)


@app.task
def send_on(size: int) -> str:
    return length.delay("x" * size).id


@app.task
def hold(go: str, log: str) -> str:
    note(log, f"start {os.getpid()} {os.getppid()}")
    wait_for_file(go)
    return "held"


@app.task
def hold_and_die(go: str, log: str) -> None:
    hold(go, log)
    os.kill(os.getpid(), signal.SIGKILL)
