"""The guardian's eye on the workers: who is dead, and giving back what the dead held."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from cluster.attention import Attention
from cluster.broker.messages import Dead
from cluster.broker.presence import DEAD_AT, Presence
from cluster.settings import BEATS
from cluster.wire import keys
from cluster.wire.ledger import reason
from cluster.wire.registration import announce_over
from cluster.wire.scripts import Scripts

#: Seconds between full looks, which don't rest on the counts alone.
FULL_LOOK = 1.0

#: Seconds for one look after which the broker counts as having been away: a
#: worker's watchdog gives up on an answer soon after.
SLOW = 0.5

#: Seconds for a look at a broker that doesn't answer: some commands' time-outs.
LONGEST_LOOK = 5.0

#: Seconds between looks at whether the workers have heard the farewell.
TICK = 0.02


class Workers:
    """Looks at the broker's connections, and acts on what :class:`Presence` makes of them.

    Args:
        client: of the broker.
        patience: seconds without a sign of life within which a worker counts as dead.
        max_deliveries: how often a task's process may die.
        timeout: seconds for each of the client's commands.
    """

    def __init__(
        self, client: Redis, *, patience: float, max_deliveries: int, timeout: float
    ) -> None:
        self._client = client
        self._scripts = Scripts(client, max_deliveries)
        self._patience = patience
        self._presence = Presence(patience)
        self._attention = Attention(longest=LONGEST_LOOK)
        self._hearing = Attention(longest=patience / BEATS)
        self._to_bury: dict[str, str] = {}  # who was found dead, and why, until it is done
        self._next_full_look = 0.0
        self._next_hearing = 0.0
        self._away = False

    def broker_was_away(self) -> None:
        """It was restarted: any worker's connection may be broken."""
        self._away = True

    def look(self) -> tuple[bool, list[Dead]]:
        """Look once; return whether the broker answered, and who is newly dead."""
        dead = []
        try:
            began = time.monotonic()
            now = self._attention.look(began)
            if self._away:
                self._presence.broker_was_away(self._members(), now)
            for worker in self._look(now):
                dead.append(worker)  # noqa: PERF402 (what comes before an exception counts)
            self._away = time.monotonic() - began > SLOW
        except ResponseError as error:
            # It answers. That it can't write for now, for want of disk, say, is waited for.
            return not reason(error).startswith("BUSY"), dead
        except (RedisError, OSError):
            # A server that has just died is seen at the next turn. One that
            # doesn't answer in time may have lost the workers as well.
            self._away = True
            return False, dead
        return True, dead

    def _look(self, now: float) -> Iterator[Dead]:
        with self._client.pipeline(transaction=False) as pipe:
            # In this order: a worker subscribes before it registers.
            pipe.hlen(keys.WORKERS)
            pipe.pubsub_numsub(keys.PRESENCE)
            members, [(_, subscribers)] = pipe.execute()
        yield from self._bury((), "")
        if now >= self._next_full_look or self._presence.must_ask(members, subscribers):
            self._next_full_look = now + FULL_LOOK
            yield from self._look_for_missing(now)
        if now >= self._next_hearing:
            yield from self._listen_for_silent()
            # Where somebody is silent, four times as often: what is found late comes on top.
            pause = self._patience / BEATS
            self._next_hearing = now + (pause / 4 if self._presence.doubts else pause)

    def _look_for_missing(self, now: float) -> Iterator[Dead]:
        nodes = self._members()
        counts = {}
        if nodes:
            reply = self._client.pubsub_numsub(*(keys.presence(node) for node in nodes))
            counts = dict(zip(nodes, (count for _, count in reply), strict=True))
        suspects = self._presence.look(counts, now)
        if suspects:
            # A watchdog's that is about to subscribe again is one, too.
            names = self._silences("normal").keys()
            connected = {node for node in suspects if {node, keys.presence(node)} & names}
            dead = self._presence.judge(suspects, connected, now)
            yield from self._bury(dead, "its connection is gone")

    def _listen_for_silent(self) -> Iterator[Dead]:
        # By the watchdog's connection alone: the broker also counts what it writes itself, and to
        # others it writes whatever is broadcast.
        silences = self._silences("pubsub")
        names = {node: keys.presence(node) for node in self._members()}
        members = {node: silences[name] for node, name in names.items() if name in silences}
        # By a clock of its own, on which no pause counts for more than one look.
        dead = self._presence.hear(members, self._hearing.look(time.monotonic()))
        seconds = DEAD_AT * self._patience
        yield from self._bury(dead, f"no sign of life for {seconds:g} s: stopped or cut off")

    def _bury(self, nodes: Iterable[str], why: str) -> Iterator[Dead]:
        begun = set(self._to_bury)
        self._to_bury.update(dict.fromkeys(nodes, why))
        for node, how in tuple(self._to_bury.items()):
            held = self._scripts.release(node, how, died=True)
            # That it is done already tells of an answer that was lost, or that it has just left.
            if held >= 0 or node in begun:
                yield Dead(node, max(held, 0), how)
            del self._to_bury[node]

    def _members(self) -> list[str]:
        """The nodes that take part."""
        return [node.decode() for node in cast("list[bytes]", self._client.hkeys(keys.WORKERS))]

    def _silences(self, kind: str) -> dict[str, float]:
        """For how many seconds nothing has come or gone, by the name of a connection of this kind:
        "normal" ones for a node's tasks have its name, a "pubsub" one of its watchdog's that of
        its channel.

        Long to list where there are thousands, so only asked for now and then.
        """
        listed: dict[str, float] = {}
        for client in self._client.client_list(_type=kind):
            silence = float(client["idle"])
            listed[client["name"]] = min(silence, listed.get(client["name"], silence))
        return listed

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
