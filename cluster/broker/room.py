"""Keeps room in the broker: frees what was delivered, then refuses what comes from outside.

The broker's memory is a part of the manager's, and is bounded. As it fills, four
things happen in turn:

1. Results that the manager has got are freed, the first ones first.
2. Messages from outside of workers are refused, to whoever sends them. Workers still
   store results and send on what a chain or a chord goes on with: else what is
   there could never be finished, and nothing become free.
3. Large results are refused as well, save for those that somebody waits for. Workers
   wait with theirs until the manager has got some.
4. So are small ones, save for those and for failures. What is left before the server
   itself refuses everything is for workers to join, and for all else that Celery keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from redis import Redis
from redis.exceptions import RedisError

from cluster.broker.messages import Full, Room
from cluster.settings import LARGE_REFUSED_FROM, SENDERS_REFUSED_FROM
from cluster.wire import keys
from cluster.wire.scripts import RESULTS_REFUSED, SAY_FULL, Scripts

#: Parts of the memory: from the first on, what was delivered is freed; from the second on, all is
#: refused. Those in between are in the settings: who brings something large is asked at once,
#: by the scripts, since much may come between two looks.
FREE_FROM, ALL_FROM = 0.3, 0.95

#: A level is left when less than this part of what it began at is used.
LEAVE_AT = 0.9

#: Seconds between looks at the server's memory, while there is room and when there is less.
LOOK_EVERY = 0.25
LOOK_CLOSELY_EVERY = 0.02

#: Results to free in one step, and steps in one look: each holds up the server.
FREE_AT_ONCE = 500
STEPS = 10

#: From how many bytes on Valkey 9 doesn't copy a value into what it has to send. What isn't copied
#: doesn't count against a client's limit: an unread subscription kept every large result that was
#: freed (https://github.com/valkey-io/valkey/issues/2396). 0 has it copy all.
UNCOPIED_FROM = "min-string-size-avoid-copy-reply"


class Level(IntEnum):
    """How full it is."""

    FINE = 0
    SENDERS_REFUSED = 1
    LARGE_REFUSED = 2
    ALL_REFUSED = 3


#: How what the workers read of it begins.
WORDS = {
    Level.SENDERS_REFUSED: "",
    Level.LARGE_REFUSED: f"{RESULTS_REFUSED[0]}: ",
    Level.ALL_REFUSED: f"{RESULTS_REFUSED[1]}: ",
}


@dataclass(slots=True)
class Gauge:
    """Decides how full the broker is.

    Args:
        memory: bytes that it may have.
    """

    memory: int
    level: Level = Level.FINE

    def read(self, used: int) -> bool:
        """Take in how many bytes are used; return whether the level is another one."""
        before = self.level
        begins = {
            Level.FINE: 0.0,
            # A little before: what is sizeable is refused by itself, and keeps it from there.
            Level.SENDERS_REFUSED: 0.9 * SENDERS_REFUSED_FROM * self.memory,
            Level.LARGE_REFUSED: LARGE_REFUSED_FROM * self.memory,
            Level.ALL_REFUSED: ALL_FROM * self.memory,
        }
        reached = max(level for level, begin in begins.items() if used >= begin)
        self.level = max(self.level, reached)
        while self.level > reached and used < LEAVE_AT * begins[self.level]:
            self.level = Level(self.level - 1)
        return self.level is not before


class Memory:
    """Looks at the server's memory now and then, and acts on it.

    Args:
        client: of the broker.
        memory: bytes that it may have.
    """

    def __init__(self, client: Redis, memory: int) -> None:
        self._client = client
        self._scripts = Scripts(client)
        self._memory = memory
        self._gauge = Gauge(memory)
        self._next_look = 0.0
        self._known = False
        self._copies = False

    def broker_was_away(self) -> None:
        """It knows nothing of what it was told."""
        self._known = self._copies = False

    def look(self, now: float) -> list[Full | Room]:
        """Look, if it is time; return what is new.

        Args:
            now: seconds on a clock that only goes forward.
        """
        if now < self._next_look:
            return []
        self._next_look = now + LOOK_EVERY
        try:
            return list(self._look())
        except (RedisError, OSError):
            self._known = False  # whatever is new couldn't be said
            return []  # one that doesn't answer is the guardian's business

    def _look(self) -> Iterator[Full | Room]:
        if not self._copies:
            if self._client.config_get(UNCOPIED_FROM):
                self._client.config_set(UNCOPIED_FROM, 0)
            self._copies = True
        used = self._used()
        if used >= FREE_FROM * self._memory:
            self._next_look += LOOK_CLOSELY_EVERY - LOOK_EVERY
        for _ in range(STEPS):
            if used < FREE_FROM * self._memory or not self._scripts.free(FREE_AT_ONCE):
                break
            used = self._used()
        if not self._gauge.read(used) and self._known:
            return
        # Not known: a guardian before us may have left its word.
        if self._gauge.level is Level.FINE:
            said = bool(self._client.delete(keys.FULL))
            self._known = True
            if said:
                yield Room()
        else:
            words = f"{WORDS[self._gauge.level]}{used} of {self._memory} bytes are used"
            self._client.eval(SAY_FULL, 1, keys.FULL, words)
            self._known = True
            yield Full(used, self._memory, results=self._gauge.level > Level.SENDERS_REFUSED)

    def _used(self) -> int:
        return int(self._client.info("memory")["used_memory"])
