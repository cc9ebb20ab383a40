"""Every setting and every environment variable, in one place.

Two groups: what a *user* may set around a manager, and what a manager hands to
the *worker* it starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import environ

from cluster.errors import ConfigurationError

#: A worker ends itself this many seconds after it last reached the broker.
ORPHAN_TIMEOUT = 30.0

#: Who has given no sign of life is taken for dead within this many seconds: a worker that is
#: frozen or cut off, a broker that hangs, a guardian.
LIVENESS_TIMEOUT = 10.0

#: Signs of life that a worker gives in that time.
BEATS = 10

#: A task whose process has died this often is given up.
MAX_DELIVERIES = 3

#: Bytes that one message or result may have: what Redis takes, and what is still sensible to
#: send through one.
#: https://redis.io/docs/latest/operate/oss_and_stack/management/config/ (proto-max-bulk-len)
MESSAGE_AT_MOST = 512 * 2**20
MESSAGE_LIMIT = 64 * 2**20

#: Bytes that a broker needs at least, empty and with its connections.
BROKER_MEMORY_AT_LEAST = 32 * 2**20

#: Of the broker's memory, the part that one message may take.
MESSAGES_IN_MEMORY = 4

#: Parts of the broker's memory: from the first on, senders are refused; from the second on, large
#: results (:mod:`cluster.broker.room`).
SENDERS_REFUSED_FROM = 0.6
LARGE_REFUSED_FROM = 0.8

#: Seconds that running tasks get to finish when a cluster stops.
STOP_TIMEOUT = 3.0

#: Seconds that running tasks get when a platform tells a worker to leave:
#: Batch sends SIGKILL 30 s after SIGTERM, and handing back takes a moment too.
#: https://docs.aws.amazon.com/batch/latest/APIReference/API_TerminateJob.html
DRAIN_GRACE = 20.0

#: Seconds that one command to the broker may take, over all its clients.
#: kombu passes None for these, and a frozen broker then hangs a worker.
SOCKET_TIMEOUT = 5.0


def _json(text: str) -> Any:
    return json.loads(text)


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if not text:
        return 0
    try:
        return int(TypeAdapter(ByteSize).validate_python(str(text)))
    except ValidationError:
        raise ValueError("give a size such as 500MB or 2GiB") from None


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1):
        raise ValueError("give a number of seconds, 1 or more")
    return number


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("give a whole number, 1 or more")
    return number


@environ.config(prefix="CLUSTER", frozen=True)
class ManagerSettings:
    """What a user may set around the process that calls ``cluster.start``."""

    #: The launcher to use instead of the detected one.
    launcher: str = environ.var(default="", help="launcher to use instead of the detected one")
    #: The broker's server program, instead of the one that is found.
    broker_server: str = environ.var(
        default="", help="path of the redis-server or valkey-server to use"
    )
    #: The broker's memory in bytes; 0: half of what this process may use.
    broker_memory: int = environ.var(
        default=0, converter=_bytes, help="memory for queued tasks and results, such as 2GiB"
    )
    #: The size of one message or result in bytes; 0: as fits the broker's memory.
    message_limit: int = environ.var(
        default=0, converter=_bytes, help="the largest message or result, such as 100MiB"
    )
    liveness_timeout: float = environ.var(
        default=LIVENESS_TIMEOUT,
        converter=_seconds,
        help="seconds that a worker or the broker may be silent until it counts as dead",
    )
    orphan_timeout: float = environ.var(
        default=ORPHAN_TIMEOUT,
        converter=_seconds,
        help="seconds without the broker after which a worker ends itself",
    )
    max_deliveries: int = environ.var(
        default=MAX_DELIVERIES,
        converter=_positive,
        help="how often a task's process may die before the task is given up",
    )


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
    liveness_timeout: float = environ.var(default=LIVENESS_TIMEOUT, converter=_seconds)
    orphan_timeout: float = environ.var(default=ORPHAN_TIMEOUT, converter=_seconds)
    max_deliveries: int = environ.var(default=MAX_DELIVERIES, converter=_positive)
    message_limit: int = environ.var(default=MESSAGE_LIMIT, converter=int)


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
        "LIVENESS_TIMEOUT",
        "ORPHAN_TIMEOUT",
        "MAX_DELIVERIES",
        "MESSAGE_LIMIT",
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
    """Read the user's settings.

    Raises :class:`ConfigurationError` naming the variable that is unusable.
    """
    source = os.environ if environment is None else environment
    given = {name: text for name, text in source.items() if text and name.startswith("CLUSTER_")}
    for name, text in given.items():
        try:
            environ.to_config(ManagerSettings, environ={name: text})
        except ValueError as error:
            raise ConfigurationError(f"{name}={text}: {error}.") from error
    settings: ManagerSettings = environ.to_config(ManagerSettings, environ=given)
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
