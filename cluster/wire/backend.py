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
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from time import monotonic
from typing import Any

import kombu.pools
from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.asynchronous import _waiting_on
from celery.backends.redis import RedisBackend
from celery.backends.redis import ResultConsumer as RedisResultConsumer
from celery.exceptions import TimeoutError as ResultTimeoutError
from celery.result import ResultSet
from celery.states import EXCEPTION_STATES, FAILURE, READY_STATES, SUCCESS
from celery.utils.log import get_logger
from kombu import Connection
from kombu.transport.redis import Channel
from kombu.utils.encoding import bytes_to_str
from kombu.utils.objects import cached_property
from redis import ConnectionPool, Redis
from redis.backoff import AbstractBackoff
from redis.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError, WatchError
from redis.retry import Retry

from cluster.errors import BrokerLost, ClusterError
from cluster.settings import ORPHAN_TIMEOUT
from cluster.wire import deliveries, ending, identity, keys, secured
from cluster.wire.chord import NOTE_TOO_LARGE, PartReturn
from cluster.wire.client import lean
from cluster.wire.ledger import CONNECTION_ERRORS, guarded, is_full, is_refusal, reason
from cluster.wire.refusals import MessageTooLarge, check_size, refuse_as_full
from cluster.wire.scripts import (
    AWAIT,
    FREED,
    LARGE,
    MAY_STORE,
    STORE,
    run,
)

logger = get_logger(__name__)

#: Bytes of a result that is stored when large ones are refused, and of a failure that always is.
SMALL = 16 * 2**10

#: Seconds that any result waits for room while others are waited for.
STORE_PATIENCE = 30.0

#: Results to ask for at once.
AT_ONCE = 50

#: Seconds that a chord's member waits for room for its result.
CHORD_PATIENCE = 10.0

#: Failures in a row after which it is said that the results are out of reach.
SAY_AFTER = 2


class ResultConsumer(RedisResultConsumer):  # type: ignore[misc]
    """Raises in every waiting caller once the broker is no more."""

    _pubsub: Any = None

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        ready = meta["status"] in READY_STATES
        waiting = _waiting_on(self._pending_results, meta["task_id"]) if ready else ()
        super().on_state_change(meta, message)
        self.backend.note_delivery(*(result.id for result in waiting))

    def on_wait_for_pending(self, result: Any, **kwargs: Any) -> None:
        waiting = self.backend.waiting
        waiting.freed_before = frozenset()
        super().on_wait_for_pending(result, **kwargs)
        if waiting.freed_before:
            for leaf in _leaves(result):
                key = self.backend.key_of(leaf.id)
                # Who has it has it; who comes too late is told so.
                if leaf._cache is None and key in waiting.freed_before:
                    self.backend.get(key)

    def drain_events(self, timeout: float | None = None) -> None:
        self.backend.check_open()
        if self.backend.is_complete:
            self._take_what_is_there()
            return
        self._say_what_is_awaited()
        super().drain_events(timeout=timeout)
        self.backend.check_open()

    def _take_what_is_there(self) -> None:
        """No more results will come: who still misses one after this is told so."""
        if self.backend.waiting.has_all:
            self.backend.check_coming()
        self.backend.waiting.has_all = True
        ids = {id_ for pending in self._pending_results for id_ in tuple(pending)}
        self._look_at(map(self.backend.key_of, ids))

    _said: AbstractSet[str] = frozenset()

    def _say_what_is_awaited(self) -> None:
        """While the broker has no room for results: others fill it, and these are missing."""
        if not self.backend.deliveries.refused:
            self._said = frozenset()
            return
        ids = {
            id_
            for pending in self._pending_results
            for waiting in tuple(pending.values())
            for result in tuple(waiting.values())
            for id_ in _lineage(result)
        }
        new = ids - self._said
        if new:
            self.backend.say_awaited(new)
        self._said = ids

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
            _leave_to_parent(pubsub, pubsub.connection)
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
            self._look_at(self.subscribed_to)

    def _look_at(self, names: Iterable[Any]) -> None:
        """Take in what is stored under these keys. Some at a time: an answer is in the broker's
        memory until it is read."""
        left = list(names)
        while left:
            some, left = left[:AT_ONCE], left[AT_ONCE:]
            for value in self.backend.client.mget(some):
                if value not in {None, FREED}:
                    self.on_state_change(self._decode_result(value), None)


