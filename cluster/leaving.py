"""What still runs when the interpreter ends or SIGTERM comes is stopped then."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
            if signal.getsignal(signal.SIGTERM) in (_on_sigterm, signal.SIG_IGN):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _handling = False


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    # Once: what SystemExit sets off must not be interrupted by another.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


class Hurry:
    """Whether somebody has lost patience while interrupts were held."""

    asked = False


@contextlib.contextmanager
def interrupts_held() -> Iterator[Hurry]:
    """Ctrl-C and SIGTERM don't break in; they are noted, and raised at the end.

    An exception in the middle of a lock that the standard library holds would
    leave it locked, and whoever cleans up next would wait for ever.
    """
    hurry = Hurry()
    if threading.current_thread() is not threading.main_thread():
        yield hurry  # signals are handled in the main thread only
        return
    held: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        hurry.asked = True
        held.append((number, frame))

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield hurry
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if held and not isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        first, frame = held[0]
        handlers[signal.Signals(first)](first, frame)


@atexit.register
def _stop_all() -> None:
    for pid, stop in list(_stops.values()):
        # A process that was forked has a copy of the list, and none of the clusters.
        if pid == os.getpid():
            stop()


_forking = threading.local()


def _before_fork() -> None:
    """Python drops signals that a child gets before it has begun: let SIGTERM wait for that."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if _handling else ())


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    """A process that was forked has none of the clusters, and SIGTERM ends it as it would."""
    global _handling, _lock
    _lock = threading.Lock()  # another thread may have held it
    _stops.clear()
    if _handling and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _handling = False
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
