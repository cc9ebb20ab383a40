"""What the manager and its broker have to tell each other about results, while the broker fills up.

One for each broker of this process, whatever threads wait for results: what has
been delivered, so that the broker may free it, and whether it is full, so that
who waits can say what for. The supervisor passes both on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

#: Delivered results that are remembered here: who asks again for one that was freed is told so.
REMEMBERED = 20_000


class Deliveries:
    """Between one manager and its broker."""

    def __init__(self) -> None:
        #: Whether workers' results are refused, save for those that are waited for.
        self.refused = False
        self._new: deque[str] = deque()
        self._known: dict[str, None] = {}
        self._lock = threading.Lock()

    def note(self, keys: Iterable[str]) -> None:
        """The results with these keys are there, and aren't needed any more: they are in this
        process, or what was made from them is."""
        with self._lock:
            for key in keys:
                self._new.append(key)
                self._known[key] = None
            while len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]

    def take(self, at_most: int) -> list[str]:
        """Some that the broker hasn't heard of yet, in order."""
        with self._lock:
            return [self._new.popleft() for _ in range(min(at_most, len(self._new)))]

    def put_back(self, keys: Iterable[str]) -> None:
        """The broker couldn't be told of these."""
        with self._lock:
            self._new.extendleft(reversed(tuple(keys)))

    def forget(self, key: str) -> None:
        """Who asks for this one again finds nothing, as was asked for."""
        with self._lock:
            self._known.pop(key, None)

    def knows(self, key: str) -> bool:
        """Whether this one was delivered, not too long ago."""
        return key in self._known


_all: dict[str, Deliveries] = {}


def of(password: str) -> Deliveries:
    """Those of the broker with this password: each run has its own."""
    return _all.setdefault(password, Deliveries())


def forget(password: str) -> None:
    """The broker is no more."""
    _all.pop(password, None)
