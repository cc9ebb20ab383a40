"""Stock Celery, by hand: a Redis server, ``celery worker`` processes and a ping to all of them.

A ping that some worker isn't there to hear costs a second: kombu lets the read it began run out,
whatever the time-out says. ``start_celery_lean.py`` has a way around it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks_app import app, one
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from stopwatch import report_first_result

#: Seconds between two looks at a server that comes up.
LOOK_EVERY = 0.005

#: Seconds that a ping's replies may be apart; a ping that came too early is lost.
PING_TIMEOUT = 0.2

#: Seconds for a process that was told to end.
END_TIMEOUT = 20.0


def main(
    workers: int,
    flags: Sequence[str] = (),
    before_ping: Callable[[Redis, int], None] = lambda _client, _workers: None,
) -> None:
    """Measure.

    Args:
        workers: how many.
        flags: for each worker.
        before_ping: called with a client of the server and the number of workers.
    """
    called = time.monotonic()
    port = _free_port()
    with (
        _process([os.environ["BENCHMARK_SERVER"], *_server_flags(port)]) as server,
        Redis(host="127.0.0.1", port=port) as client,
    ):
        _wait_for_server(server, client)
        url = f"redis://127.0.0.1:{port}/0"
        # Celery reads these, here and in the workers.
        os.environ["CELERY_BROKER_URL"] = os.environ["CELERY_RESULT_BACKEND"] = url
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(_process(_worker_command(number, flags)))
                for number in range(workers)
            ]
            before_ping(client, workers)
            _wait_for_workers(processes)
            report_first_result(one.delay().get(), called)
            # All at once: they end side by side.
            for process in processes:
                process.terminate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _server_flags(port: int) -> Sequence[str]:
    return ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]


def _worker_command(number: int, flags: Sequence[str]) -> Sequence[str]:
    python = [sys.executable, "-m", "celery", "-A", "benchmarks_app"]
    return [*python, "worker", "--concurrency", "1", "-n", f"worker{number}@%h", *flags]


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(END_TIMEOUT)


def _wait_for_server(server: subprocess.Popen[bytes], client: Redis) -> None:
    # As long as it takes: the script that runs this probe has the deadline.
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with {server.returncode}.")
        with contextlib.suppress(RedisConnectionError):  # it doesn't listen yet
            client.ping()
            return
        time.sleep(LOOK_EVERY)


def _wait_for_workers(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    answered: set[str] = set()
    while len(answered) < len(processes):
        for process in processes:
            if process.poll() is not None:
                raise RuntimeError(f"A worker ended with {process.returncode}.")
        # The limit makes it return with the last answer and not after the time-out.
        for reply in app.control.ping(timeout=PING_TIMEOUT, limit=len(processes)):
            answered.update(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]))
