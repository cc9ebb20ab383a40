"""What of the app's settings the manager's user should hear of.

Only a worker knows: here the cluster's defaults hold, so that what differs was
set by the app, wherever it did.
"""

from __future__ import annotations

from typing import Any

#: Task names that a remark lists.
NAMES_SHOWN = 5


def remarks(app: Any, concurrency: int) -> tuple[str, ...]:
    """In words, one sentence or two each.

    Args:
        app: the app, finalized.
        concurrency: the processes that its pool here has.
    """
    return (
        *_at_risk(
            app,
            "task_acks_late",
            "acks_late",
            "A task is acknowledged before it is run, and lost if its worker dies.",
        ),
        *_at_risk(
            app,
            "task_reject_on_worker_lost",
            "reject_on_worker_lost",
            "A task whose process dies is not run again; its result is WorkerLostError.",
        ),
        *_not_used(app, concurrency),
    )


def _at_risk(app: Any, setting: str, attribute: str, meaning: str) -> list[str]:
    if not app.conf[setting]:
        return [f"{setting}=False is set. {meaning}"]
    names = sorted(
        name
        for name, task in app.tasks.items()
        if not name.startswith("celery.") and not getattr(task, attribute)
    )
    if not names:
        return []
    listed = ", ".join(names[:NAMES_SHOWN]) + (", …" if names[NAMES_SHOWN:] else "")
    return [f"{attribute}=False is set for {listed}. {meaning}"]


def _not_used(app: Any, concurrency: int) -> list[str]:
    said = []
    if app.conf.value_set_for("worker_pool") and app.conf.worker_pool not in (
        "prefork",
        "processes",
    ):
        said.append(
            f"worker_pool={app.conf.worker_pool!r} is not used: a cluster's workers run tasks in "
            "processes (prefork)."
        )
    if app.conf.value_set_for("worker_concurrency") and app.conf.worker_concurrency != concurrency:
        said.append(
            f"worker_concurrency={app.conf.worker_concurrency!r} is not used: each worker runs "
            f"{concurrency} at once. Say it to cluster.start: concurrency=…"
        )
    return said
