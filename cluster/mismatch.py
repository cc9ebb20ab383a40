"""Does a worker run what the manager runs? Pure; both sides ask.

A worker that can't work with the manager ends before it takes a task. What may
work is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster import tables

#: Names of missing tasks that a table shows.
NAMES_SHOWN = 5

#: Workers that a row names before it only counts them.
WORKERS_NAMED = 2


@dataclass(frozen=True, slots=True)
class Side:
    """What a process runs: versions by name, and the names of its tasks."""

    versions: Mapping[str, str]
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of the table."""

    what: str
    manager: str
    worker: str
    fatal: bool
    meaning: str


def compare(manager: Side, worker: Side) -> tuple[Difference, ...]:
    """What differs and matters."""
    found = []
    for what, mine in manager.versions.items():
        its = worker.versions.get(what, "unknown")
        judged = _judge(what, mine, its)
        if judged is not None:
            found.append(Difference(what, mine, its, *judged))
    missing = sorted(set(manager.tasks) - set(worker.tasks))
    if missing:
        none = len(missing) == len(manager.tasks)
        names = ", ".join(missing[:NAMES_SHOWN]) + (", …" if missing[NAMES_SHOWN:] else "")
        found.append(
            Difference(
                "tasks",
                str(len(manager.tasks)),
                str(len(manager.tasks) - len(missing)),
                none,
                f"not registered there: {names}. Define tasks at the top level of a module or of "
                'the script, not in a function nor under if __name__ == "__main__".',
            )
        )
    return tuple(found)


def _judge(what: str, mine: str, its: str) -> tuple[bool, str] | None:
    """Whether two versions can't work together, and why they mightn't; ``None``: they do."""
    if mine == its:
        return None
    if what == "celery-cluster":
        return True, "they must be the same"
    major, minor = _first(mine, 1) != _first(its, 1), _first(mine, 2) != _first(its, 2)
    if not minor:
        return None
    if what == "Python":
        return major, "pickled arguments and results may not load"
    if major:
        return True, "another major version"
    return False, "may behave differently"


def _first(version: str, parts: int) -> list[str]:
    return version.split(".")[:parts]


@dataclass(slots=True)
class Mismatches:
    """All that was found since the start, by what differs.

    Args:
        manager: what this side runs.
    """

    manager: Side
    _found: dict[Difference, dict[str, None]] = field(default_factory=dict)  # a set, in order

    def join(self, worker: str, side: Side) -> tuple[bool, bool]:
        """A worker joins: whether it must be refused, and whether that is any news.

        Args:
            worker: its id.
            side: what it runs.
        """
        differences = compare(self.manager, side)
        news = not all(difference in self._found for difference in differences)
        for difference in differences:
            self._found.setdefault(difference, {})[worker] = None
        return any(difference.fatal for difference in differences), news

    def __str__(self) -> str:
        rows = [("", "manager", "worker", "on", "")]
        for difference, workers in self._found.items():
            on = ", ".join(workers) if len(workers) <= WORKERS_NAMED else f"{len(workers)} workers"
            verdict = "can't work: " if difference.fatal else ""
            said = verdict + difference.meaning
            rows.append((difference.what, difference.manager, difference.worker, on, said))
        return tables.text(rows)
