"""Stock Celery, by hand: a Redis server, ``celery worker`` processes and a ping to all of them.

A ping that some worker isn't there to hear costs a second: kombu lets the read it began run out,
whatever the time-out says. ``start_celery_lean.py`` has a way around it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import byhand
from benchmarks_app import app, one
from redis import Redis
from stopwatch import report_first_result

#: Seconds that a ping's replies may be apart; a ping that came too early is lost.
PING_TIMEOUT = 0.2


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
    port = byhand.free_port()
    with (
        byhand.process(byhand.server_command(port)) as server,
        Redis(host="127.0.0.1", port=port) as client,
    ):
        byhand.wait_for_server(server, client)
        byhand.use_server(port)
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(
                    byhand.process(byhand.worker_command("benchmarks_app", number, flags))
                )
                for number in range(workers)
            ]
            before_ping(client, workers)
            _wait_for_workers(processes)
            report_first_result(one.delay().get(), called)
            # All at once: they end side by side.
            for process in processes:
                process.terminate()


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
