"""How often to start again what keeps failing: with growing pauses, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Restarts:
    """A budget of restarts within a sliding window.

    Args:
        limit: how many within ``window``.
        window: seconds.
        first: seconds to wait before the second in a row; the first is at once.
        longest: seconds that a wait grows to by doubling.
    """

    limit: int
    window: float
    first: float = 0.1
    longest: float = 5.0
    _at: list[float] = field(default_factory=list)

    def next(self, now: float) -> float | None:
        """Ask for a restart: seconds to wait before it, or ``None`` if the budget is spent."""
        self._at = [at for at in self._at if now - at < self.window]
        done = len(self._at)
        if done >= self.limit:
            return None
        self._at.append(now)
        return 0.0 if done == 0 else min(self.first * 2 ** (done - 1), self.longest)
