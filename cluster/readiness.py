"""Are enough workers ready? The decision, and the ping that it rests on."""

from __future__ import annotations

import logging
from collections.abc import Collection
from enum import Enum, auto
from typing import Any

import celery

logger = logging.getLogger(__name__)

#: Seconds for the nodes of one ping to answer; who doesn't is asked again.
PING_TIMEOUT = 1.0


class Verdict(Enum):
    """What to do about the wait for workers."""

    WAIT = auto()
    ALL = auto()  # as many as wanted
    ENOUGH = auto()  # no more are to be had now, but the minimum is there
    TOO_FEW = auto()  # the minimum can't be had (any more)


def decide(*, ready: int, coming: int, wanted: int, minimum: int, expired: bool) -> Verdict:
    """Whether to go on waiting.

    Args:
        ready: workers that answered a ping.
        coming: workers that may yet become ready.
        wanted: the target.
        minimum: what will do at the deadline.
        expired: whether that has passed.
    """
    if ready >= wanted:
        return Verdict.ALL
    if expired or coming == 0:
        return Verdict.ENOUGH if ready >= minimum else Verdict.TOO_FEW
    if ready + coming < minimum:
        return Verdict.TOO_FEW
    return Verdict.WAIT


class Pinger:
    """Pings nodes by name, through one mailbox.

    Celery's own ``app.control.ping`` makes a new mailbox each time, and replies
    to one made within a second of another get lost.
    """

    def __init__(self, app: celery.Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._mailbox: Any = None

    def ping(self, nodes: Collection[str]) -> set[str]:
        """Which of these nodes answer within :data:`PING_TIMEOUT`.

        Raises what a broken connection raises; the next call makes a new one.
        """
        try:
            if self._connection is None:
                self._connection = self._app.connection_for_write()
                self._mailbox = self._app.control.mailbox(self._connection)
                # Else it would wait for a producer of the app's own pool, and
                # the user's threads may have them all.
                self._mailbox.producer_pool = None
            replies = self._mailbox._broadcast(
                "ping",
                reply=True,
                destination=list(nodes),
                timeout=PING_TIMEOUT,
                limit=len(nodes),
            )
        except BaseException:
            self.close()
            raise
        return {node for reply in replies or () for node in reply} & set(nodes)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        connection, self._connection, self._mailbox = self._connection, None, None
        if connection is None:
            return
        for channel in tuple(connection.transport.channels or ()):
            # kombu would wait for the pop that is outstanding, a second long.
            channel.drop_connections()
        connection.release()