class Waiting(threading.local):
    """How a thread waits for a result.

    ``waits``: it does. ``until``: when it gives up, if it does. ``since``: when the broker was
    out of reach.
    ``has_all``: it has looked for what is there since no more will come.
    ``freed``: the results that a look finds freed, while it lasts, and after it ``freed_before``.
    """

    waits = False
    until: float | None = None
    since = 0.0
    has_all = False
    freed: set[str] | None = None
    freed_before: AbstractSet[str] = frozenset()


class Backend(RedisBackend):  # type: ignore[misc]
    """``result_backend = "cluster.wire.backend:Backend+redis://…"``."""

    ResultConsumer = ResultConsumer

    connection_class_ssl = secured.Connection

    #: What this thread waits for.
    waiting = Waiting()

    #: Whether this process was forked from the one that made it.
    _in_child = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connparams.update(lean())
        if "connection_class" in self.connparams:  # Celery takes redis-py's for a rediss:// URL
            self.connparams["connection_class"] = self.connection_class_ssl
        self.deliveries = deliveries.of(self.connparams["password"])
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
        client = self.__dict__.pop("client", None)
        if client is not None:
            _leave_to_parent(client, *client.connections)
        self.__dict__.pop("_chord_part_return_script", None)  # it holds the client
        self.result_consumer.forget_parent()
        for pending in self._pending_results:
            pending.clear()
        self.app._after_fork()

    @property
    def has_ended(self) -> bool:
        """Whether no result can be got any more."""
        return ending.has_ended(self.connparams["password"])

    def check_open(self) -> None:
        """Raise why no result can be got any more, if so."""
        ending.check(self.connparams["password"])

    @property
    def is_complete(self) -> bool:
        """Whether no result will come any more."""
        return ending.is_complete(self.connparams["password"])

    def check_coming(self) -> None:
        """Raise why no result will come any more, if so."""
        ending.check_coming(self.connparams["password"])

    def on_task_call(self, producer: Any, task_id: str) -> None:
        self.check_coming()
        super().on_task_call(producer, task_id)

    def get(self, key: str) -> Any:
        self.check_open()
        value = super().get(key)
        self._check_kept(key, value)
        return value

    def get_task_meta(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        """Who looks at a result's state has it if it is ready, and may wait for it if it isn't."""
        meta = super().get_task_meta(task_id, *args, **kwargs)
        if meta["status"] in READY_STATES:
            # Who waits for a result looks at its parents, which are still needed until it's there.
            if not self.waiting.waits:
                self.note_delivery(task_id)
        elif self._is_managers:
            self.check_coming()
            if self.deliveries.refused:
                self.say_awaited([task_id])
        return meta

    def get_many(
        self, task_ids: Any, *args: Any, max_iterations: int | None = None, **kwargs: Any
    ) -> Any:
        if max_iterations != 1:
            yield from super().get_many(task_ids, *args, max_iterations=max_iterations, **kwargs)
            return
        # One look before a wait. Celery's would sleep for half a second after it.
        kwargs["interval"] = 0
        self.waiting.freed = set()
        try:
            yield from super().get_many(task_ids, *args, max_iterations=1, **kwargs)
        finally:
            self.waiting.freed_before, self.waiting.freed = self.waiting.freed, None

    def mget(self, keys: Any) -> Any:
        self.check_open()
        values = super().mget(keys)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            if self.waiting.freed is None:
                self._check_kept(key, value)
            elif self._was_freed(key, value):
                self.waiting.freed.add(bytes_to_str(key))
                values[i] = None
        return values

    def _was_freed(self, key: str | bytes, value: Any) -> bool:
        return value == FREED or (value is None and self.deliveries.knows(bytes_to_str(key)))

    def _check_kept(self, key: str | bytes, value: Any) -> None:
        name = bytes_to_str(key)
        if self._was_freed(key, value):
            raise _Freed(
                f"The result {name} was delivered before, and is gone since: freed as the broker "
                "needed room, or expired. Keep the AsyncResult that you have got it from, or give "
                "the broker more memory by CLUSTER_BROKER_MEMORY."
            )

    def forget(self, task_id: str) -> None:
        super().forget(task_id)
        self.deliveries.forget(self.key_of(task_id))

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
            self.waiting.since = monotonic()
        if failures == SAY_AFTER:
            logger.warning("The results are out of reach (%s); trying again.", sys.exception())
        self.check_open()
        if self._in_child and monotonic() - self.waiting.since > ORPHAN_TIMEOUT:
            raise BrokerLost(
                f"The broker was out of reach for {ORPHAN_TIMEOUT:.0f} s. It ends with the process "
                "that started the cluster, which this one was forked from."
            )
        seconds = min(0.1 * (failures - 1), 0.5)
        until = self.waiting.until
        if until is None:
            return seconds
        left: float = until - monotonic()
        if left <= 0:
            raise ResultTimeoutError("The operation timed out, with the broker out of reach.")
        return min(seconds, left)

    def _wait_for_pending(self, result: Any, **kwargs: Any) -> Any:
        self.check_open()
        timeout = kwargs.get("timeout")
        self.waiting.until = None if timeout is None else monotonic() + timeout
        self.waiting.has_all = False
        self.waiting.waits = True
        try:
            yield from super()._wait_for_pending(result, **kwargs)
        finally:
            self.waiting.until = None
            self.waiting.waits = False
        # Until then its parents are looked at, for their errors.
        if self._is_managers and result.parent is not None:
            self._note_lineage(result.parent)

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
            failed, small = state in EXCEPTION_STATES, len(value) <= SMALL
            urgency = 2 if failed and (small or self._is_managers) else int(small)
            store = partial(self._store, key, value, int(expires or 0), stored or b"", urgency)
            if self.ensure(self._store_in_time, (store, request, monotonic())):
                break
        return result

    def _store_in_time(self, store: Callable[[], bool], request: Any, since: float) -> bool:
        """A result that doesn't fit in waits until others have been got; but a chord's member may
        wait for those of its own chord, which nobody gets. Once one has, the others needn't."""
        try:
            return store()
        except RedisConnectionError as error:
            if is_full(error) and getattr(request, "chord", None):
                note = self.get_key_for_group(request.group, ".full")
                if monotonic() - since > CHORD_PATIENCE or self.client.exists(note):
                    self.client.eval(NOTE_TOO_LARGE, 1, note)
                    refuse_as_full(f"{reason(error)}; the results of its chord don't fit in")
            late = is_full(error) and monotonic() - since > STORE_PATIENCE
            if late and self.client.scard(keys.AWAITED):
                # Nobody gets these: they wait for another, whose task may wait for a worker.
                refuse_as_full(f"{reason(error)}; other results are waited for")
            raise

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

    def _store(self, key: Any, value: Any, seconds: int, stored: bytes, urgency: int) -> bool:
        self.check_open()
        node = identity.current()
        names = [keys.FENCED, key, keys.FULL, keys.AWAITED]
        arguments = [node or "", value, seconds, stored, urgency]
        store: Callable[[], bool]
        if len(value) > LARGE:
            store = partial(self._store_large, names, *arguments)
        else:
            store = partial(run, self.client, STORE, len(names), *names, *arguments)
        return bool(guarded(node, store) if node else store())

    def _store_large(self, names: Sequence[Any], node: str, value: Any, *rest: Any) -> bool:
        """What STORE does, without the copies that Lua makes of a value. The fence changes when
        a worker dies and at no other time, so this is hardly ever done twice. Takes what STORE
        takes."""
        fenced, key, _, awaited = names
        seconds, *_ = rest
        with self.client.pipeline() as pipe:
            while True:
                with contextlib.suppress(WatchError):
                    pipe.watch(fenced, key)
                    if not run(pipe, MAY_STORE, len(names), *names, node, len(value), *rest):
                        return False
                    pipe.multi()
                    pipe.set(key, value, ex=seconds or None)
                    pipe.srem(awaited, key)
                    pipe.publish(key, value)
                    pipe.execute()
                    return True

    # -- chords ---------------------------------------------------------------

    @cached_property  # type: ignore[untyped-decorator]
    def _chord_part_return_script(self) -> PartReturn:
        return PartReturn(self.client, identity.current() or "")

    def on_chord_part_return(self, *args: Any, **kwargs: Any) -> Any:
        count = partial(super().on_chord_part_return, *args, **kwargs)
        node = identity.current()
        if node is None:
            return count()
        # As a whole, should the broker refuse it for now: to count a member again changes nothing.
        return self.ensure(guarded, (node, count))

    # -- what was delivered may be freed --------------------------------------

    def _maybe_resolve_from_buffer(self, result: Any) -> None:
        super()._maybe_resolve_from_buffer(result)
        self.note_delivery(result.id)

    def note_delivery(self, *ids: str) -> None:
        """The manager has the results of these tasks."""
        if self._is_managers:
            self.deliveries.note(map(self.key_of, ids))

    def _note_lineage(self, parent: Any) -> None:
        """What a result was made from isn't needed any more, as far as it is there: a link's own
        result is stored after the next link has been sent."""
        names = [self.key_of(id_) for id_ in _lineage(parent)]
        with self.client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.exists(name)
            found = pipe.execute()
        self.deliveries.note(name for name, there in zip(names, found, strict=True) if there)

    @property
    def _is_managers(self) -> bool:
        """Whether this process is the manager, whom results are for."""
        return not self._in_child and identity.current() is None

    def say_awaited(self, ids: Iterable[str]) -> None:
        """Have the results of these tasks stored, however full the broker is."""
        self.client.eval(AWAIT, 1, keys.AWAITED, *map(self.key_of, ids))

    def key_of(self, task_id: str) -> str:
        """The key of a task's result."""
        key: str = bytes_to_str(self.get_key_for_task(task_id))
        return key


def _lineage(result: Any) -> Iterator[str]:
    """The ids of what a result is made from, too: a chain's earlier links, a chord's members."""
    while result is not None:
        yield from (leaf.id for leaf in _leaves(result))
        result = result.parent


def _leaves(result: Any) -> Iterator[Any]:
    """A result, or those of a group, of groups in it, too."""
    if isinstance(result, ResultSet):
        for child in result.results:
            yield from _leaves(child)
    else:
        yield result


class _Freed(ClusterError):
    """The result was delivered before, and is no more."""


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

    @property
    def connections(self) -> list[Any]:
        """Those of both kinds, read without a lock."""
        return [
            connection
            for pool in (self.connection_pool, self._subscriptions)
            for connection in (*pool._available_connections, *pool._in_use_connections)
        ]

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
    deliveries.forget(password)


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()
_of_parents: list[Any] = []


def _leave_to_parent(what: Any, *connections: Any) -> None:
    """In a process just forked: let go of something of the parent's, and of its connections.

    Kept, since to collect it would take its lock; and another thread may have held that as this
    process was forked. The sockets are closed, and not shut down: that would end the parent's.
    """
    _of_parents.append(what)
    for connection in connections:
        sock = getattr(connection, "_sock", None)
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
