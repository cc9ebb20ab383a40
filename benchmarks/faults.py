"""The same faults on this project and on its peers: what is lost, what hangs, how long it takes.

    pip install -r benchmarks/requirements.txt
    python benchmarks/faults.py
    python benchmarks/faults.py --repeat 1 --systems cluster,celery --faults killed,storm

Each fault happens in a fresh Python process, to a system of its own with four workers. Systems
start and have their faults one after the other; only the waiting for a recovery that hasn't come
within five seconds goes on side by side, for a minute at most. What nothing repairs within that
minute is tried once, all else as often as asked for.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from processes import adopt_orphans
from report import installed, machine, publish, table
from runs import Run, run

from cluster.broker.server import find_server

Data = Mapping[str, Any]

#: Seconds after which a probe gives up on a recovery.
CAP = 60

#: Probes that wait side by side.
AT_ONCE = 40


@dataclass(frozen=True, slots=True)
class System:
    """Something that runs tasks."""

    label: str
    distribution: str
    without: frozenset[str] = frozenset()  # faults that say nothing about it


#: A worker of these is one process, which runs the tasks.
_ONE_PROCESS = frozenset({"killed_pool"})

#: By the name that the probe knows.
SYSTEMS = {
    "cluster": System("**celery-cluster**", "celery-cluster"),
    "celery": System("Celery, late acknowledgement", "celery"),
    "celery-early": System(
        "Celery, defaults",
        "celery",
        # What it has in common with the other.
        frozenset({"frozen", "broker_frozen", "workers_gone", "manager_killed"}),
    ),
    "dask": System("Dask", "distributed", _ONE_PROCESS),
    "ray": System(
        "Ray",
        "ray",
        # Where its queue is, and what could keep its workers from coming back, is spread
        # over several processes.
        _ONE_PROCESS | {"broker_killed", "broker_frozen", "workers_gone"},
    ),
}


# -- what a cell says ------------------------------------------------------------------------


def _seconds(runs: Sequence[Data]) -> str:
    """How long it took; one that never came within the cap stands for all."""
    values = [data["seconds"] for data in runs]
    if None in values:
        left = max(data.get("left", 0) for data in runs)
        return f"> {CAP} s" + (f", {left} left" if left else "")
    return _spread(values)


def _spread(values: Sequence[float]) -> str:
    text = _short(median(values))
    if len(values) > 1:
        text += f" ({_short(min(values), '')}–{_short(max(values), '')})"
    return text


def _short(seconds: float, unit: str = " s") -> str:
    return f"{seconds:.{2 if seconds < 10 else 0}f}{unit}"


def _storm(runs: Sequence[Data]) -> str:
    missing = _range([data["missing"] for data in runs])
    again = _range([data["again"] for data in runs])
    return f"{missing} missing, {again} runs too many"


def _arrived(runs: Sequence[Data]) -> str:
    results = _range([data["results"] for data in runs])
    again = _range([data["again"] for data in runs])
    return f"{results} of {runs[0]['wanted']}, {again} runs too many"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}–{most}"


def _get(runs: Sequence[Data]) -> str:
    """What a waiting ``get()`` did."""
    ends = dict.fromkeys(data["get"] for data in runs)
    if "hangs" in ends:
        return f"hangs (> {CAP} s)"
    parts = []
    for end in ends:
        values = [data["get_seconds"] for data in runs if data["get"] == end]
        verb, *names = end.split()
        parts.append(
            f"{' '.join([verb, *(f'`{name}`' for name in names)])} after {_spread(values)}"
        )
    return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    label: str
    fault: str
    cell: Callable[[Sequence[Data]], str]


ROWS = (
    Row("worker killed: its task runs again after", "killed", _seconds),
    Row("process of its pool killed: the same", "killed_pool", _seconds),
    Row("5 workers killed during 300 tasks", "storm", _storm),
    Row("worker frozen: its task runs again after", "frozen", _seconds),
    Row("broker killed, 4 tasks running and 100 queued: results", "broker_killed", _arrived),
    Row("the same: a waiting `get()`", "broker_killed", _get),
    Row("broker frozen: a waiting `get()`", "broker_frozen", _get),
    Row("all workers dead, none can start: a waiting `get()`", "workers_gone", _get),
    Row("script killed, workers busy: all gone after", "manager_killed", _seconds),
)

FAULTS = tuple(dict.fromkeys(row.fault for row in ROWS))


# -- measuring ---------------------------------------------------------------------------------


def main(
    repeat: Annotated[
        int, typer.Option(min=1, help="measurements of each kind, save where the minute passes")
    ] = 2,
    systems: Annotated[str, typer.Option(help="those to compare")] = ",".join(SYSTEMS),
    faults: Annotated[str, typer.Option(help="those that happen")] = ",".join(FAULTS),
    deadline: Annotated[float, typer.Option(help="seconds until a run is killed")] = 600,
    output: Annotated[Path | None, typer.Option(help="write the Markdown there, too")] = None,
) -> None:
    """Let faults happen and see what comes of them."""
    names = [name for name in _known(systems, SYSTEMS) if installed(SYSTEMS[name].distribution)]
    wanted = _known(faults, FAULTS)
    server = find_server("")
    distributions = dict.fromkeys(["celery-cluster", *(SYSTEMS[n].distribution for n in names)])
    about = machine(distributions, f"{Path(server.path).name} {server.version}")
    measured: dict[tuple[str, str], list[Data]] = {}
    troubles: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        variables = {
            "BENCHMARK_SERVER": server.path,
            "CLUSTER_BROKER_SERVER": server.path,
            "BENCHMARK_TURN": str(Path(scratch, "turn")),
        }
        with ProcessPoolExecutor(AT_ONCE, initializer=adopt_orphans) as pool:
            pending = {
                (name, fault): pool.submit(_measure, name, fault, repeat, deadline, variables)
                for fault in wanted
                for name in names
                if fault not in SYSTEMS[name].without
            }
            for (name, fault), future in pending.items():
                runs = future.result()
                measured[name, fault] = [ended.data for ended in runs if ended.data is not None]
                troubles += [
                    f"{SYSTEMS[name].label}, {fault}, without a result: {ended.trouble}."
                    for ended in runs
                    if ended.data is None
                ]
    header = ["", *(SYSTEMS[name].label for name in names)]
    rows = [
        [row.label, *(_cell(row, measured.get((name, row.fault), ())) for name in names)]
        for row in ROWS
        if row.fault in wanted
    ]
    said = f"4 workers each; median (least–greatest) of {repeat}, waiting for {CAP} s at most:"
    publish("\n\n".join([about, said, table(header, rows), *troubles]), output)


def _known(text: str, known: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(known)}.")
    return names


def _measure(
    name: str, fault: str, repeat: int, deadline: float, variables: Mapping[str, str]
) -> Sequence[Run]:
    runs = []
    for number in range(repeat):
        ended = run("faults", name, fault, str(number), deadline=deadline, variables=variables)
        runs.append(ended)
        print(f"{number + 1} of {repeat}: {name}, {fault}", ended.data or "", file=sys.stderr)
        if ended.data is None:
            print(ended.trouble, ended.log, sep="\n", file=sys.stderr)
        elif _is_hopeless(ended.data):
            break
    return runs


def _is_hopeless(data: Data) -> bool:
    """Whether the cap was reached: it would be again."""
    return data.get("get") == "hangs" or ("seconds" in data and data["seconds"] is None)


def _cell(row: Row, runs: Sequence[Data]) -> str:
    return row.cell(runs) if runs else "–"


if __name__ == "__main__":
    typer.run(main)
