"""The result backend: Celery's own for Redis, with a fence and an end.

A node that was declared dead stores nothing: its task has been given to
another. And when the cluster ends, whoever waits for a result is told so,
where Celery's own would wait on.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial
from time import monotonic
from typing import Any

import kombu.pools
from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.backends.redis import ResultConsumer as RedisResultConsumer
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.utils.log import get_logger
from kombu import Connection
from kombu.transport.redis import Channel
from kombu.utils.objects import cached_property

from cluster.errors import BrokerLost
from cluster.settings import ORPHAN_TIMEOUT
from cluster.wire import ending, identity, keys
from cluster.wire.client import lean
from cluster.wire.ledger import guarded
from cluster.wire.scripts import STORE

logger = get_logger(__name__)


class ResultConsumer(RedisResultConsumer):  # type: ignore[misc]
    """Raises in every waiting caller once the broker is no more."""

    _pubsub: Any = None

    def drain_events(self, timeout: float | None = None) -> None:
        self.backend.check_open()
        super().drain_events(timeout=timeout)
        self.backend.check_open()

    def consume_from(self, task_id: str) -> Any:
        self.backend.check_open()
        return super().consume_from(task_id)

    def cancel_for(self, task_id: str) -> None:
        # Results that are forgotten after the end come here, from their __del__.
        if not self.backend.has_ended:
            super().cancel_for(task_id)

    def forget_parent(self) -> None:
        """In a process just forked: begin anew, and leave the connection to the parent."""
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            # Never collected: that would take its lock, which another thread may have held.
            _of_parents.append(pubsub)
            _close_copy(pubsub)
        self.subscribed_to.clear()
        self._after_fork()

    def _reconnect_pubsub(self) -> None:
        self.backend.check_open()
        with self._locked():
            # Celery forgets them as they are; all are broken, for the broker was away.
            if self._pubsub is not None:
                self._pubsub.close()
            self.backend.client.connection_pool.disconnect()
        super()._reconnect_pubsub()


class Backend(RedisBackend):  # type: ignore[misc]
    """``result_backend = "cluster.wire.backend:Backend+redis://…"``."""

    ResultConsumer = ResultConsumer

    #: Until when this thread waits for a result, if it does and says so.
    _waiting = threading.local()

    #: Whether this process was forked from the one that made it.
    _in_child = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connparams.update(lean())
        _backends.add(self)

    def forget_parent(self) -> None:
        """In a process just forked: what the parent waits for, and on which connections, is the
        parent's. The same as Celery does for children of its own pool, and for no others."""
        self._in_child = True
        self.result_consumer.forget_parent()
        for pending in self._pending_results:
            pending.clear()
        self.app._after_fork()

    @property
    def has_ended(self) -> bool:
        """Whether no result will come any more."""
        return ending.has_ended(self.connparams["password"])

    def check_open(self) -> None:
        """Raise why no result will come any more, if so."""
        ending.check(self.connparams["password"])

    # Asking goes through ensure() like storing does: Celery's own raises when it
    # meets a broker that is being restarted, and a waiting get() with it.

    def get(self, key: str) -> Any:
        return self.ensure(self._get, (key,))

    def mget(self, keys: Any) -> Any:
        return self.ensure(self._mget, (keys,))

    def _get(self, key: str) -> Any:
        self.check_open()
        return super().get(key)

    def _mget(self, keys: Any) -> Any:
        self.check_open()
        return super().mget(keys)

    @property
    def retry_policy(self) -> dict[str, Any]:
        """Until the broker is back. That it won't be is for others to say: in a manager
        the guardian (then :meth:`check_open` raises), in a worker the watchdog. Nobody does
        in a process that the manager forked (:meth:`on_connection_error`)."""
        return {
            "max_retries": None,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.5,
        }

    def on_connection_error(
        self, _max_retries: int | None, error: Exception, intervals: Any, retries: int
    ) -> float:
        if retries == 0:
            logger.warning("The results are out of reach (%s); trying again.", error)
            self._waiting.since = monotonic()
        self.check_open()
        if self._in_child and monotonic() - self._waiting.since > ORPHAN_TIMEOUT:
            raise BrokerLost(
                f"The broker was out of reach for {ORPHAN_TIMEOUT:.0f} s. It ends with the process "
                "that started the cluster, which this one was forked from."
            )
        seconds: float = next(intervals)
        until = getattr(self._waiting, "until", None)
        if until is None:
            return seconds
        left: float = until - monotonic()
        if left <= 0:
            raise ResultTimeoutError("The operation timed out, with the broker out of reach.")
        return min(seconds, left)

    def _wait_for_pending(self, result: Any, **kwargs: Any) -> Any:
        self.check_open()
        timeout = kwargs.get("timeout")
        self._waiting.until = None if timeout is None else monotonic() + timeout
        try:
            yield from super()._wait_for_pending(result, **kwargs)
        finally:
            self._waiting.until = None

    def _set(self, key: str, value: Any, expires: int | None = None) -> None:
        self.check_open()
        node = identity.current()
        seconds = int((self.expires if expires is None else expires) or 0)
        if node is None:
            with self.client.pipeline() as pipe:
                pipe.set(key, value, ex=seconds or None)
                pipe.publish(key, value)
                pipe.execute()
            return
        script = self.client.register_script(STORE)
        guarded(node, partial(script, keys=[keys.FENCED, key], args=[node, value, seconds]))


def close_all(password: str) -> None:
    """Close what this process has of the broker with this password: a backend for each thread."""
    for backend in list(_backends):
        if backend.connparams["password"] == password:
            backend.result_consumer.stop()
            backend.client.connection_pool.disconnect()


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()
_of_parents: list[Any] = []


def _close_copy(pubsub: Any) -> None:
    """Closed, not shut down: that would end the parent's as well."""
    sock = getattr(pubsub.connection, "_sock", None)
    if sock is not None and sock.fileno() >= 0:
        os.close(sock.detach())


def _renew_locks(*classes: type) -> None:
    """Those of kombu's cached properties, taken at every look: one a class, and whichever another
    thread held as this process was forked is held for ever."""
    for each in {base for one in classes for base in one.__mro__}:
        for value in vars(each).values():
            if isinstance(value, cached_property):
                value.lock = threading.RLock()


def _after_fork_in_child() -> None:
    if not _backends or identity.current() is not None:
        return  # in a worker, forking is its pool's business
    # First: all that follows needs them.
    _renew_locks(Celery, AMQP, Connection, Channel, *{type(backend) for backend in _backends})
    for pools in (kombu.pools.producers, kombu.pools.connections):
        _of_parents.extend(dict.values(pools))
        dict.clear(pools)
    for backend in list(_backends):
        backend.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
