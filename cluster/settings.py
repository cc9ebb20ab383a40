"""Every setting and every environment variable, in one place.

Two groups: what a *user* may set around a manager, and what a manager hands to
the *worker* it starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import environ

from cluster.errors import ConfigurationError

#: A worker ends itself this many seconds after it last reached the broker.
ORPHAN_TIMEOUT = 30.0

#: A worker that doesn't come back within this many seconds after the broker
#: was restarted is taken for dead.
LIVENESS_TIMEOUT = 10.0

#: A message is handed out at most this often before its task is given up.
MAX_DELIVERIES = 3

#: Seconds that running tasks get to finish when a cluster stops.
STOP_TIMEOUT = 3.0

#: Seconds that running tasks get when a platform tells a worker to leave:
#: Batch sends SIGKILL 30 s after SIGTERM, and handing back takes a moment too.
#: https://docs.aws.amazon.com/batch/latest/APIReference/API_TerminateJob.html
DRAIN_GRACE = 20.0

#: Seconds that one command to the broker may take, over all its clients.
#: kombu passes None for these, and a frozen broker then hangs a worker.
SOCKET_TIMEOUT = 5.0


@environ.config(prefix="CLUSTER", frozen=True)
class ManagerSettings:
    """What a user may set around the process that calls ``cluster.start``."""

    #: The launcher to use instead of the detected one.
    launcher: str = environ.var(default="", help="launcher to use instead of the detected one")
    #: The broker's server program, instead of the one that is found.
    broker_server: str = environ.var(
        default="", help="path of the redis-server or valkey-server to use"
    )


def _json(text: str) -> Any:
    return json.loads(text)


@environ.config(prefix="CLUSTER", frozen=True)
class WorkerSettings:
    """What a manager and its launcher hand to a worker."""

    id: str = environ.var(help="the cluster's id")
    address: str = environ.var(help="HOST:PORT of the broker")
    secret: str = environ.var(help="the run's secret, in hexadecimal")
    app: Any = environ.var(converter=_json, help="how to import the app, as JSON")
    version: str = environ.var(help="the manager's version of this package")
    worker: str = environ.var(help="the platform's name for this worker")
    concurrency: int = environ.var(default=1, converter=int, help="tasks at once")
    parent: int = environ.var(
        default=0, converter=int, help="process id whose end ends this worker; 0: none"
    )
    path: str = environ.var(default="", help="the manager's sys.path, as JSON")
    scratch: str = environ.var(
        default="", help="directory for the pool's own files; removed by the manager"
    )
    threads: int = environ.var(
        default=1, converter=int, help="threads for each task's numerical libraries"
    )
    loglevel: str = environ.var(default="WARNING", help="the worker's log level")


#: What a worker takes out of its environment once read: a task's own
#: subprocess must not inherit the run's secret, nor take itself for a worker.
WORKER_VARIABLES = tuple(
    f"CLUSTER_{name}"
    for name in (
        "ID",
        "ADDRESS",
        "SECRET",
        "APP",
        "VERSION",
        "WORKER",
        "CONCURRENCY",
        "PARENT",
        "PATH",
        "SCRATCH",
        "LOGLEVEL",
        "THREADS",
    )
)

#: How many threads a task's numerical libraries start: by themselves each process would start
#: one a CPU. What the user has set counts. The names are those of OpenMP, OpenBLAS, MKL, BLIS,
#: Accelerate and numexpr: https://github.com/joblib/threadpoolctl,
#: https://numexpr.readthedocs.io/en/latest/user_guide.html#threadpool-configuration
THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

#: These beat an app's own configuration (celery/app/utils.py, class Settings),
#: so they are set aside while an app is bound to a cluster.
CELERY_OVERRIDES = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
)


def manager_settings(environment: Mapping[str, str] | None = None) -> ManagerSettings:
    """Read the user's settings."""
    settings: ManagerSettings = environ.to_config(
        ManagerSettings, environ=dict(os.environ if environment is None else environment)
    )
    return settings


def worker_settings(environment: Mapping[str, str] | None = None) -> WorkerSettings:
    """Read what the manager handed over.

    Raises :class:`ConfigurationError` naming the variable that is missing or unusable.
    """
    source = dict(os.environ if environment is None else environment)
    try:
        settings: WorkerSettings = environ.to_config(WorkerSettings, environ=source)
    except environ.MissingEnvValueError as error:
        missing = ", ".join(sorted(error.args))
        raise ConfigurationError(
            f"not set: {missing}. Workers are started by a manager (cluster.start), which sets "
            "these; 'cluster worker' is what it runs, not a command to type by itself."
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"a CLUSTER_ variable can't be used: {error}") from error
    return settings
