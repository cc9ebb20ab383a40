"""The kombu transport: Redis lists as Celery lays them out, handed out our way.

What differs from kombu's own (:mod:`kombu.transport.redis`), and only that:

*Taking.* A worker takes with one script that pops, records under the node's
name, counts and checks the fence, where kombu pops first and records
afterwards. An idle worker blocks on the queue's wake list, to which our
publisher adds a token a message; a stock publisher doesn't, so the wait looks
for itself once a second.

*Holding.* What a node has taken is the node's, not the connection's: a closed
connection gives nothing back.

*Reconnecting.* A broker that restarts is waited for in here. Celery's consumer
never hears of it, so it doesn't flush its pool, drop its timers or run a task
again.

*Publishing.* What is sent again since no answer came arrives once; what is too
large, or too much, is refused; who is revoked is kept.

Outside a worker the node is unknown, and taking, holding and reconnecting are
kombu's own.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import threading
from collections.abc import Callable
from queue import Empty
from time import monotonic, sleep, time
from typing import Any, NoReturn

from kombu.exceptions import BatchPublishError
from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.settings import MAX_DELIVERIES
from cluster.wire import ending, identity, keys, secured
from cluster.wire.client import lean
from cluster.wire.ledger import (
    CONNECTION_ERRORS,
    Ledger,
    is_full,
    is_refusal,
    raise_for,
    reason,
)
from cluster.wire.refusals import check_size, refuse_as_full, refuse_for_now
from cluster.wire.scripts import (
    AWAIT,
    KEEP_REVOKED,
    LARGE,
    MAY_PUT,
    PUT,
    Scripts,
    run,
    take_arguments,
)

logger = get_logger(__name__)

#: Seconds an idle worker blocks before it looks for messages of stock publishers.
LOOK_EVERY = 1

#: Seconds between attempts to reach a broker that is away.
RETRY_EVERY = 0.1

#: Among a message's properties, but never sent.
_STAMP = "cluster-publication"

#: Seconds to wait for room in a full broker, where what was delivered is being freed; in a
#: worker, where the task fails without; and between looks.
ROOM_WITHIN = 5.0
ROOM_WITHIN_IN_WORKER = 10.0
LOOK_FOR_ROOM_EVERY = 0.1

#: Seconds in which a message that got no answer may be sent again and is known.
REMEMBER_PUBLISHED = 900

_ledger: Ledger | None = None
_taking = True
_not_yet = False
_after_absence: list[Callable[[Redis], None]] = []


def open_ledger(channel: Channel, node: str) -> Ledger:
    """This process's ledger, made with the first consuming channel's connection settings."""
    global _ledger
    if _ledger is None or _ledger.node != node:
        parameters = dict(channel._connparams())
        pool = kombu_redis.redis.ConnectionPool(**parameters)
        client = kombu_redis.redis.Redis(connection_pool=pool)
        _ledger = Ledger(node, Scripts(client, channel.option("max_deliveries", MAX_DELIVERIES)))
    return _ledger


def current_ledger() -> Ledger | None:
    """This process's ledger, if it has taken part yet."""
    return _ledger


def after_absence(callback: Callable[[Redis], None]) -> None:
    """In a worker: call this, with a client, each time when the broker was away."""
    _after_absence.append(callback)


def stop_taking() -> None:
    """Take no more messages in this process. What is held stays held."""
    global _taking
    _taking = False


def wait_with_taking(waits: bool) -> None:
    """Whether to take messages later than now."""
    global _not_yet
    _not_yet = waits


