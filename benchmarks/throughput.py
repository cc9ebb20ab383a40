"""Tasks a second and round trips: what durability costs, beside stock Celery.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --repeat 5 --share 0.2 --systems cluster,durable

Each measurement is a fresh Python process with workers of its own. The systems take turns within
each repetition, so that what else the machine does hits all of them alike.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import adopt_orphans
from report import machine, publish, spread, table
from runs import run

from cluster.broker.server import find_server

OURS = "cluster"

#: By the name that the probe knows.
SYSTEMS = {
    OURS: "**celery-cluster**",
    "durable": "Celery, durable Redis",
    "forgetful": "Celery, Redis without persistence",
}

#: How many of each, with a share of 1.
COUNTS = {
    "publish": 3000,
    "tasks": 3000,
    "group": 1000,
    "round_trips": 500,
    "drain": 5000,
    "payloads": 200,
    "commands": 200,
}

#: Bytes of a large argument, and of a large result.
PAYLOAD = 1_000_000

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    label: str
    value: Callable[[Data], float]
    unit: str
    digits: int = 0
    more_is_better: bool = True


def main(
    repeat: Annotated[int, typer.Option(min=1, help="measurements of each kind")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="number of workers")] = 2,
    share: Annotated[float, typer.Option(help="of the numbers of tasks, to be quicker")] = 1,
    systems: Annotated[str, typer.Option(help="those to compare")] = ",".join(SYSTEMS),
    deadline: Annotated[float, typer.Option(help="seconds until a run is killed")] = 180,
    output: Annotated[Path | None, typer.Option(help="write the Markdown there, too")] = None,
) -> None:
    """Measure publishing, running and fetching many tasks, and single ones."""
    names = systems.split(",")
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(SYSTEMS)}.")
    counts = {name: max(1, round(count * share)) for name, count in COUNTS.items()}
    server = find_server("")
    about = machine(
        ["celery-cluster", "celery", "kombu", "redis"],
        f"{Path(server.path).name} {server.version}",
    )
    variables = {"BENCHMARK_SERVER": server.path, "CLUSTER_BROKER_SERVER": server.path}
    adopt_orphans()
    measured: dict[str, list[Data]] = {name: [] for name in names}
    for number in range(repeat):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            arguments = (name, str(workers), json.dumps({**counts, "payload": PAYLOAD}))
            result = run("throughput", *arguments, deadline=deadline, variables=variables)
            print(f"{number + 1} of {repeat}: {name}", result.trouble, file=sys.stderr)
            if result.data is None:
                print(result.log, file=sys.stderr)
                continue
            measured[name].append(result.data)
    said = f"{workers} worker{'s' * (workers != 1)}; median (least–greatest) of {repeat}:"
    parts = [
        about,
        f"With {said}",
        _table(measured, _rows(counts)),
        "Commands a task that clients send to the server, with its result:",
        _commands(measured),
    ]
    publish("\n\n".join(parts), output)


def _rows(counts: Mapping[str, int]) -> Sequence[Row]:
    def of(key: str) -> Callable[[Data], float]:
        return lambda data: float(data[key])

    def rate_of(key: str) -> Callable[[Data], float]:
        return lambda data: float(data[key]["rate"])

    def cpu_of(key: str) -> Callable[[Data], float]:
        return lambda data: 1000 * float(data[key]["cpu"])

    def percentile(percent: int) -> Callable[[Data], float]:
        return lambda data: 1000 * _percentile(data["round_trips"], percent)

    number = {name: f"{count:,}" for name, count in counts.items()}
    rate = "/s"
    return [
        Row(f"`delay()`, {number['publish']} tasks with results", of("publish"), rate),
        Row("`delay()`, as many with `ignore_result`", of("publish_ignored"), rate),
        Row(f"`delay()` and `get()` of {number['tasks']} tasks", rate_of("tasks"), rate),
        Row(f"a `group` of {number['group']}, sent and fetched", of("group"), rate),
        Row(f"workers draining {number['drain']} queued tasks", of("drain"), rate),
        Row(f"{number['payloads']} tasks with 1 MB each way", rate_of("payloads"), rate),
        *(
            Row(f"round trip of one task, p{percent}", percentile(percent), "ms", 1)
            for percent in (50, 95, 99)
        ),
        Row("CPU of all processes for one task", cpu_of("tasks"), "ms", 2),
        Row("the same with 1 MB each way", cpu_of("payloads"), "ms", 2),
    ]


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _table(measured: Mapping[str, Sequence[Data]], rows: Sequence[Row]) -> str:
    header = ["", *(SYSTEMS[name] for name in measured)]
    return table(
        header, ([row.label, *(_cell(row, name, measured) for name in measured)] for row in rows)
    )


def _cell(row: Row, name: str, measured: Mapping[str, Sequence[Data]]) -> str:
    values = [row.value(data) for data in measured[name]]
    ours = [row.value(data) for data in measured.get(OURS, ())]
    text = spread(values, row.unit, row.digits)
    if name != OURS and values and ours:
        text += f", {statistics.median(values) / statistics.median(ours):.2f}×"
    return text


def _commands(measured: Mapping[str, Sequence[Data]]) -> str:
    rows = []
    for name, runs in measured.items():
        if not runs:
            continue
        last = runs[-1]["commands"]
        often = sorted(
            (item for item in last.items() if item[1] >= 0.05), key=lambda item: -item[1]
        )
        parts = [f"{command} {each:.1f}" for command, each in often]
        rows.append([SYSTEMS[name], f"{sum(last.values()):.1f}", ", ".join(parts)])
    return table(["", "all", "of them"], rows)


if __name__ == "__main__":
    typer.run(main)
