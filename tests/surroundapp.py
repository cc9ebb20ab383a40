"""An app that says what surrounds its tasks; all signals that a worker sends are connected."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from celery import Celery, signals
from celery.utils.log import get_task_logger

app = Celery("surround")

#: Where the signals' receivers write, in a worker that was given this variable.
LOG = os.environ.get("SURROUND_LOG", "")

#: What the environment was as this module was imported.
AT_IMPORT = dict(os.environ)

logger = get_task_logger(__name__)

if LOG:
    print("said at import")


def note(line: str) -> None:
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(f"{line} {os.getpid()}\n")


def receive(name: str, **_: object) -> None:
    note(name)
    if name in {"worker_process_init", "worker_ready", "task_prerun"} and LOG:
        raise RuntimeError(f"{name} on purpose")


def print_at_the_end(**_: object) -> None:
    if LOG:
        print("without a newline in worker_process_shutdown", end="")


SIGNALS = (
    "celeryd_after_setup",
    "worker_init",
    "worker_process_init",
    "worker_ready",
    "task_prerun",
    "task_postrun",
    "worker_process_shutdown",
    "worker_shutdown",
)
for each in SIGNALS:
    getattr(signals, each).connect(functools.partial(receive, each), weak=False)
signals.worker_process_shutdown.connect(print_at_the_end)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def look(expression: str) -> object:
    """The value of a Python expression in a worker, by way of JSON."""
    return json.loads(json.dumps(eval(expression), default=str))


@app.task
def run(*command: str) -> str:
    """What a program that a task starts prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@app.task
def say(text: str, stream: str = "stdout", end: str = "\n") -> None:
    print(text, file=getattr(sys, stream), end=end)


@app.task
def write(hexadecimal: str, times: int = 1) -> None:
    """Bytes, past Python's streams."""
    for _ in range(times):
        os.write(1, bytes.fromhex(hexadecimal))


@app.task
def log(level: int, text: str) -> None:
    logger.log(level, text)


@app.task
def print_and_kill_the_worker(text: str, once: str) -> str:
    """Prints as it is killed with its main process; says so when it is run again."""
    if Path(once).exists():
        return "again"
    Path(once).touch()
    print(text)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
    return "survived"


@app.task
def die(once: str) -> int:
    """The pool's child is killed, once."""
    if not Path(once).exists():
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


@app.task
def shell(command: str) -> int:
    """A program whose output goes where the worker's does; its exit code."""
    return subprocess.run(command, shell=True, check=False).returncode


@app.task
def dispositions() -> dict[str, str]:
    """What a program that handles no signals and one that does start from."""
    names = ("SIGINT", "SIGTERM", "SIGPIPE", "SIGCHLD", "SIGHUP", "SIGUSR2")
    return {name: str(signal.getsignal(getattr(signal, name))) for name in names} | {
        "blocked": str(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "wake-up": str(signal.set_wakeup_fd(-1)),
    }


@app.task
def numbers() -> tuple[int, float, str]:
    """The process, and what it thinks is random."""
    return os.getpid(), random.random(), os.urandom(8).hex()


@app.task
def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return found


@app.task
def read_input() -> str:
    return sys.stdin.read()


@app.task
def start_a_process() -> str:
    """Celery's pool is of daemons, which multiprocessing lets have no children."""
    try:
        multiprocessing.get_context("fork").Process(target=print).start()
    except AssertionError as error:
        return str(error)
    return "started"


@app.task
def start_a_cluster() -> None:
    import cluster

    cluster.start(1, app=app)


logging.getLogger(__name__).addHandler(logging.NullHandler())
