"""The guardian's eye on the workers: who is dead, and giving back what the dead held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import cast

from redis.exceptions import RedisError

from cluster.broker.presence import Presence
from cluster.model import Endpoint
from cluster.settings import LIVENESS_TIMEOUT
from cluster.wire import keys
from cluster.wire.client import connect
from cluster.wire.registration import announce_over
from cluster.wire.scripts import Scripts

#: Seconds between full looks, which don't rest on the counts alone.
FULL_LOOK = 1.0

#: Seconds for one look after which the broker counts as having been away: a
#: worker's watchdog gives up on an answer after one second.
SLOW = 0.5

#: Seconds between looks at whether the workers have heard the farewell.
TICK = 0.02


class Workers:
    """Looks at the broker's connections, and acts on what :class:`Presence` makes of them.

    Args:
        endpoint: the broker.
        timeout: seconds for each command to it.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._client = connect(endpoint, timeout)
        self._scripts = Scripts(self._client)
        self._presence = Presence(LIVENESS_TIMEOUT)
        self._next_full_look = 0.0
        self._away = False

    def broker_was_away(self) -> None:
        """It was restarted: any worker's connection may be broken."""
        self._away = True

    def look(self) -> list[tuple[str, int]]:
        """Look once; return who is newly dead, and how many messages each held."""
        dead = []
        try:
            began = time.monotonic()
            if self._away:
                self._presence.broker_was_away(self._members(), began)
            for worker in self._look(began):
                dead.append(worker)  # noqa: PERF402 (what comes before an exception counts)
            self._away = time.monotonic() - began > SLOW
        except (RedisError, OSError):
            # A server that has just died is seen at the next turn. One that
            # doesn't answer in time may have lost the workers as well.
            self._away = True
        return dead

    def _look(self, now: float) -> Iterator[tuple[str, int]]:
        with self._client.pipeline(transaction=False) as pipe:
            # In this order: a worker subscribes before it registers.
            pipe.hlen(keys.WORKERS)
            pipe.pubsub_numsub(keys.PRESENCE)
            members, [(_, subscribers)] = pipe.execute()
        full = now >= self._next_full_look
        if not full and not self._presence.must_ask(members, subscribers):
            return
        self._next_full_look = now + FULL_LOOK
        nodes = self._members()
        counts = {}
        if nodes:
            reply = self._client.pubsub_numsub(*(keys.presence(node) for node in nodes))
            counts = dict(zip(nodes, (count for _, count in reply), strict=True))
        suspects = self._presence.look(counts, now)
        if not suspects:
            return
        for node in self._presence.judge(suspects, self._connected(), now):
            held = self._scripts.release(node, "its connection is gone", died=True)
            if held >= 0:
                yield node, held

    def _members(self) -> list[str]:
        """The nodes that take part."""
        return [node.decode() for node in cast("list[bytes]", self._client.hkeys(keys.WORKERS))]

    def _connected(self) -> set[str]:
        """The nodes whose main process has a connection for its tasks. Long to list where
        there are thousands, so only asked for when somebody is missing."""
        return {client["name"] for client in self._client.client_list(_type="normal")}

    def say_farewell(self, timeout: float) -> None:
        """Tell the workers that it is over, and wait for at most ``timeout`` seconds until they
        have heard."""
        deadline = time.monotonic() + timeout
        try:
            announce_over(self._client, 0)
            while time.monotonic() < deadline:
                [(_, subscribers)] = self._client.pubsub_numsub(keys.PRESENCE)
                if not subscribers:
                    return
                time.sleep(TICK)
        except (RedisError, OSError):
            return  # no server: the workers find that out by themselves
