"""Binds an app to a cluster's broker and back.

An app's own configuration stays its own. Three classes of settings:

*Ours always*: where the broker and the results are, the transport and its
keys. Set on top of whatever the app says, and taken off again.

*The user's, with other defaults than Celery's*: acknowledge late, fetch one at
a time. A default only; what the app says counts.

*The user's*: all else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import celery
import kombu.pools
from celery.app import defaults as celery_defaults

from cluster.errors import ClusterError, ConfigurationError, StateError
from cluster.model import Endpoint
from cluster.settings import CELERY_OVERRIDES, SOCKET_TIMEOUT
from cluster.wire import deliveries, ending, keys
from cluster.wire.client import verification
from cluster.wire.deliveries import Deliveries
from cluster.wire.secret import broker_url, password

if TYPE_CHECKING:
    from redis import Redis

    from cluster.wire.backend import Backend

#: The user's, with defaults that lose no task, and show what one prints; only a worker heeds
#: these. Celery's names: https://docs.celeryq.dev/en/stable/userguide/configuration.html
WORKER_DEFAULTS: Mapping[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # With it on, a task that runs while the broker restarts ends REVOKED and
    # is never run again.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    # Celery's would make a log record of each piece that print() writes.
    "worker_redirect_stdouts": False,
}

#: The user's, with defaults that outlast a broker that restarts; on both sides.
CLIENT_DEFAULTS: Mapping[str, Any] = {
    "redis_socket_timeout": SOCKET_TIMEOUT,
    "redis_socket_connect_timeout": SOCKET_TIMEOUT,
    "redis_backend_health_check_interval": SOCKET_TIMEOUT,
    # Long enough for a broker that restarts with much data to load.
    "task_publish_retry_policy": {
        "max_retries": 100,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.5,
    },
}

#: Ours, inside ``broker_transport_options``. kombu has no time-outs by default; the keys are
#: the cluster's own, and so is the book-keeping. Limits are added (:func:`_ours`).
TRANSPORT_OPTIONS: Mapping[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT,
    "socket_connect_timeout": SOCKET_TIMEOUT,
    "health_check_interval": SOCKET_TIMEOUT,
    "global_keyprefix": "",
    "ack_emulation": True,
}

#: Ours: what says how to reach other servers than the one in the URL, or what these ask
#: for. Celery sets each on top of the URL.
OTHER_SERVERS: Mapping[str, Any] = {
    "broker_host": None,
    "broker_port": None,
    "broker_user": None,
    "broker_password": None,
    "broker_vhost": None,
    "redis_host": None,
    "redis_port": None,
    "redis_db": None,
    "redis_username": None,
    "redis_password": None,
    "redis_backend_credential_provider": None,
}

_TRANSPORT = "cluster.wire.transport:Transport"

#: Celery resolves ``<this>+redis://…`` (celery/app/backends.py, by_url).
_BACKEND = "cluster.wire.backend:Backend"

_MISSING = object()


def set_defaults() -> None:
    """In a worker, before the app is imported: our defaults in place of Celery's.

    ``app.add_defaults`` would come too late for tasks that are bound as they
    are defined, and would beat what the app takes from an object.
    """
    ours = {**WORKER_DEFAULTS, **CLIENT_DEFAULTS}
    celery_defaults.DEFAULTS.update(ours)
    for name, value in ours.items():
        old = celery_defaults._TO_OLD_KEY.get(name)
        if old in celery_defaults._OLD_DEFAULTS:
            celery_defaults._OLD_DEFAULTS[old] = value


# -- in both: ours always --------------------------------------------------------------


def _ours(app: celery.Celery, endpoint: Endpoint, **limits: int) -> Mapping[str, Any]:
    url = broker_url(endpoint)
    secured = verification(endpoint) if endpoint.tls else None
    return {
        "broker_url": url,
        "broker_read_url": url,
        "broker_write_url": url,
        "broker_transport": _TRANSPORT,
        **OTHER_SERVERS,
        "broker_use_ssl": secured or False,
        "redis_backend_use_ssl": secured,
        "broker_transport_options": {
            **(app.conf.broker_transport_options or {}),
            **TRANSPORT_OPTIONS,
            **{f"cluster_{name}": limit for name, limit in limits.items()},
        },
        "result_backend": f"{_BACKEND}+{url}",
    }


def bind_worker(
    app: celery.Celery, endpoint: Endpoint, *, max_deliveries: int, message_limit: int
) -> None:
    """In a worker: for the process's life."""
    limits = {"max_deliveries": max_deliveries, "message_limit": message_limit}
    app.conf.update(_ours(app, endpoint, **limits))
    app.conf.worker_enable_remote_control = True  # a ping is how the manager knows it is ready
    app.backend_cls = app.conf.result_backend
    _swap_caches(app, _Caches())


