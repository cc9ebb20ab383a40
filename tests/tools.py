"""Waiting with deadlines, and finding what a test left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.settings import CELERY_OVERRIDES

#: Every process that a test starts, and theirs, has this variable with the test's own value.
MARK = "CLUSTER_TEST_MARK"

#: Seconds in which everything must be gone.
GONE_WITHIN = 5.0


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Return as soon as ``condition()`` is true; fail, saying ``what``, after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:.0f} s in vain: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Traces:
    """How what a test started is known: processes by a variable in their environment, or
    by their working directory (a server that sets its title overwrites its environment), files
    by lying in the test's temporary directory."""

    mark: str
    directory: Path

    def processes(self) -> list[psutil.Process]:
        """The living processes, this one aside."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and self._is_ours(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.environ().get(MARK) == self.mark or Path(process.cwd()).is_relative_to(
            self.directory
        )

    def check_gone(self) -> None:
        """Fail unless all processes and files are gone soon."""
        deadline = time.monotonic() + GONE_WITHIN
        while left := self.processes():
            if time.monotonic() > deadline:
                described = [f"{process.pid} {' '.join(process.cmdline())}" for process in left]
                for process in left:
                    process.kill()
                pytest.fail(f"processes are left: {described}")
            time.sleep(0.02)
        wait_until(
            lambda: not list(self.directory.iterdir()),
            f"files are left in {self.directory}",
            GONE_WITHIN,
        )


def descriptors_of(process: psutil.Process) -> list[str]:
    """The open descriptors of this process that stand for something outside it."""
    root = Path("/proc/self/fd")
    if not root.is_dir():  # macOS: sockets and files are what psutil can tell
        return [str(connection) for connection in process.net_connections()]
    found = []
    for entry in root.iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith(("socket:", "pipe:", "/tmp")):
            found.append(target)
    return found


def strip_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what happens to be set; the choice of the server is CI's."""
    for name in list(os.environ):
        if name.startswith(("CLUSTER_", "AWS_", "ECS_")) and name != "CLUSTER_BROKER_SERVER":
            monkeypatch.delenv(name)
    for name in CELERY_OVERRIDES:
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def leaving_nothing(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget: Callable[[], object] = lambda: None,
) -> Iterator[Traces]:
    """At the end: no process, listening socket, descriptor, thread or temporary file more than
    before. Yields how they are known.

    Args:
        directory: an empty one, for temporary files.
        forget: called before the descriptors are counted, to drop what pytest keeps.
    """
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    me = psutil.Process()
    threads = set(threading.enumerate())
    descriptors = set(descriptors_of(me))
    traces = Traces(mark, directory)
    yield traces
    traces.check_gone()
    wait_until(
        lambda: set(threading.enumerate()) <= threads,
        f"threads are left: {set(threading.enumerate()) - threads}",
        GONE_WITHIN,
    )
    forget()
    gc.collect()
    more = set(descriptors_of(me)) - descriptors
    assert not more, f"descriptors are left: {more}"
