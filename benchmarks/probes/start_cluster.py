"""This project: ``cluster.start(n)`` to the first result."""

import sys
import time

from benchmarks_app import app, one
from stopwatch import report_first_result

import cluster


def main(workers: int) -> None:
    start = cluster.start  # imports what a start needs; the peers' imports don't count either
    called = time.monotonic()
    with start(workers, app=app, progress=False):
        report_first_result(one.delay().get(), called)


if __name__ == "__main__":
    main(int(sys.argv[1]))
