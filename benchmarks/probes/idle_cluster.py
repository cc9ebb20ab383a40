"""This project with idle workers: memory by role, CPU at rest, and what a stop takes."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict

import cpu
import psutil
from benchmarks_app import app, one
from processes import adopt_orphans, wait_until_gone
from roles import roles
from stopwatch import report

import cluster

#: Seconds for what a stop left running, if anything.
GONE_TIMEOUT = 5.0


def main(workers: int, rest: float) -> None:
    adopt_orphans()  # their CPU time is counted when they are reaped, so it must be by this one
    running = cluster.start(workers, app=app, progress=False)
    one.delay().get()  # so that the manager has what every manager comes to have
    memory = _memory()
    began, used = time.monotonic(), cpu.seconds()
    time.sleep(rest)  # nothing is waited for: this is what is measured
    share = (cpu.seconds() - used) / (time.monotonic() - began)
    used, began = cpu.seconds(), time.monotonic()
    running.stop()
    took = time.monotonic() - began
    behind = wait_until_gone(0)
    if behind and wait_until_gone(GONE_TIMEOUT):
        raise RuntimeError(f"A stop left {behind} running.")
    report(
        {
            "memory": memory,
            "share": share,
            "stop": took,
            "stop_cpu": cpu.seconds() - used,
            "behind": len(behind),
        }
    )


def _memory() -> dict[str, dict[str, int]]:
    found: defaultdict[str, dict[str, int]] = defaultdict(
        lambda: {"processes": 0, "pss": 0, "rss": 0}
    )
    for process, role in roles(psutil.Process(os.getpid())).items():
        info = process.memory_full_info()
        entry = found[role]
        entry["processes"] += 1
        entry["rss"] += info.rss
        entry["pss"] += getattr(info, "pss", 0)  # Linux only
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
