"""What a run has shown, as text and JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from chaos.drive import Run

#: Failures of each sort that are told in full.
SHOWN = 20


def failures(run: Run) -> list[str]:
    """All that must not be; empty if the run is a success."""
    return [*run.troubles, *run.verdict.failures]


def as_data(run: Run) -> dict[str, Any]:
    """For machines."""
    verdict = run.verdict
    return {
        "seed": run.plan.seed,
        "workers": run.plan.workers,
        "concurrency": run.plan.concurrency,
        "seconds": round(run.seconds, 1),
        "kills": len(run.faults),
        "kills_by_kind": dict(Counter(fault.kind for fault in run.faults).most_common()),
        "batches": run.batches,
        "tasks": verdict.tasks,
        "right": verdict.right,
        "missing": len(verdict.missing),
        "wrong": len(verdict.wrong),
        "executions": verdict.executions,
        "executions_beyond_one": dict(verdict.again.most_common()),
        "unexplained": len(verdict.unexplained),
        "longest_wait": {
            why: round(seconds, 3) for why, seconds in sorted(verdict.longest_wait.items())
        },
        "whole_again_after": round(run.healing, 2),
        "stopped_after": round(run.stopping, 2),
        "failures": failures(run),
        "explained": verdict.explained,
        "faults": [
            [round(fault.at, 4), fault.kind, *fault.workers, *fault.pids] for fault in run.faults
        ],
    }


def as_json(run: Run) -> str:
    return json.dumps(as_data(run), indent=2)


def as_text(run: Run) -> str:
    """For people."""
    data = as_data(run)
    verdict = run.verdict
    again = sum(verdict.again.values())
    lines = [
        f"seed {data['seed']}: {data['kills']} kills in {data['seconds']:.0f} s",
        f"{data['workers']} workers with {data['concurrency']} at once",
        *_table(data["kills_by_kind"]),
        "tasks: {tasks}, right {right}, missing {missing}, wrong {wrong}".format(**data),
        f"executions: {data['executions']}",
        f"run again with a reason: {again}, without one: {data['unexplained']}",
        *(
            f"{count:8}  {why}" + _waited(verdict.longest_wait.get(why))
            for why, count in verdict.again.most_common()
        ),
        f"whole again {data['whole_again_after']} s after the last result",
        f"stopped in {data['stopped_after']} s",
    ]
    failed = failures(run)
    if failed:
        lines += [f"{len(failed)} FAILURES with seed {data['seed']}:"]
        lines += [f"  {failure}" for failure in failed[:SHOWN]]
    return "\n".join(lines)


def _table(counts: dict[str, int]) -> list[str]:
    return [f"{count:8}  {kind}" for kind, count in counts.items()]


def _waited(seconds: float | None) -> str:
    return "" if seconds is None else f" (the longest wait until then: {seconds:.2f} s)"
