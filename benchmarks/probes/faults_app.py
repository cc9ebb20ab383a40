"""The Celery app of the probes of faults: this project's and stock Celery's."""

import os

import fault_tasks
from celery import Celery

#: Set for Celery as it comes, which acknowledges a task before it runs.
EARLY = "FAULTS_EARLY"

app = Celery("faults_app")
if EARLY not in os.environ:
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
    )

wait_for = app.task(fault_tasks.wait_for)
short = app.task(fault_tasks.short)
long = app.task(fault_tasks.long)
