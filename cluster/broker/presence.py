"""Who is dead? Decided from what the broker says of its connections, without a clock or a call.

*Missing.* Each worker's watchdog subscribes to one common channel and to one of
its own. While at least as many subscribe to the common one as take part, nobody
asks further. When fewer do, the missing are those whose own channel has no
subscriber. Who is missing at two looks in a row is a suspect.

A process that died has no connection left; one whose subscription alone broke
has others, which bear its name, and gets time to subscribe again. So has every
worker after the broker was away.

*Silent.* A process that is stopped, or whose network is cut without a word, keeps
its connections. But its watchdog says something over its subscription several
times in a liveness time-out, and the broker knows since when it hasn't.

All times are seconds of :class:`cluster.attention.Attention`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

#: Seconds after which a suspect that still had a connection is looked at again.
LOOK_AGAIN = 0.5

#: Parts of the patience: from which silence on a worker is doubted, at which one it is dead, and
#: for how long it must have been doubted by then. Less than the whole, so that with the time
#: between two looks, of which there are :data:`cluster.settings.BEATS`, it is dead within it.
DOUBTED_AT, DEAD_AT, DOUBTED_FOR = 0.5, 0.9, 0.3


@dataclass(slots=True)
class Presence:
    """The state between looks.

    Args:
        patience: seconds that a worker which has a connection may go without
            its subscription, or without a word.
    """

    patience: float
    _since: dict[str, float] = field(default_factory=dict)  # when each began to be missing
    _spared: dict[str, float] = field(default_factory=dict)  # until when each is no suspect
    _quiet: dict[str, float] = field(default_factory=dict)  # when each was first found quiet

    def broker_was_away(self, members: Collection[str], now: float) -> None:
        """It was restarted, or didn't answer for a while: any connection may be broken.
        All ``members`` get :attr:`patience` to come back."""
        self._since.clear()
        self._spared = dict.fromkeys(members, now + self.patience)
        self._quiet.clear()

    def must_ask(self, members: int, subscribers: int) -> bool:
        """Whether the counts alone don't show that all are there."""
        return bool(self._spared or self._since) or subscribers < members

    def look(self, subscribers: Mapping[str, int], now: float) -> set[str]:
        """Take in each member's own count of subscribers; return the suspects.

        Args:
            subscribers: by member's node name.
            now: on one clock for all calls.
        """
        missing = {node for node, count in subscribers.items() if count == 0}
        self._spared = {
            node: until for node, until in self._spared.items() if node in missing and now < until
        }
        suspects = missing & self._since.keys() - self._spared.keys()
        self._since = {node: self._since.get(node, now) for node in missing}
        return suspects

    def judge(self, suspects: Collection[str], connected: AbstractSet[str], now: float) -> set[str]:
        """Return which of the suspects are dead.

        Args:
            suspects: from :meth:`look`.
            connected: the nodes that have a connection of any kind.
            now: as for :meth:`look`.
        """
        dead = set()
        for node in suspects:
            if node in connected and now - self._since[node] < self.patience:
                self._spared[node] = now + LOOK_AGAIN
            else:
                del self._since[node]
                dead.add(node)
        return dead

    @property
    def doubts(self) -> bool:
        """Whether somebody was silent for so long that it is worth to listen more often."""
        return bool(self._quiet)

    def hear(self, silences: Mapping[str, float], now: float) -> set[str]:
        """Take in for how long the broker has heard nothing of each member; return who is dead.

        Silence counts that the broker has measured and of which we have seen the end ourselves,
        in several looks: after a pause of the whole machine the broker's measure alone would
        condemn everybody.

        Args:
            silences: seconds, by node name, of those that have their subscription.
            now: as for :meth:`look`.
        """
        self._quiet = {
            node: self._quiet.get(node, now)
            for node, seconds in silences.items()
            if seconds >= DOUBTED_AT * self.patience
        }
        dead = {
            node
            for node, since in self._quiet.items()
            if silences[node] >= DEAD_AT * self.patience
            and now - since >= DOUBTED_FOR * self.patience
        }
        for node in dead:
            del self._quiet[node]
        return dead
