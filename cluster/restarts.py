"""How often to start again what keeps failing: with growing pauses, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Restarts:
    """A budget of restarts within a sliding window.

    Args:
        limit: how many within ``window``.
        window: seconds.
        first: seconds to wait before the first that isn't at once.
        longest: seconds that a wait grows to by doubling.
        at_once: how many in a row aren't waited for.
    """

    limit: int
    window: float
    first: float = 0.1
    longest: float = 5.0
    at_once: int = 1
    _at: list[float] = field(default_factory=list)

    def next(self, now: float) -> float | None:
        """Ask for a restart: seconds to wait before it, or ``None`` if the budget is spent."""
        self._at = [at for at in self._at if now - at < self.window]
        done = len(self._at)
        if done >= self.limit:
            return None
        self._at.append(now)
        if done < self.at_once:
            return 0.0
        return min(self.first * 2.0 ** min(done - self.at_once, 30), self.longest)

    def forget(self) -> None:
        """It works again: the next is the first."""
        self._at.clear()
