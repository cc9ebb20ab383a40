"""Dask: ``LocalCluster`` and a client, all workers there, one result."""

import sys
import time

from distributed import Client, LocalCluster
from stopwatch import report_first_result


def one() -> int:
    return 1


def main(workers: int) -> None:
    called = time.monotonic()
    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        client.wait_for_workers(workers)
        report_first_result(client.submit(one).result(), called)


if __name__ == "__main__":
    main(int(sys.argv[1]))
