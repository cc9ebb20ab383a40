"""Shows how a wait goes: a live line on a terminal, one line per change elsewhere."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from rich.console import Console


class Display:
    """A line that changes, on standard error.

    Args:
        shown: whether to show anything; ``None``: yes.
    """

    def __init__(self, shown: bool | None) -> None:
        show = shown is not False
        self._console = _console() if show else None
        live = self._console is not None and self._console.is_terminal
        self._status = self._console.status("") if self._console is not None and live else None
        self._last = ""

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, text: str, *, timing: str = "") -> None:
        """The line now. ``timing`` changes all the time: by itself it is no news."""
        if self._status is not None:
            self._status.update(f"{text}, {timing}" if timing else text)
        elif self._console is not None and text != self._last:
            self._console.print(text, markup=False)
        self._last = text

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._console is not None and text != self._last:
            self._console.print(text, markup=False)
        self._last = text


class _StandardError:
    """Standard error as it is now. The user may have put anything there, or closed it, and one
    that can't be written to is no reason to fail."""

    def __init__(self) -> None:
        self._stream: Any = sys.stderr

    def write(self, text: str) -> int:
        with contextlib.suppress(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except Exception:  # noqa: BLE001 (whatever it says, it is none)
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _console() -> Console:
    # A script that shows nothing needn't pay for it.
    from rich.console import Console

    return Console(file=cast("IO[str]", _StandardError()), highlight=False, soft_wrap=True)
