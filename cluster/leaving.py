"""What still runs when the interpreter ends or SIGTERM comes is stopped then."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

#: As a shell reports a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM

_stops: dict[int, tuple[int, Callable[[], None]]] = {}
_lock = threading.Lock()
_handling = False


def add(key: int, stop: Callable[[], None]) -> None:
    """Call ``stop`` at the latest when this process ends, unless :func:`remove` comes first.

    SIGTERM is turned into ``SystemExit``, so that the user's ``with`` blocks
    are left in order; a handler of the user's own is left alone.
    """
    global _handling
    with _lock:
        _stops[key] = (os.getpid(), stop)
        if (
            not _handling
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            signal.signal(signal.SIGTERM, _on_sigterm)
            _handling = True


def remove(key: int) -> None:
    """It has stopped."""
    global _handling
    with _lock:
        _stops.pop(key, None)
        if _handling and not _stops and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is _on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _handling = False


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    # Once: what SystemExit sets off must not be interrupted by another.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


@atexit.register
def _stop_all() -> None:
    for pid, stop in list(_stops.values()):
        # A process that was forked has a copy of the list, and none of the clusters.
        if pid == os.getpid():
            stop()
