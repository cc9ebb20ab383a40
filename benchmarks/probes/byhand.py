"""Stock Celery by hand: a Redis server and ``celery worker`` processes, ended on the way out."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

#: Seconds between two looks at what comes up.
LOOK_EVERY = 0.005

#: Seconds for a process that was told to end.
END_TIMEOUT = 20.0

#: What a local run doesn't need; somebody who knows Celery well leaves it out.
LEAN = ("--without-mingle", "--without-gossip", "--without-heartbeat")

#: What a server keeps if it is killed: nothing, as most people run it, or all it has
#: written to its file. The second is what this project's broker does.
FORGETFUL = ("--save", "", "--appendonly", "no")
DURABLE = ("--save", "", "--appendonly", "yes", "--appendfsync", "no")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def server_command(port: int, keeps: Sequence[str] = FORGETFUL) -> Sequence[str]:
    program = os.environ["BENCHMARK_SERVER"]
    return [program, "--bind", "127.0.0.1", "--port", str(port), *keeps]


def worker_command(app: str, number: int, flags: Sequence[str] = ()) -> Sequence[str]:
    python = [sys.executable, "-m", "celery", "-A", app]
    return [*python, "worker", "--concurrency", "1", "-n", f"worker{number}@%h", *flags]


def use_server(port: int) -> None:
    """Celery reads these, here and in the workers."""
    url = f"redis://127.0.0.1:{port}/0"
    os.environ["CELERY_BROKER_URL"] = os.environ["CELERY_RESULT_BACKEND"] = url


@contextlib.contextmanager
def process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(command)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(END_TIMEOUT)


def wait_for_server(server: subprocess.Popen[bytes], client: Redis) -> None:
    # As long as it takes: the script that runs this probe has the deadline.
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with {server.returncode}.")
        with contextlib.suppress(RedisConnectionError):  # it doesn't listen yet
            client.ping()
            return
        time.sleep(LOOK_EVERY)


def wait_for_subscribers(client: Redis, workers: int) -> None:
    """Until all workers listen for orders; they begin to take tasks at the same time."""
    while len(client.client_list(_type="pubsub")) < workers:
        time.sleep(LOOK_EVERY)
