"""Ray: ``ray.init``, as many actors as workers that have each answered, one result.

Ray's own workers come up when they are needed; actors make sure that all of them are there.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from stopwatch import report_first_result


class Worker:
    def one(self) -> int:
        return 1


def main(workers: int) -> None:
    scratch = Path.cwd() / "ray"
    called = time.monotonic()
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        logging_level=logging.ERROR,
        _temp_dir=str(scratch),
    )
    actors: list[Any] = [ray.remote(Worker).remote() for _ in range(workers)]
    ray.get([actor.one.remote() for actor in actors])
    report_first_result(ray.get(actors[0].one.remote()), called)
    ray.shutdown()


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would ask the internet
    main(int(sys.argv[1]))
