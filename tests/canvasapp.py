"""An app whose tasks use what Celery offers a task; tests share one cluster for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery, Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

app = Celery("canvas")
app.conf.update(worker_send_task_events=True, task_send_sent_event=True, result_extended=True)

#: Seconds after which a task that waits for its test gives up.
PATIENCE = 30.0


def note(log: str, line: str) -> int:
    """Add a line; returns how many there are."""
    with Path(log).open("a") as file:
        file.write(line + "\n")
    return len(Path(log).read_text().splitlines())


def wait_for_file(path: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def fail(*_: object) -> None:
    raise ValueError("on purpose")


@app.task
def log_line(log: str, line: str) -> int:
    return note(log, line)


@app.task
def hold(log: str, go: str) -> str:
    note(log, str(os.getpid()))
    wait_for_file(go)
    return "held"


@app.task
def die(log: str) -> None:
    note(log, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, max_retries=3)
def retry_until(self: Task, times: int) -> int:
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return self.request.retries


class Flaky(Task):
    """A base class that retries by itself."""

    autoretry_for = (ConnectionError,)
    max_retries = 2
    default_retry_delay = 0


@app.task(base=Flaky, bind=True)
def flaky(self: Task, failures: int) -> int:
    if self.request.retries < failures:
        raise ConnectionError("not yet")
    return self.request.retries


@app.task(soft_time_limit=0.3)
def soft_limited() -> str:
    try:
        time.sleep(PATIENCE)
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "never told"


@app.task(time_limit=0.3)
def hard_limited(log: str) -> None:
    note(log, "start")
    time.sleep(PATIENCE)


@app.task(bind=True)
def report(self: Task, go: str) -> str:
    self.update_state(state="PROGRESS", meta={"done": 1, "of": 2})
    wait_for_file(go)
    return "done"


@app.task(rate_limit="100/s")
def limited(x: int) -> int:
    return x


@app.task(ignore_result=True)
def silent(log: str) -> None:
    note(log, "ran")


@app.task(bind=True)
def ignored(self: Task, log: str) -> None:
    self.update_state(state="MINE", meta="kept")
    note(log, "ran")
    raise Ignore


@app.task
def rejected(log: str) -> None:
    note(log, "ran")
    raise Reject("not wanted", requeue=False)


@app.task(bind=True)
def replaced(self: Task, x: int) -> None:
    raise self.replace(add.s(x, 1))


@app.task
def write_error(request: object, error: BaseException, _traceback: object, log: str) -> None:
    note(log, f"{type(error).__name__}: {error}")


@app.task(bind=True)
def fan_out(self: Task, n: int) -> str:
    """A task that sends tasks, and doesn't wait for them."""
    return add.delay(n, n).id


class Counter(Task):
    """Class-based: it has a name of its own and keeps state in its process."""

    name = "canvas.counter"

    def run(self, x: int) -> int:
        return x + 1


counter = app.register_task(Counter())