class Binding:
    """An app bound to a cluster, in the manager; :meth:`release` undoes it.

    Args:
        app: the app.
        endpoint: the broker.
        message_limit: bytes that one message may have.

    Raises:
        StateError: it is bound to another cluster.
        ConfigurationError: it has settings that Celery can't use. It is as it was.
    """

    _bound: ClassVar[dict[int, Binding]] = {}  # by the app's id
    _aside: ClassVar[dict[str, str]] = {}  # the environment's overrides, while any is bound
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, app: celery.Celery, endpoint: Endpoint, message_limit: int) -> None:
        self.app = app
        self._message_limit = message_limit
        with self._lock:
            check_unbound(app)
            for name in CELERY_OVERRIDES:
                if name in os.environ:
                    self._aside[name] = os.environ.pop(name)
            self._bound[id(app)] = self
        self._before: dict[str, Any] = {}
        self._backend_before = app.backend_cls
        self._caches_before = _swap_caches(app, _Caches())
        self._password = password(endpoint.secret, endpoint.user)
        try:
            self._bind(endpoint)
        except Exception as error:
            self._restore()
            raise ConfigurationError(
                f"{app!r} can't be used as it is configured: {type(error).__name__}: {error}"
            ) from error

    def _bind(self, endpoint: Endpoint) -> None:
        conf = self.app.conf
        values = {
            **{key: value for key, value in CLIENT_DEFAULTS.items() if not conf.value_set_for(key)},
            **_ours(self.app, endpoint, message_limit=self._message_limit),
        }
        changes = conf.maps[0]
        self._before = {key: changes.get(key, _MISSING) for key in values}
        changes.update(values)
        self.app.backend_cls = values["result_backend"]
        self._backend: Backend = self.app.backend

    @property
    def deliveries(self) -> Deliveries:
        """What this process and the broker tell each other about results."""
        return deliveries.of(self._password)

    @property
    def set_aside(self) -> Mapping[str, str]:
        """The environment's overrides as they were: a module that reads them as it is imported
        must find them in a worker, too."""
        return dict(self._aside)

    def count_undone(self, client: Redis) -> int:
        """How many messages are in the app's queues, or held by workers that are no more.

        Args:
            client: of the broker.
        """
        with self.app.connection_for_write() as connection:
            channel = connection.default_channel
            waiting = sum(int(channel._size(queue)) for queue in self.app.amqp.queues)
        nodes = cast("list[bytes]", client.hkeys(keys.WORKERS))
        return waiting + sum(client.hlen(keys.unacked(node.decode())) for node in nodes)

    def end(self, why: ClusterError) -> None:
        """From now on, whoever sends a task, waits for a result or asks for one gets ``why``."""
        ending.end(self._password, why)

    def complete(self, why: ClusterError) -> None:
        """From now on, whoever sends a task or waits for a result that isn't there gets ``why``."""
        ending.complete(self._password, why)

    def fail_task(self, request: Any, why: ClusterError) -> None:
        """Store ``why`` as the result of a task that won't be run any more.

        Args:
            request: the task's context, rebuilt from its message.
        """
        self._backend.mark_as_failure(request.id, why, request=request)

    def release(self) -> None:
        """Put the app back as it was. Call :meth:`end` first."""
        from cluster.wire.backend import close_all

        try:
            close_all(self._password)
        finally:
            self._restore()

    def _restore(self) -> None:
        changes = self.app.conf.maps[0]
        for key, value in self._before.items():
            if value is _MISSING:
                changes.pop(key, None)
            else:
                changes[key] = value
        self.app.backend_cls = self._backend_before
        ours = _swap_caches(self.app, self._caches_before)
        with self._lock:
            del self._bound[id(self.app)]
            if not self._bound:
                for name, text in self._aside.items():
                    os.environ.setdefault(name, text)  # unless it was set anew meanwhile
                self._aside.clear()
        _close(ours)


def check_unbound(app: celery.Celery) -> None:
    """Raise :class:`StateError` if the app belongs to a running cluster."""
    if id(app) in Binding._bound:
        raise StateError(
            f"{app!r} belongs to a cluster that still runs. Stop that one first, or use "
            "another app."
        )


@dataclass(frozen=True, slots=True)
class _Caches:
    """Where Celery keeps connections to a broker it has used."""

    connections: Any = None
    producers: Any = None
    backend: Any = None
    local: threading.local = field(default_factory=threading.local)  # each thread's backend


def _swap_caches(app: celery.Celery, new: _Caches) -> _Caches:
    """Put others in their place; what was there stays open."""
    old = _Caches(app._pool, app.amqp._producer_pool, app._backend_cache, app._local)
    app._pool = new.connections
    app.amqp._producer_pool = new.producers
    app._backend_cache = new.backend
    app._local = new.local
    return old


def _close(caches: _Caches) -> None:
    """Close our connections, and take their pools out of kombu's registry of all pools."""
    for registry, pool in (
        (kombu.pools.producers, caches.producers),
        (kombu.pools.connections, caches.connections),
    ):
        if pool is None:
            continue
        for key in [key for key, value in registry.items() if value is pool]:
            dict.pop(registry, key)
        pool.force_close_all()
