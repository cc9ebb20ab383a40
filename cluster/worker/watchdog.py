"""A thread that keeps an eye on what the worker's event loop can't see when it is stuck.

It has a connection of its own, whose subscription is the worker's sign of
life for the guardian, and ends the process when it is an orphan, fenced, or
too slow to leave.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from celery.utils.log import get_logger
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.attention import Attention
from cluster.model import Endpoint
from cluster.settings import BEATS
from cluster.wire import keys
from cluster.wire.client import connect
from cluster.wire.exitcodes import ExitCode
from cluster.wire.ledger import CONNECTION_ERRORS
from cluster.wire.registration import grace_in, is_fenced
from cluster.worker.drain import Drain
from cluster.worker.processes import end_now

logger = get_logger(__name__)

#: Seconds between turns, and for each command to the broker.
TURN = 0.25
COMMAND_TIMEOUT = 1.0

#: Seconds for a turn while the broker doesn't answer: some commands' time-outs.
LONGEST_TURN = 3 * COMMAND_TIMEOUT

#: Seconds for the first connection.
FIRST_CONNECTION = 10.0

#: The exit code of a mistake in here: none of the table, as Python's own for an exception.
UNEXPECTED = 1


class Watchdog(threading.Thread):
    """Watches until the process ends.

    Args:
        endpoint: the broker.
        node: this worker's node name.
        parent: process id of the manager, where it is this process's parent; else 0.
        liveness_timeout: seconds without a sign of life within which the worker counts as dead.
        orphan_timeout: seconds without the broker after which the worker ends itself.
        drain: the way out.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        node: str,
        parent: int,
        liveness_timeout: float,
        orphan_timeout: float,
        drain: Drain,
    ) -> None:
        super().__init__(name="cluster-watchdog", daemon=True)
        self._subscribed = threading.Event()
        self._node = node
        self._own_channel = keys.presence(node)
        self._parent = parent
        self._orphan_timeout = orphan_timeout
        self._drain = drain
        # A pause of this process's, or of the whole machine, is no absence of the broker's.
        self._attention = Attention(longest=LONGEST_TURN)
        self._now = self._reached = self._attention.look(time.monotonic())
        self._beat_every = liveness_timeout / BEATS
        self._next_beat = 0.0
        self._unanswered = False
        self._client = connect(endpoint, COMMAND_TIMEOUT, name=self._own_channel)
        self._pubsub: Any = None
        self._connected = False

    def wait_until_subscribed(self) -> bool:
        """Wait for its first connection; false if it has none within :data:`FIRST_CONNECTION`.

        Only then may this process fork: what a thread does as it connects,
        imports included, takes locks, and a fork copies them as they are.
        """
        return self._subscribed.wait(FIRST_CONNECTION)

    def run(self) -> None:
        try:
            while True:
                self._turn()
        except Exception:
            logger.exception("The watchdog failed; a worker without one must not go on.")
            end_now(UNEXPECTED)

    def _turn(self) -> None:
        self._now = self._attention.look(time.monotonic())
        self._check()
        try:
            if self._pubsub is None:
                self._subscribe()
            self._listen()
            self._beat()
        except CONNECTION_ERRORS:
            # At once, if it was this connection alone: the guardian doesn't
            # wait long. Where there is no broker, with pauses.
            was_connected = self._disconnect()
            if not was_connected:
                time.sleep(TURN)

    def _check(self) -> None:
        if self._parent and os.getppid() != self._parent:
            logger.warning("The manager is gone; leaving.")
            end_now(ExitCode.ORPHANED)
        if self._now - self._reached > self._orphan_timeout:
            logger.warning("The broker was away for %s s; leaving.", self._orphan_timeout)
            end_now(ExitCode.ORPHANED)
        code = self._drain.overdue
        if code is not None:
            end_now(code)

    def _subscribe(self) -> None:
        self._pubsub = self._client.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(keys.PRESENCE, self._own_channel)
        # After subscribing, so that no word falls in between.
        if self._client.hexists(keys.FENCED, self._node):
            logger.warning("This worker was declared dead; leaving.")
            end_now(ExitCode.FENCED)
        grace = self._client.get(keys.OVER)
        if grace is not None:
            self._leave(float(grace))
        self._reached = self._now
        self._next_beat = time.monotonic() + self._beat_every
        self._unanswered = False
        self._connected = True

    def _beat(self) -> None:
        """Give a sign of life, over the connection by which the guardian knows us."""
        if time.monotonic() < self._next_beat:
            return
        if self._unanswered:
            raise RedisTimeoutError("The broker hasn't answered since the last beat.")
        self._pubsub.ping()
        self._unanswered = True
        self._next_beat = time.monotonic() + self._beat_every

    def _listen(self) -> None:
        message = self._pubsub.get_message(timeout=min(TURN, self._beat_every))
        if message is None:
            return
        self._reached = self._now
        self._unanswered = False
        if message["type"] == "subscribe":
            if message["channel"].decode() == self._own_channel:
                self._subscribed.set()
            return
        if is_fenced(message["data"]):
            logger.warning("This worker was declared dead; leaving.")
            end_now(ExitCode.FENCED)
        grace = grace_in(message["data"])
        if grace is not None:
            self._leave(grace)

    def _leave(self, grace: float) -> None:
        if not self._drain.attached:
            end_now(ExitCode.LEFT)  # it still boots, and holds nothing
        self._drain.begin(ExitCode.LEFT, grace)

    def _disconnect(self) -> bool:
        """Let go of the connection; returns whether there was one."""
        was_connected, self._connected = self._connected, False
        if self._pubsub is not None:
            self._pubsub.close()
            self._pubsub = None
        self._client.connection_pool.disconnect()
        return was_connected
