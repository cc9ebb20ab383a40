"""What a cluster is to be: all that can be known, and refused, before anything is started."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import os
import warnings
from dataclasses import dataclass
from typing import Any

from celery import Celery

from cluster.appref import AppRef, find_app, locate, task_names
from cluster.binding import check_unbound
from cluster.broker.memory import available
from cluster.broker.server import Server, find_server
from cluster.errors import ConfigurationError
from cluster.launchers import base
from cluster.launchers.base import Launcher
from cluster.mismatch import Side
from cluster.model import Limits, Severity
from cluster.settings import (
    BROKER_MEMORY_AT_LEAST,
    MESSAGE_AT_MOST,
    MESSAGE_LIMIT,
    MESSAGES_IN_MEMORY,
    ManagerSettings,
    manager_settings,
)
from cluster.versions import versions
from cluster.wire import identity

logger = logging.getLogger("cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The arguments of ``cluster.start``, validated and with their defaults filled in."""

    app: Celery
    ref: AppRef
    side: Side  # what this process runs, and workers must, too
    launcher: Launcher
    server: Server
    workers: int
    minimum: int
    timeout: float  # seconds
    limits: Limits


def make_plan(
    *,
    workers: int | None,
    minimum: int | None,
    app: Celery | str | None,
    launcher: str | Launcher | None,
    timeout: float | None,
    options: dict[str, Any],
) -> Plan:
    """Make sense of the arguments of ``cluster.start``; see there.

    Raises:
        ConfigurationError: one of them, or a setting, can't be used.
        StateError: this is no place or no time to start one.
    """
    if identity.current() is not None:
        identity.refuse_start()
    settings = manager_settings()
    chosen = launcher if launcher is not None else base.detect(os.environ, settings.launcher)
    made = base.make(chosen, options)
    target = made.defaults.workers if workers is None else workers
    if target is None:
        raise ConfigurationError(
            f"Say how many workers: cluster.start(4). The launcher {made.name!r} has no default."
        )
    wanted = count("workers", target)
    least = wanted if minimum is None else count("minimum", minimum)
    if least > wanted:
        raise ConfigurationError(f"minimum={least} is more than workers={wanted}.")
    limit = made.defaults.timeout if timeout is None else seconds("timeout", timeout)
    if limit == 0:
        raise ConfigurationError("timeout=0: no worker is ready at once. Give more seconds.")
    found = find_app(app)
    check_unbound(found)
    if found.conf.task_always_eager:
        raise ConfigurationError(
            f"{found!r} has task_always_eager=True: its tasks run in this process when they are "
            "called, and no worker would get one. Set it to False to use a cluster."
        )
    ref = locate(found, app if isinstance(app, str) else "")
    for finding in made.preflight(wanted, least):
        match finding.severity:
            case Severity.REFUSE:
                raise ConfigurationError(finding.message)
            case Severity.WARN:
                warnings.warn(finding.message, RuntimeWarning, stacklevel=3)
            case Severity.INFORM:
                logger.info("%s", finding.message)
    return Plan(
        app=found,
        ref=ref,
        side=Side(versions(), tuple(sorted(task_names(found, ref)))),
        launcher=made,
        server=find_server(settings.broker_server, tls=made.defaults.tls),
        workers=wanted,
        minimum=least,
        timeout=limit,
        limits=_limits(settings),
    )


def _limits(settings: ManagerSettings) -> Limits:
    memory = settings.broker_memory or max(available() // 2, BROKER_MEMORY_AT_LEAST)
    if memory < BROKER_MEMORY_AT_LEAST:
        raise ConfigurationError(
            f"CLUSTER_BROKER_MEMORY is {memory} bytes, and a broker needs "
            f"{BROKER_MEMORY_AT_LEAST // 2**20}MiB at least."
        )
    most = min(MESSAGE_AT_MOST, memory // MESSAGES_IN_MEMORY)
    if settings.message_limit > most:
        raise ConfigurationError(
            f"CLUSTER_MESSAGE_LIMIT is {settings.message_limit} bytes, and {most} is the most: a "
            f"quarter of the broker's memory (CLUSTER_BROKER_MEMORY), and no more than 512MiB."
        )
    return Limits(
        liveness_timeout=settings.liveness_timeout,
        orphan_timeout=settings.orphan_timeout,
        max_deliveries=settings.max_deliveries,
        broker_memory=memory,
        message_limit=settings.message_limit or min(MESSAGE_LIMIT, most),
    )


def count(name: str, value: int) -> int:
    """Raise :class:`ConfigurationError` unless ``value`` is a whole number, 0 or more."""
    try:
        number = operator.index(value)  # NumPy's whole numbers as well
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise ConfigurationError(f"{name}={value!r}: give a whole number, 0 or more.")
    return number


def seconds(name: str, value: float) -> float:
    """Raise :class:`ConfigurationError` unless ``value`` is a number of seconds that end."""
    number = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ConfigurationError(f"{name}={value!r}: give a number of seconds, 0 or more.")
    return number
