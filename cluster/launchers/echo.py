"""Shows what workers print as it comes, each line with its worker's id before it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

#: Seconds between looks at the logs.
LOOK_EVERY = 0.1

#: Bytes of one log to show at one look; the rest comes at the next.
AT_ONCE = 256 * 1024

#: Bytes of a line that isn't complete to keep before it is shown as it is.
LINE_AT_MOST = 64 * 1024

#: Bytes of each log to show at the end, at most: the cluster waits for it.
AT_THE_END = 2**20

#: Seconds for that. Standard error may be a pipe that nobody reads.
END_TIMEOUT = 2.0

#: Seconds for a write to end when this process is about to fork.
FORK_TIMEOUT = 1.0


@dataclass(slots=True)
class _Log:
    worker: str
    path: Path
    position: int = 0
    rest: bytes = b""  # a line that isn't complete yet


class Echo:
    """Follows one cluster's log files, and writes what is added to them to standard error.

    It reads files rather than pipes, so that a worker never waits for a
    manager that is too busy to read.
    """

    def __init__(self) -> None:
        self._logs: list[_Log] = []
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-echo", daemon=True)

    def follow(self, worker: str, path: Path) -> None:
        """Show what this worker prints into ``path``, from its beginning."""
        with self._lock:
            self._logs.append(_Log(worker, path))
        if self._thread.ident is None:
            self._thread.start()

    def end(self) -> None:
        """Show what is left, or the end of it, and follow no more."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(END_TIMEOUT)

    def _run(self) -> None:
        behind = False
        while not self._ending.wait(0 if behind else LOOK_EVERY):
            shown = [self._show(log, AT_ONCE) for log in self._all()]
            behind = AT_ONCE in shown
        for log in self._all():
            self._show_end(log)

    def _all(self) -> tuple[_Log, ...]:
        with self._lock:
            return tuple(self._logs)

    def _show_end(self, log: _Log) -> None:
        with contextlib.suppress(FileNotFoundError):
            left = log.path.stat().st_size - log.position
            if left > AT_THE_END:
                log.position += left - AT_THE_END
                log.rest += b"\n[%d bytes are not shown]\n" % (left - AT_THE_END)
        self._show(log, AT_THE_END)
        if log.rest:
            _write(f"{log.worker} | {log.rest.decode(errors='replace')}\n")

    def _show(self, log: _Log, at_most: int) -> int:
        """Show what is new; how many bytes that was."""
        try:
            with log.path.open("rb") as file:
                file.seek(log.position)
                new = file.read(at_most)
        except FileNotFoundError:
            return 0  # not made yet, or removed with its directory
        log.position += len(new)
        *lines, log.rest = (log.rest + new).split(b"\n")
        if len(log.rest) > LINE_AT_MOST:  # a progress bar, say
            lines.append(log.rest)
            log.rest = b""
        _write("".join(f"{log.worker} | {line.decode(errors='replace')}\n" for line in lines))
        return len(new)


_writing = threading.Lock()
_held_for_fork = False


def _write(text: str) -> None:
    if text and sys.stderr is not None:  # None: it was closed
        # The user may have put anything there, and one that can't be written to is no
        # reason to stop working.
        with _writing, contextlib.suppress(Exception):
            sys.stderr.write(text)
            sys.stderr.flush()


def _before_fork() -> None:
    """A stream has a lock of its own, and a fork in the middle of a write would copy it held."""
    global _held_for_fork
    _held_for_fork = _writing.acquire(timeout=FORK_TIMEOUT)


def _after_fork_in_parent() -> None:
    if _held_for_fork:
        _writing.release()


def _after_fork_in_child() -> None:
    global _writing
    _writing = threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
