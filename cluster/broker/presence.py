"""Who is dead? Decided from what the broker says of its connections, without a clock or a call.

Each worker's watchdog subscribes to one common channel and to one of its own.
While at least as many subscribe to the common one as take part, nobody asks
further. When fewer do, the missing are those whose own channel has no
subscriber. A worker is dead when it was missing at two looks in a row, which
forgives a watchdog that reconnects at once. After the broker was away, all may
be missing; each gets time to come back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Presence:
    """The state between looks."""

    _missing: set[str] = field(default_factory=set)
    _returning: set[str] = field(default_factory=set)
    _return_by: float = 0.0

    def broker_was_away(self, members: Collection[str], return_by: float) -> None:
        """It was restarted, or didn't answer for a while: any connection may be broken.
        ``members`` have until ``return_by`` to come back."""
        self._missing.clear()
        self._returning = set(members)
        self._return_by = return_by

    def must_ask(self, members: int, subscribers: int) -> bool:
        """Whether the counts alone don't show that all are there."""
        return bool(self._returning or self._missing) or subscribers < members

    def look(self, subscribers: Mapping[str, int], now: float) -> set[str]:
        """Take in each member's own count of subscribers; return who is dead.

        Args:
            subscribers: by member's node name.
            now: on the clock of ``return_by``.
        """
        missing = {node for node, count in subscribers.items() if count == 0}
        self._returning &= missing
        if now >= self._return_by:
            self._returning.clear()
        dead = missing & self._missing - self._returning
        self._missing = missing - dead - self._returning
        return dead
