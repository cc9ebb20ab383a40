"""A process of this package that lives as long as the manager does, and the pipe between them.

The manager holds one end of the companion's standard input: whatever ends the
manager closes it, and the companion ends, too. What one says to the other is a
JSON object a line (:mod:`cluster.jsonlines`).

:class:`Companion` is the manager's half, :class:`Leash` the companion's.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.interpreter import module_command, module_environment, original_python_path

#: Seconds between looks at whether the manager is still the parent, which nothing announces.
_LOOK_EVERY = 1.0

#: Bytes to read at once.
_CHUNK = 65536

#: Parts of a silence that are waited for one after the other.
_PARTS = 5


class Companion:
    """Starts the process and listens to it.

    Args:
        module: what it runs.
        log: a file for what it prints.
        environment: variables to add to this process's.
        on_line: called with each line it says, in a thread of its own.
        on_end: called after the last, in that thread.
        patience: seconds of silence after which it is killed. Default: it need not say anything.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self,
        module: str,
        *,
        log: Path,
        environment: Mapping[str, str],
        on_line: Callable[[bytes], None],
        on_end: Callable[[], None],
        patience: float | None = None,
    ) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                module_command(module),
                env=module_environment({**original_python_path(), **environment}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,  # no locks, which a fork in another thread would copy as they are
                # Ctrl-C is for the manager alone.
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self._stdout = self._process.stdout
        self._on_line, self._on_end = on_line, on_end
        self._patience = patience
        self.hung = False  # it was silent for too long
        _with_a_pipe.add(self)
        self._reader = threading.Thread(target=self._read, name=f"{module}-events", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, line: bytes, timeout: float) -> bool:
        """Say something; false if it is gone, or hasn't listened for ``timeout`` seconds."""
        rest = memoryview(line)
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._stdin, selectors.EVENT_WRITE)
                while rest:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        return False
                    rest = rest[self._stdin.write(rest) or 0 :]
            except (BrokenPipeError, ValueError):  # a ValueError: the pipe was closed here
                return False
        return True

    def end(self, timeout: float) -> int:
        """Let it end, or kill it after ``timeout`` seconds; returns its exit code. Idempotent."""
        _with_a_pipe.discard(self)
        self._stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        return self._process.returncode

    def _read(self) -> None:
        rest = b""
        try:
            while chunk := self._next_chunk():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"{"):  # else a sitecustomize has printed it
                        self._on_line(line)
        finally:
            self._on_end()
            self._stdout.close()

    def _next_chunk(self) -> bytes:
        """What it says next; nothing if it has ended."""
        if self._patience is not None and not self._says_something(self._patience):
            self.hung = True
            self._process.kill()
        return os.read(self._stdout.fileno(), _CHUNK)

    def _says_something(self, patience: float) -> bool:
        # In parts: after a pause of this machine one would be over before it can speak.
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            return any(selector.select(patience / _PARTS) for _ in range(_PARTS))

    def close_in_child(self) -> None:
        """In a process that the manager forked: hold no copy of the pipe's end."""
        self._stdin.close()


_with_a_pipe: weakref.WeakSet[Companion] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for companion in list(_with_a_pipe):
        companion.close_in_child()
    _with_a_pipe.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Leash:
    """In the companion: hears the manager, talks to it, and knows when it is gone.

    Takes over standard input and output; what is printed from now on goes to
    the log.
    """

    def __init__(self) -> None:
        self._manager = os.getppid()
        self._control, self._events = os.dup(sys.stdin.fileno()), os.dup(sys.stdout.fileno())
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, sys.stdin.fileno())
        os.close(null)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        os.set_blocking(self._control, False)
        os.set_blocking(self._events, False)
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._closed = False

    @property
    def gone(self) -> bool:
        """Whether the manager is: its pipe is closed, or this process has another parent, for a
        copy of the pipe's end may live on in a process that the manager forked."""
        self._hear()
        return self._closed or os.getppid() != self._manager

    def wait(self, *descriptors: int, seconds: float = _LOOK_EVERY) -> bool:
        """Wait until the manager says something more or any of ``descriptors`` is readable, or
        the time is up; true if the manager is gone. Take all its lines first."""
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._control, *descriptors):
                selector.register(descriptor, selectors.EVENT_READ)
            if self._outbox:
                selector.register(self._events, selectors.EVENT_WRITE)
            selector.select(seconds)
        self._flush()
        return self.gone

    def line(self) -> bytes | None:
        """The next line that the manager has said, if there is one."""
        self._hear()
        line, newline, rest = self._inbox.partition(b"\n")
        if not newline:
            return None
        self._inbox = rest
        return bytes(line)

    def wait_for_line(self) -> bytes | None:
        """The next line, or ``None`` if the manager is gone before it says one."""
        while (line := self.line()) is None:
            if self.wait():
                return None
        return line

    def say(self, line: bytes) -> None:
        """Tell the manager, when it listens: one too busy to read must not hold us up."""
        self._outbox += line
        self._flush()

    def drop(self) -> None:
        """In a process forked from this one: neither hear nor say anything."""
        os.close(self._control)
        os.close(self._events)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while not self._closed:
                heard = os.read(self._control, _CHUNK)
                self._inbox += heard
                self._closed = not heard

    def _flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[: os.write(self._events, self._outbox)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outbox.clear()
