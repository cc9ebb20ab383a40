"""A clock that goes only while somebody looks.

Who judges others by their silence must have been there to hear them. After a
pause of its own (a machine that slept, a process that was stopped, a GIL held
for a minute) the silence it finds is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Attention:
    """Counts the seconds between looks, but of each pause no more than ``longest``.

    Args:
        longest: seconds that a look takes at the most, if nothing holds it up.
    """

    longest: float
    _seconds: float = 0.0
    _last: float | None = field(default=None)

    def look(self, now: float) -> float:
        """Seconds of attention until now.

        Args:
            now: seconds on a clock that only goes forward.
        """
        if self._last is not None:
            self._seconds += min(now - self._last, self.longest)
        self._last = now
        return self._seconds
