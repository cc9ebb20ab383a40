"""``cluster demo``: a real job on a real cluster, on this machine."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster import start
from cluster.cli.primes import BELOW, PRIMES_BELOW, SPAN, app, count_primes

#: Seconds without any result after which the demo gives up.
PATIENCE = 120.0


def run(workers: int | None) -> bool:
    """Count primes and say what was done; returns whether the answer is right."""
    console = Console(highlight=False)
    spans = [(low, min(low + SPAN, BELOW)) for low in range(0, BELOW, SPAN)]
    console.print(f"How many primes are there below {BELOW:,}?")
    began = time.perf_counter()
    with start(workers, app=app, launcher="local") as cluster:
        ready = time.perf_counter()
        with Progress(
            TextColumn("counting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tasks"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            bar = progress.add_task("", total=len(spans))
            results = [count_primes.delay(*span) for span in spans]
            primes, work = 0, 0.0
            for result in results:
                count, seconds = result.get(timeout=PATIENCE)
                primes += count
                work += seconds
                progress.advance(bar)
        done = time.perf_counter()
        count_of_workers = len(cluster.workers)
    left = time.perf_counter()
    right = primes == PRIMES_BELOW
    elapsed = done - ready
    rate = work / elapsed
    rows = {
        "workers": f"{count_of_workers} (local processes), ready after {ready - began:.1f} s",
        "tasks": f"{len(spans)}, done in {elapsed:.1f} s",
        "answer": f"{primes:,} primes: "
        + ("right" if right else f"wrong, there are {PRIMES_BELOW:,}"),
        "work": f"{work:.1f} s of computing in {elapsed:.1f} s: {rate:.1f} tasks at a time",
        "stopped": f"broker and workers gone after another {left - done:.1f} s",
    }
    for name, text in rows.items():
        console.print(f"  {name:<9} {text}")
    return right
