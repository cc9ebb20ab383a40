"""ipyparallel: a controller and engines, all of them connected, one result."""

import sys
import time

import ipyparallel  # type: ignore[import-untyped]
from stopwatch import report_first_result


def one() -> int:
    return 1


def main(workers: int) -> None:
    called = time.monotonic()
    cluster = ipyparallel.Cluster(n=workers)
    client = cluster.start_and_connect_sync()
    report_first_result(client[0].apply_sync(one), called)
    client.close()
    cluster.stop_cluster_sync()


if __name__ == "__main__":
    main(int(sys.argv[1]))
