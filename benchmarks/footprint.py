"""What a cluster of idle workers takes: memory by role, CPU at rest, a stop, the imports.

    python benchmarks/footprint.py
    python benchmarks/footprint.py --repeat 3 --workers 1,4 --output footprint.md

PSS counts a page that processes share once, split among them, so it can be summed; RSS counts it
in each. CPU is that of the manager and all processes below it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import adopt_orphans
from report import machine, publish, spread, table
from runs import run

from cluster.broker.server import find_server

MIB = 2**20

Data = Mapping[str, Any]


def main(
    repeat: Annotated[int, typer.Option(min=1, help="measurements of each kind")] = 5,
    workers: Annotated[str, typer.Option(help="numbers of workers")] = "1,2,4,8",
    imports: Annotated[int, typer.Option(min=1, help="measurements of the imports")] = 10,
    rest: Annotated[float, typer.Option(help="seconds at rest to take the CPU of")] = 5,
    deadline: Annotated[float, typer.Option(help="seconds until a run is killed")] = 120,
    output: Annotated[Path | None, typer.Option(help="write the Markdown there, too")] = None,
) -> None:
    """Measure memory, CPU at rest, a stop and the imports."""
    counts = [int(count) for count in workers.split(",")]
    server = find_server("")
    about = machine(
        ["celery-cluster", "celery", "kombu", "redis"],
        f"{Path(server.path).name} {server.version}",
    )
    adopt_orphans()
    _measure("imports", (), deadline, "not counted")
    idle: dict[int, list[Data]] = {count: [] for count in counts}
    for number in range(repeat):
        for count in counts:
            said = f"{number + 1} of {repeat}: {count} idle workers"
            idle[count].append(_measure("idle_cluster", (str(count), str(rest)), deadline, said))
    imported = [
        _measure("imports", (), deadline, f"imports {number + 1} of {imports}")
        for number in range(imports)
    ]
    parts = [
        about,
        f"Stop with idle workers, and CPU at rest; median (least–greatest) of {repeat}:",
        _stop_table(idle),
        f"Memory in MiB, as PSS (RSS), with the number of processes; median of {repeat}:",
        _memory_table(idle),
        f"Imports in fresh processes; median (least–greatest) of {imports}:",
        _import_table(imported),
    ]
    publish("\n\n".join(parts), output)


def _measure(probe: str, arguments: Sequence[str], deadline: float, said: str) -> Data:
    measured = run(probe, *arguments, deadline=deadline, variables={})
    print(said, measured.trouble, file=sys.stderr)
    if measured.data is None:
        print(measured.log, file=sys.stderr)
        raise typer.Exit(1)
    return measured.data


def _stop_table(idle: Mapping[int, Sequence[Data]]) -> str:
    header = ["workers", "stop, wall", "stop, CPU", "still ending after it", "CPU at rest"]
    rows = []
    for count, runs in idle.items():
        rest = [100 * data["share"] for data in runs]
        behind = max(data["behind"] for data in runs)
        rows.append(
            [
                str(count),
                spread([data["stop"] for data in runs], "s"),
                spread([data["stop_cpu"] for data in runs], "s"),
                f"at most {behind}" if behind else "none",
                spread(rest, "% of a CPU", 1),
            ]
        )
    return table(header, rows)


def _memory_table(idle: Mapping[int, Sequence[Data]]) -> str:
    roles = dict.fromkeys(
        role for runs in idle.values() for data in runs for role in data["memory"]
    )
    rows = [[role, *(_memory(runs, [role]) for runs in idle.values())] for role in roles]
    rows.append(["all", *(_memory(runs, list(roles)) for runs in idle.values())])
    return table(["", *(_workers(count) for count in idle)], rows)


def _memory(runs: Sequence[Data], roles: Sequence[str]) -> str:
    def middle(key: str) -> float:
        sums = [sum(data["memory"].get(role, {}).get(key, 0) for role in roles) for data in runs]
        return float(statistics.median(sums))

    processes = middle("processes")
    if not processes:
        return "–"
    return f"{middle('pss') / MIB:.1f} ({middle('rss') / MIB:.1f}), {processes:.0f}"


def _import_table(runs: Sequence[Data]) -> str:
    def cost(*keys: str) -> str:
        return spread([1000 * sum(data[key] for key in keys) for data in runs], "ms", 1)

    modules = statistics.median(data["modules"] for data in runs)
    rows = [
        ["`from celery import Celery`", cost("celery")],
        ["`import cluster` after it", cost("package")],
        ["`cluster.start` after that, not called", cost("start")],
        [f"both of ours, {modules:.0f} modules", cost("package", "start")],
    ]
    return table(["", "time"], rows)


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


if __name__ == "__main__":
    typer.run(main)
