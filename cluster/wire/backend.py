"""The result backend: Celery's own for Redis, with a fence and an end.

A node that was declared dead stores nothing: its task has been given to
another. And when the cluster ends, whoever waits for a result is told so,
where Celery's own would wait on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.backends.redis import RedisBackend
from celery.backends.redis import ResultConsumer as RedisResultConsumer

from cluster.errors import ClusterError
from cluster.wire import identity, keys
from cluster.wire.ledger import guarded
from cluster.wire.scripts import STORE

#: Celery resolves ``<this>+redis://…`` (celery/app/backends.py, by_url).
PREFIX = "cluster.wire.backend:Backend+"


class ResultConsumer(RedisResultConsumer):  # type: ignore[misc]
    """Raises in every waiting caller once the backend is closed."""

    def drain_events(self, timeout: float | None = None) -> None:
        self.backend.check_open()
        super().drain_events(timeout=timeout)
        self.backend.check_open()


class Backend(RedisBackend):  # type: ignore[misc]
    """``result_backend = "cluster.wire.backend:Backend+redis://…"``."""

    ResultConsumer = ResultConsumer

    #: Why no result will come any more; ``None`` while the cluster lives.
    _ended: ClusterError | None = None

    def end(self, why: ClusterError) -> None:
        """From now on, asking for a result that isn't known yet raises ``why``."""
        self._ended = why

    def check_open(self) -> None:
        """Raise why the cluster ended, if it has."""
        if self._ended is not None:
            # A new one each time: one exception raised in several threads
            # would collect the tracebacks of all.
            raise type(self._ended)(*self._ended.args)

    def get(self, key: str) -> Any:
        self.check_open()
        return super().get(key)

    def mget(self, keys: Any) -> Any:
        self.check_open()
        return super().mget(keys)

    def _wait_for_pending(self, result: Any, **kwargs: Any) -> Any:
        self.check_open()
        return super()._wait_for_pending(result, **kwargs)

    def _set(self, key: str, value: Any, expires: int | None = None) -> None:
        node = identity.current()
        if node is None:
            super()._set(key, value, expires)
            return
        seconds = self.expires if expires is None else expires
        script = self.client.register_script(STORE)
        guarded(
            node,
            partial(script, keys=[keys.FENCED, key], args=[node, value, int(seconds or 0)]),
        )
