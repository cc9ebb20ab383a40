"""Shows what workers print as it comes, each line with its worker's id before it."""

from __future__ import annotations

import contextlib
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


@dataclass(slots=True)
class _Log:
    worker: str
    path: Path
    position: int = 0
    rest: bytes = b""  # a line that isn't complete yet


class Echo:
    """Follows log files, and writes what is added to them to this process's standard error.

    It reads files rather than pipes, so that a worker never waits for a
    manager that is too busy to read.
    """

    def __init__(self) -> None:
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, worker: str, path: Path) -> None:
        """Show what this worker prints into ``path``, from its beginning."""
        with self._lock:
            self._logs[worker] = _Log(worker, path)
            if self._thread is None:
                self._ending.clear()
                self._thread = threading.Thread(target=self._run, name="cluster-echo", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Show what is left, and follow no more. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._ending.set()
            thread.join()
        self._show_all(final=True)
        self._logs.clear()

    def _run(self) -> None:
        behind = False
        while not self._ending.wait(0 if behind else LOOK_EVERY):
            behind = self._show_all()

    def _show_all(self, *, final: bool = False) -> bool:
        """Show what is new; whether there may be more of it."""
        with self._lock:
            logs = tuple(self._logs.values())
        behind = False
        for log in logs:
            while (shown := self._show(log, final=final)) and final:
                pass
            behind = behind or shown == AT_ONCE
        return behind

    def _show(self, log: _Log, *, final: bool) -> int:
        """Show what is new; how many bytes that was."""
        try:
            with log.path.open("rb") as file:
                file.seek(log.position)
                new = file.read(AT_ONCE)
        except FileNotFoundError:
            return 0  # not made yet, or removed with its directory
        log.position += len(new)
        *lines, log.rest = (log.rest + new).split(b"\n")
        # A line without an end, or one so long that it mustn't be kept: a progress bar, say.
        if len(log.rest) > LINE_AT_MOST or (final and not new and log.rest):
            lines.append(log.rest)
            log.rest = b""
        text = "".join(f"{log.worker} | {line.decode(errors='replace')}\n" for line in lines)
        if text and sys.stderr is not None:  # None: it was closed
            # The user may have put anything there, and one that can't be written to is no
            # reason to stop working.
            with contextlib.suppress(Exception):
                sys.stderr.write(text)
                sys.stderr.flush()
        return len(new)
