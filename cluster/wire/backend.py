"""The result backend: Celery's own for Redis, with a fence and an end.

A node that was declared dead stores nothing: its task has been given to
another. And when the cluster ends, whoever waits for a result is told so,
where Celery's own would wait on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import kombu.pools
from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.backends.redis import ResultConsumer as RedisResultConsumer
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.states import EXCEPTION_STATES, FAILURE, READY_STATES, SUCCESS
from celery.utils.log import get_logger
from kombu import Connection
from kombu.transport.redis import Channel
from kombu.utils.objects import cached_property
from redis import ConnectionPool, Redis
from redis.backoff import AbstractBackoff
from redis.client import PubSub
from redis.commands.core import Script
from redis.exceptions import ResponseError, WatchError
from redis.retry import Retry

from cluster.errors import BrokerLost, ClusterError
from cluster.settings import ORPHAN_TIMEOUT
from cluster.wire import ending, identity, keys
from cluster.wire.chord import PartReturn
from cluster.wire.client import lean
from cluster.wire.ledger import CONNECTION_ERRORS, guarded, is_refusal
from cluster.wire.refusals import MessageTooLarge, check_size, refuse_as_full
from cluster.wire.scripts import DELIVER, FENCED_REPLY, FREED, LARGE, STORE

logger = get_logger(__name__)

#: Results whose delivery is noted together, and seconds after which fewer are.
DELIVERIES_AT_ONCE = 100
NOTE_EVERY = 0.5

#: Failures in a row after which it is said that the results are out of reach.
SAY_AFTER = 2


class ResultConsumer(RedisResultConsumer):  # type: ignore[misc]
    """Raises in every waiting caller once the broker is no more."""

    _pubsub: Any = None

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        awaited = meta["status"] in READY_STATES and any(
            meta["task_id"] in pending for pending in self._pending_results
        )
        super().on_state_change(meta, message)
        if awaited:
            self.backend.note_delivery(meta["task_id"])

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
        """Subscribe anew, and only then ask for what was missed: Celery asks first, and misses
        what is stored in between. It forgets connections as well that other threads use."""
        self.backend.check_open()
        client = self.backend.client
        with self._locked():
            if self._pubsub is not None:
                self._pubsub.close()
            client.close_subscriptions()
            self._pubsub = client.pubsub(ignore_subscribe_messages=True)
            self.subscribed_to -= self._pending_unsubscribe
            self._pending_unsubscribe.clear()
            if not self.subscribed_to:
                self._pubsub.connection = self._pubsub.connection_pool.get_connection()
                self._pubsub.connection.register_connect_callback(self._pubsub.on_connect)
                return
            self._pubsub.subscribe(*self.subscribed_to)
            for value in client.mget(self.subscribed_to):
                if value not in {None, FREED}:
                    self.on_state_change(self._decode_result(value), None)


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
        self._delivered: list[str] = []
        self._delivered_noted = monotonic()
        _backends.add(self)

    @cached_property  # type: ignore[untyped-decorator]
    def client(self) -> _Client:
        """What asks waits until the broker is back; what is subscribed must hear that it broke,
        since a result may have been missed."""
        waiting = {**self.connparams, "retry": Retry(_Patience(self), -1, CONNECTION_ERRORS)}
        return _Client(self._get_pool(**waiting), self._get_pool(**self.connparams))

    def close(self) -> None:
        """Close its connections."""
        self.result_consumer.stop()
        if "client" in self.__dict__:
            self.client.close_all()

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

    def get(self, key: str) -> Any:
        self.check_open()
        value = super().get(key)
        _check_kept(key, value)
        return value

    def get_many(
        self, task_ids: Any, *args: Any, max_iterations: int | None = None, **kwargs: Any
    ) -> Any:
        if max_iterations == 1:
            kwargs["interval"] = 0  # Celery's would sleep half a second after it has looked
        return super().get_many(task_ids, *args, max_iterations=max_iterations, **kwargs)

    def mget(self, keys: Any) -> Any:
        self.check_open()
        values = super().mget(keys)
        for key, value in zip(keys, values, strict=True):
            _check_kept(key, value)
        return values

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
        self, _max_retries: int | None, _error: Exception, _intervals: Any, retries: int
    ) -> float:
        return self.pause(retries + 1)

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row; raises if that is in vain."""
        if failures == 1:
            self._waiting.since = monotonic()
        if failures == SAY_AFTER:
            logger.warning("The results are out of reach (%s); trying again.", sys.exception())
        self.check_open()
        if self._in_child and monotonic() - self._waiting.since > ORPHAN_TIMEOUT:
            raise BrokerLost(
                f"The broker was out of reach for {ORPHAN_TIMEOUT:.0f} s. It ends with the process "
                "that started the cluster, which this one was forked from."
            )
        seconds = min(0.1 * (failures - 1), 0.5)
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

    # -- storing --------------------------------------------------------------

    def set(self, key: str, value: Any, **kwargs: Any) -> Any:
        """What isn't a task's result: that of a group, say."""
        self.check_open()
        try:
            return super().set(key, value, **kwargs)
        except ResponseError as error:
            if is_refusal(error):
                refuse_as_full(str(error))
            raise

    def _set(self, key: Any, value: Any, expires: int | None = None) -> None:
        seconds = int((self.expires if expires is None else expires) or 0)
        with self.client.pipeline() as pipe:
            pipe.set(key, value, ex=seconds or None)
            pipe.publish(key, value)
            pipe.execute()

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Success is final, and so is any end beside what isn't one. Celery looks and stores in two
        steps; a task that runs again while its first run stores something could undo its end."""
        try:
            value = self._encode_meta(task_id, result, state, traceback, request)
        except MessageTooLarge as error:
            if state not in EXCEPTION_STATES:
                raise  # it fails the task
            value = self._encode_meta(task_id, self.prepare_exception(error), state, None, request)
        key = self.get_key_for_task(task_id)
        expires = self.failure_expires if state == FAILURE else self.expires
        while True:
            stored = self.client.get(key)
            if stored == FREED:
                break  # it ran again, and its first result has been delivered
            status = self.decode(stored)["status"] if stored else None
            if status == SUCCESS or (status in READY_STATES and state not in READY_STATES):
                break
            if self.ensure(self._store, (key, value, int(expires or 0), stored or b"")):
                break
        return result

    def _encode_meta(
        self, task_id: str, result: Any, state: str, traceback: Any, request: Any
    ) -> Any:
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        value = self.encode(meta)
        limit = self.app.conf.broker_transport_options.get("cluster_message_limit", 0)
        if limit:
            check_size("The result is too large", len(value), limit)
        return value

    def _store(self, key: Any, value: Any, seconds: int, stored: bytes) -> bool:
        self.check_open()
        node = identity.current()
        store: Callable[[], bool]
        if len(value) > LARGE:
            store = partial(self._store_large, node or "", key, value, seconds, stored)
        else:
            store = partial(
                self._store_script,
                keys=[keys.FENCED, key],
                args=[node or "", value, seconds, stored],
            )
        return bool(guarded(node, store) if node else store())

    @cached_property  # type: ignore[untyped-decorator]
    def _store_script(self) -> Script:
        script: Script = self.client.register_script(STORE)
        return script

    def _store_large(self, node: str, key: Any, value: Any, seconds: int, stored: bytes) -> bool:
        """What STORE does, without the copies that Lua makes of a value. The fence changes when
        a worker dies and at no other time, so this is hardly ever done twice."""
        with self.client.pipeline() as pipe:
            while True:
                with contextlib.suppress(WatchError):
                    pipe.watch(keys.FENCED, key)
                    if pipe.hexists(keys.FENCED, node):
                        raise ResponseError(FENCED_REPLY)
                    if (pipe.get(key) or b"") != stored:
                        return False
                    pipe.multi()
                    pipe.set(key, value, ex=seconds or None)
                    pipe.publish(key, value)
                    pipe.execute()
                    return True

    # -- chords ---------------------------------------------------------------

    @cached_property  # type: ignore[untyped-decorator]
    def _chord_part_return_script(self) -> PartReturn:
        return PartReturn(self.client, identity.current() or "")

    def on_chord_part_return(self, *args: Any, **kwargs: Any) -> Any:
        # As a whole, should the broker refuse it for now: to count a member again changes nothing.
        count = partial(super().on_chord_part_return, *args, **kwargs)
        return self.ensure(guarded, (identity.current() or "", count))

    # -- what was delivered may be freed --------------------------------------

    def _maybe_resolve_from_buffer(self, result: Any) -> None:
        super()._maybe_resolve_from_buffer(result)
        self.note_delivery(result.id)

    def note_delivery(self, task_id: str) -> None:
        """The manager has this result; the broker hears of many at once."""
        if self._in_child or identity.current() is not None or self.has_ended:
            return  # the manager may want it, too
        self._delivered.append(self._key(task_id))
        now = monotonic()
        if len(self._delivered) < DELIVERIES_AT_ONCE and now - self._delivered_noted < NOTE_EVERY:
            return
        self._delivered_noted = now
        noted, self._delivered = self._delivered, []
        self.client.eval(DELIVER, 1, keys.DELIVERED, *noted)

    def _key(self, task_id: str) -> str:
        key: str | bytes = self.get_key_for_task(task_id)
        return key.decode() if isinstance(key, bytes) else key


class _Freed(ClusterError):
    """The result was delivered before, and is no more."""


def _check_kept(key: Any, value: Any) -> None:
    if value == FREED:
        task = str(key if isinstance(key, str) else key.decode()).rpartition("task-meta-")[2]
        raise _Freed(
            f"The result of task {task} was delivered before, and freed as the broker needed room. "
            "Keep the AsyncResult that you have got it from, or give the broker more memory by "
            "CLUSTER_BROKER_MEMORY."
        )


class _Patience(AbstractBackoff):
    """Asks the backend how long to wait, and whether."""

    def __init__(self, backend: Backend) -> None:
        self._backend = weakref.ref(backend)

    def compute(self, failures: int) -> float:
        backend = self._backend()
        if backend is None:
            return 0.0
        return backend.pause(failures)


class _Client(Redis):
    """Has other connections for subscriptions than for commands."""

    def __init__(self, commands: ConnectionPool, subscriptions: ConnectionPool) -> None:
        super().__init__(connection_pool=commands)
        self._subscriptions = subscriptions

    def pubsub(self, **kwargs: Any) -> PubSub:
        return PubSub(self._subscriptions, **kwargs)

    def close_subscriptions(self) -> None:
        """Close what is subscribed."""
        self._subscriptions.disconnect()

    def close_all(self) -> None:
        """Close the connections of both kinds."""
        self.close_subscriptions()
        self.connection_pool.disconnect()


def close_all(password: str) -> None:
    """Close what this process has of the broker with this password: a backend for each thread."""
    for backend in list(_backends):
        if backend.connparams["password"] == password:
            backend.close()


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
