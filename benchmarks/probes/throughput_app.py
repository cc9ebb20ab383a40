"""The app of the probes that measure throughput, the same one for all systems.

The settings are what this project's workers have by themselves, and what somebody who
doesn't want to lose a task would set for stock Celery's.
"""

from celery import Celery

app = Celery("throughput_app")
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
)


@app.task  # type: ignore[untyped-decorator]
def nothing() -> None:
    pass


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def nothing_kept() -> None:
    pass


@app.task  # type: ignore[untyped-decorator]
def echo(text: str) -> str:
    return text