class QoS(kombu_redis.QoS):  # type: ignore[misc]
    """Settles through the ledger; the message was recorded when it was taken."""

    #: What the node holds survives its connections.
    restore_at_shutdown = False

    def can_consume(self) -> bool:
        # On a channel for orders, a drained worker still listens.
        may_take = _taking and not _not_yet
        return (may_take or not self.channel._takes) and bool(super().can_consume())

    def append(self, message: Any, delivery_tag: str) -> None:
        kombu_redis.virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.channel.ledger.ack(delivery_tag)
        kombu_redis.virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel.ledger.reject(delivery_tag)
        else:
            self.channel.ledger.ack(delivery_tag)
        kombu_redis.virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """No visibility timeout here: the guardian knows who died."""

    def restore_unacked(self, client: Any = None) -> None:
        """Nothing to do: see ``restore_at_shutdown``."""


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """Waits for a broker that is away instead of raising into Celery's consumer."""

    #: Set in a worker: asks its event loop to come round again after some seconds.
    call_later: Callable[[float], Any] | None = None
    _retry_at = 0.0
    _away = False

    def on_poll_start(self) -> None:
        if self.call_later is None:
            super().on_poll_start()
            return
        if monotonic() < self._retry_at:
            return
        try:
            if self._away:
                for channel in self._channels:
                    channel.catch_up()
            super().on_poll_start()
        except CONNECTION_ERRORS as error:
            self._lost(error)
        else:
            if self._away:
                self._away = False
                logger.warning("The broker is back.")

    def on_readable(self, fileno: int) -> Any:
        if self.call_later is None:
            return super().on_readable(fileno)
        try:
            return super().on_readable(fileno)
        except (RedisConnectionError, RedisTimeoutError) as error:
            # redis-py's own only: a consumer's callback may raise an OSError.
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if not self._away:
            logger.warning("The broker is away (%s); trying again until it is back.", error)
        self._away = True
        self._retry_at = monotonic() + RETRY_EVERY
        for channel in self._channels:
            channel.drop_connections()
        assert self.call_later is not None
        self.call_later(RETRY_EVERY)


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """A channel that takes for a node, or kombu's own where there is none."""

    connection_class_ssl = secured.Connection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.node = identity.taking()
        self._acknowledged: set[str] = set()
        self._waiting = False
        self._publisher = Publisher()
        self._client: Any = None
        if self.node is not None:
            self.QoS = QoS
        super().__init__(*args, **kwargs)

    @property
    def state(self) -> Any:
        """kombu's, of what is declared. Another thread, or kombu itself as it connects anew, may
        have closed this channel: that is a lost connection, which who uses it knows to handle."""
        if self.connection is None:
            raise RedisConnectionError("the channel is closed")
        return super().state

    @property
    def ledger(self) -> Ledger:
        assert self.node is not None
        return open_ledger(self, self.node)

    @property
    def _takes(self) -> bool:
        """Whether this channel's messages are recorded and need settling."""
        return self.node is not None and bool(self._acknowledged)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if not no_ack and queue not in self._fanout_queues:
            self._acknowledged.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    @property
    def has_take_outstanding(self) -> bool:
        """Whether a message may be on its way to this channel."""
        return bool(self._takes and self._in_poll and not self._waiting)

    def _connparams(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        parameters: dict[str, Any] = {**super()._connparams(*args, **kwargs), **lean()}
        if self.node is not None:
            # By this the guardian tells a process that died from one that has
            # lost a connection. In the main process only: a child may outlive it.
            parameters["client_name"] = self.node
        return parameters

    # -- taking ---------------------------------------------------------------

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self._takes:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self.client.connection
        if self._waiting:
            command = ["BLPOP", *(keys.wake(queue) for queue in queues), LOOK_EVERY]
        else:
            lists = [self._q_for_pri(q, pri) for pri in self.priority_steps for q in queues]
            assert self.node is not None
            script = self.ledger.scripts.take_script
            command = ["EVALSHA", script.sha, *take_arguments(self.node, queues, lists)]
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> Any:
        if not self._takes:
            return super()._brpop_read(**options)
        connection = self.client.connection
        waited, self._waiting = self._waiting, False
        try:
            reply = connection.read_response()
        except NoScriptError:
            # A restarted broker knows no scripts.
            script = self.ledger.scripts.take_script
            self.ledger.scripts.client.script_load(script.script)
            raise Empty from None
        except ResponseError as error:
            raise_for(error, str(self.node))
        except CONNECTION_ERRORS:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
        if waited:
            raise Empty  # woken, or time to look: take on the next turn
        if isinstance(reply, int):
            self._waiting = True
            if not any(channel.has_take_outstanding for channel in self.connection.channels):
                self.ledger.compare(reply)
            raise Empty
        return self._hand_out(reply)

    def _hand_out(self, reply: list[Any]) -> bool:
        source, number, returned, raw = reply
        queue = bytes_to_str(source).rsplit(self.sep, 1)[0]
        message = loads(bytes_to_str(raw))
        tag = message["properties"]["delivery_tag"]
        self.ledger.hold(tag, number)
        if returned:
            message.setdefault("headers", {})["redelivered"] = True
            message["properties"].setdefault("delivery_info", {})["redelivered"] = True
        self._queue_cycle.rotate(queue)
        try:
            self.connection._deliver(message, queue)
        except BaseException:
            # A consumer's own mistake; Celery's reports what is wrong with a
            # task by itself. Somebody else may do better.
            self.ledger.reject(tag)
            raise
        if queue not in self._acknowledged:
            self.ledger.ack(tag)
        return True

    def catch_up(self) -> None:
        """The broker was away: settle what is due before anything new is taken."""
        if self._takes:
            self.ledger.reconcile()
            for callback in _after_absence:
                callback(self.ledger.scripts.client)

    def close(self) -> None:
        if self._takes and self._in_poll:
            # kombu reads the outstanding reply and delivers it; what it holds,
            # if anything, is this node's and goes back when the node leaves.
            self._in_poll.disconnect()
            self._in_poll = None
        super().close()

    def drop_connections(self) -> None:
        """Let go of connections that may be broken, so that the next turn makes new ones."""
        self._waiting = False
        for name in ("client", "subclient"):
            client = self.__dict__.get(name)
            connection = getattr(client, "connection", None)
            if connection is not None:
                connection.disconnect()

    def _create_client(self, asynchronous: bool = False) -> Any:
        """kombu makes one a command, which takes a fifth of the time of a publish."""
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._client is None or self._client.connection_pool is not self.pool:
            self._client = super()._create_client()
        return self._client

    # -- publishing -----------------------------------------------------------

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        if self.connection is None:
            # Another thread met a broken connection and closed it with all its channels. In this
            # way kombu hears of it as of any other, and takes a new one.
            raise RedisConnectionError("the channel is closed")
        batch = kwargs.get("_publish_batch")
        publisher, number, raw = self._stamp(message, getattr(batch, "publisher", None))
        self._check_size(message, raw)
        priority = self._get_message_priority(message, reverse=False)
        lists = [self._q_for_pri(queue, priority), keys.wake(queue)]
        expires = self._expires.get(queue, 0)
        if expires:
            lists += [self._q_for_pri(queue, step) for step in self.priority_steps]
        names = [keys.published(publisher, queue), keys.FULL, *lists]
        outside = int(identity.current() is None)
        arguments = [len(names), *names, number, raw, outside, expires, REMEMBER_PUBLISHED]
        if batch is not None:
            batch.add("eval", PUT, *arguments)
            return
        # A worker's main process has other things to do, on which more depends.
        patience = 0.0 if identity.taking() else (ROOM_WITHIN if outside else ROOM_WITHIN_IN_WORKER)
        full_until = monotonic() + patience
        while True:
            try:
                with self.conn_or_acquire() as client:
                    if len(raw) > LARGE and not expires:
                        _put_large(client, names, number, raw, outside)
                    else:
                        run(client, PUT, *arguments)
                return
            except ResponseError as error:
                if (is_full(error) or is_refusal(error)) and monotonic() < full_until:
                    sleep(LOOK_FOR_ROOM_EVERY)
                else:
                    _refuse(error)

    def _size(self, queue: str) -> int:
        """kombu asks in a transaction, which a full broker refuses as a whole."""
        with self.conn_or_acquire() as client:
            return sum(
                int(client.llen(self._q_for_pri(queue, step))) for step in self.priority_steps
            )

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except ResponseError as error:
            if not is_refusal(error):
                raise
            # What is sent may be refused, but not that there is a queue.
            member = self.sep.join([routing_key or "", pattern or "", queue or ""])
            with self.conn_or_acquire() as client:
                client.eval(AWAIT, 1, self.keyprefix_queue % (exchange,), member)

    def create_publish_batch(self, max_size: int) -> Batch:
        return Batch(self, max_size)

    def _stamp(self, message: Any, publisher: Publisher | None) -> tuple[str, int, str]:
        """The publisher, the number of the message, and the message as it is sent.

        kombu sends again what a lost connection left unanswered, over another channel and with
        another delivery tag, but with the same dictionary of properties. By what we note there
        the broker knows that it is the same message.
        """
        properties = message["properties"]
        stamp = properties.pop(_STAMP, None)
        if stamp is None:
            stamp = (publisher or self._publisher).number()
        raw = dumps(message)
        properties[_STAMP] = stamp
        return (*stamp, raw)

    def _check_size(self, message: Any, raw: str) -> None:
        limit = self.option("message_limit", 0)
        if limit and len(raw) > limit:
            task = (message.get("headers") or {}).get("task")
            what = f"The arguments of {task} are too large" if task else "A message is too large"
            check_size(what, len(raw), limit)

    def option(self, name: str, default: Any) -> Any:
        """One of the cluster's own, which the app's transport options carry."""
        return self.connection.client.transport_options.get(f"cluster_{name}", default)

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **kwargs: Any) -> None:
        self._keep_revokes(message)
        super()._put_fanout(exchange, message, routing_key, **kwargs)

    def _keep_revokes(self, message: Any) -> None:
        """Who revokes a task tells the workers there are now; the broker keeps it for those to
        come, and for those that don't hear it."""
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        if b"revoke" not in (body if isinstance(body, bytes) else body.encode()):
            return
        try:
            order = loads(bytes_to_str(body))
            ids = order["arguments"]["task_id"] if order["method"] == "revoke" else []
        except (ValueError, KeyError, TypeError):
            return  # an event that happens to have the word in it
        named = [ids] if isinstance(ids, str) else list(ids)
        try:
            with self.conn_or_acquire() as client:
                client.eval(KEEP_REVOKED, 1, keys.REVOKED, time(), *named)
        except ResponseError as error:
            # Those who are there hear it all the same.
            logger.warning("That tasks were revoked can't be kept (%s).", error)

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        super()._delete(queue, *args, **kwargs)
        with self.conn_or_acquire(client=kwargs.get("client")) as client:
            client.delete(keys.wake(queue))


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """``broker_transport = "cluster.wire.transport:Transport"``."""

    Channel = Channel

    #: Without these kombu takes all errors for the same, and gives up at the second in a row
    #: (kombu/connection.py, ensure), however patient the app's ``task_publish_retry_policy``.
    recoverable_connection_errors = kombu_redis.Transport.connection_errors
    recoverable_channel_errors = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def establish_connection(self) -> Any:
        ending.check_coming(self.client.password)
        return super().establish_connection()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        if identity.taking() is not None:
            self.cycle.call_later = lambda seconds: loop.call_later(seconds, _come_round)
        super().register_with_event_loop(connection, loop)


