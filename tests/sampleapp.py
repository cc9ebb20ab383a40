"""An app in an importable module, with tasks that tests can watch through files."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery
from celery.exceptions import Reject
from celery.worker.request import Request

app = Celery("sample")

#: Seconds after which a task that waits for its test gives up.
PATIENCE = 60.0


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def where() -> tuple[str, int, int]:
    """The node, the pool's child and the main process that run this."""
    return add.request.hostname or where.request.hostname, os.getpid(), os.getppid()


@app.task
def wait_for(go: str, log: str) -> str:
    """Write a line into ``log``, wait until the file ``go`` exists, write another."""
    note(log, f"start {os.getpid()} {os.getppid()}")
    deadline = time.monotonic() + PATIENCE
    while not Path(go).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(go)
        time.sleep(0.01)
    note(log, "end")
    return "done"


@app.task
def kill_own_process(log: str) -> None:
    note(log, "start")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def ask_back(log: str, times: int) -> int:
    """Ask to be put back until it has been run ``times`` times."""
    note(log, "start")
    runs = len(Path(log).read_text().splitlines())
    if runs < times:
        raise Reject("not yet", requeue=True)
    return runs


@app.task
def run_out_of_memory(log: str) -> None:
    note(log, "start")
    raise MemoryError("no room for 8 GiB")


@app.task
def leave(log: str) -> None:
    note(log, "start")
    raise SystemExit("a file is missing")


@app.task
def write_down(log: str) -> None:
    note(log, "written")


def note(log: str, line: str) -> None:
    with Path(log).open("a") as file:
        file.write(line + "\n")


@app.task
def fork_a_child() -> int:
    """What a library may do in a task; the child leaves without a word."""
    child = os.fork()
    if child == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class OwnRequest(Request):
    """A request class of the app's own: a documented feature of Celery."""


@app.task(Request="sampleapp:OwnRequest")
def kill_own_process_by_own_request(log: str) -> None:
    note(log, "start")
    os.kill(os.getpid(), signal.SIGKILL)
