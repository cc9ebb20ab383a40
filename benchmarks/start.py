"""Start to first result: this project beside its peers, on this machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/start.py
    python benchmarks/start.py --repeat 3 --workers 1,2,4,8 --systems cluster,celery,dask

Each measurement is a fresh Python process. The first table counts from the call that starts
everything, with the client's imports done, to the first task's result after all workers have
answered; the second one from the start of that process. The systems take turns within each
repetition, so that what else the machine does hits all of them alike. A first round with one
worker isn't counted: it fills the caches.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from processes import adopt_orphans
from report import installed, machine, publish, spread, table
from runs import Run, run

from cluster.broker.server import find_server

OURS = "cluster"


@dataclass(frozen=True, slots=True)
class System:
    """Something that starts workers."""

    label: str
    distribution: str
    probe: str


SYSTEMS = {
    OURS: System("**celery-cluster**", "celery-cluster", "start_cluster"),
    "celery": System("Celery, by hand", "celery", "start_celery"),
    # A lower bound for Celery: all that somebody who knows it well could save.
    "celery-lean": System("Celery, by an expert's hand", "celery", "start_celery_lean"),
    "dask": System("Dask LocalCluster", "distributed", "start_dask"),
    "ray": System("Ray", "ray", "start_ray"),
    "ipyparallel": System("ipyparallel", "ipyparallel", "start_ipyparallel"),
}


@dataclass(slots=True)
class Times:
    """The measurements of one system with one number of workers, in seconds."""

    from_call: list[float] = field(default_factory=list)
    from_spawn: list[float] = field(default_factory=list)
    without_result: list[str] = field(default_factory=list)

    def add(self, measured: Run) -> None:
        if measured.data is None:
            self.without_result.append(measured.trouble or "no result")
        else:
            self.from_call.append(measured.data["came"] - measured.data["called"])
            self.from_spawn.append(measured.data["came"] - measured.spawned)


def main(
    repeat: Annotated[int, typer.Option(min=1, help="measurements of each kind")] = 5,
    workers: Annotated[str, typer.Option(help="numbers of workers")] = "1,2,4,8",
    systems: Annotated[str, typer.Option(help="those to compare")] = ",".join(SYSTEMS),
    deadline: Annotated[float, typer.Option(help="seconds until a run is killed")] = 120,
    output: Annotated[Path | None, typer.Option(help="write the Markdown there, too")] = None,
) -> None:
    """Measure how long it is from a start to the first result."""
    counts = [int(count) for count in workers.split(",")]
    chosen = _installed(systems.split(","))
    server = find_server("")
    about = machine(
        ["celery-cluster", *_peers(chosen)],
        f"{Path(server.path).name} {server.version}",
    )
    variables = {"BENCHMARK_SERVER": server.path}
    adopt_orphans()
    times = {(name, count): Times() for name in chosen for count in counts}
    for name in chosen:
        _measure(name, 1, deadline, variables, "not counted")
    for number in range(repeat):
        for count in counts:
            for name in _rotated(chosen, number):
                said = f"{number + 1} of {repeat}"
                times[name, count].add(_measure(name, count, deadline, variables, said))
    parts = [
        about,
        f"Start to first result, imports excluded; median (least–greatest) of {repeat}:",
        _table(chosen, counts, {key: value.from_call for key, value in times.items()}),
        "From the start of the Python process, imports included:",
        _table(chosen, counts, {key: value.from_spawn for key, value in times.items()}),
        *(
            f"{SYSTEMS[name].label}, {count} workers, without a result: {'; '.join(why)}."
            for (name, count), value in times.items()
            if (why := value.without_result)
        ),
    ]
    publish("\n\n".join(parts), output)


def _installed(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(SYSTEMS)}.")
    found = []
    for name in names:
        if installed(SYSTEMS[name].distribution):
            found.append(name)
        else:
            print(
                f"{name} is skipped: it isn't installed "
                "(pip install -r benchmarks/requirements.txt).",
                file=sys.stderr,
            )
    return found


def _peers(names: Sequence[str]) -> list[str]:
    return sorted({SYSTEMS[name].distribution for name in names if name != OURS})


def _rotated(names: Sequence[str], number: int) -> Sequence[str]:
    """Another one first each time, so that none always follows the same one."""
    shift = number % len(names) if names else 0
    return [*names[shift:], *names[:shift]]


def _measure(name: str, count: int, deadline: float, variables: dict[str, str], said: str) -> Run:
    system = SYSTEMS[name]
    measured = run(system.probe, str(count), deadline=deadline, variables=variables)
    took = ""
    if measured.data is not None:
        took = f"{measured.data['came'] - measured.data['called']:.2f} s"
    parts = [f"{said}: {name}, {count} worker{'s' * (count != 1)}", took, measured.trouble]
    print(", ".join(part for part in parts if part), file=sys.stderr)
    if measured.data is None:
        print(measured.log, file=sys.stderr)
    return measured


def _table(
    names: Sequence[str], counts: Sequence[int], seconds: dict[tuple[str, int], list[float]]
) -> str:
    header = ["", *(f"{count} worker{'s' * (count != 1)}" for count in counts)]
    return table(
        header,
        (
            [SYSTEMS[name].label, *(_cell(name, seconds, count) for count in counts)]
            for name in names
        ),
    )


def _cell(name: str, seconds: dict[tuple[str, int], list[float]], count: int) -> str:
    values, ours = seconds[name, count], seconds.get((OURS, count), [])
    text = spread(values, "s")
    if name != OURS and values and ours:
        text += f", {statistics.median(values) / statistics.median(ours):.1f}×"
    return text


if __name__ == "__main__":
    typer.run(main)
