"""What this project's imports cost a process that has Celery's already."""

import sys
import time

_began = time.perf_counter()

from celery import Celery  # noqa: E402, F401

_celery = time.perf_counter()
_before = len(sys.modules)

import cluster  # noqa: E402

_package = time.perf_counter()

_start = cluster.start

_touched = time.perf_counter()
_after = len(sys.modules)

from stopwatch import report  # noqa: E402

report(
    {
        "celery": _celery - _began,
        "package": _package - _celery,
        "start": _touched - _package,
        "modules": _after - _before,
    }
)