class Publisher(threading.local):
    """Numbers messages, for each thread by itself: the broker takes them in order, and takes one
    whose number it has passed for sent already."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self._last = 0

    def number(self) -> tuple[str, int]:
        """The next."""
        self._last += 1
        return self._token, self._last


class Batch(kombu_redis.PublishBatch):  # type: ignore[misc]
    """kombu's, which says what it means if there is no room for all of it."""

    def __init__(self, *args: Any) -> None:
        # Others may send over the same channel before this is flushed.
        self.publisher = Publisher()
        super().__init__(*args)

    def flush(self) -> None:
        try:
            super().flush()
        except BatchPublishError as error:
            if isinstance(error.__cause__, ResponseError):
                _refuse(error.__cause__)
            raise


def _refuse(error: ResponseError) -> NoReturn:
    """Raise what the sender is to see."""
    if is_full(error):
        refuse_as_full(reason(error))
    if is_refusal(error):
        refuse_for_now(reason(error))
    raise error


def _put_large(client: Any, names: list[str], number: int, raw: str, outside: int) -> None:
    """What PUT does, without the copies that Lua makes of a message. Nobody else has this
    publisher's number, and the broker is full once at most, so it is hardly ever done twice."""
    published, full, into, wake = names
    with client.pipeline() as pipe:
        while True:
            with contextlib.suppress(WatchError):
                pipe.watch(published, full)
                if not run(pipe, MAY_PUT, 2, published, full, number, len(raw), outside):
                    return
                pipe.multi()
                pipe.lpush(into, raw)
                pipe.lpush(wake, "1")
                pipe.set(published, number, ex=REMEMBER_PUBLISHED)
                pipe.execute()
                return


def _come_round() -> None:
    """The loop's timer only has to end its wait: the poller acts on each turn."""
