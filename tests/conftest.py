"""What all tests share: the environment stripped of this machine's settings, and a
check that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.settings import CELERY_OVERRIDES

#: Every process that a test starts, and theirs, has this variable with the test's own value.
MARK = "CLUSTER_TEST_MARK"

#: Seconds in which everything must be gone.
GONE_WITHIN = 5.0


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what happens to be set; the choice of the server is CI's."""
    for name in list(os.environ):
        if name.startswith(("CLUSTER_", "AWS_", "ECS_")) and name != "CLUSTER_BROKER_SERVER":
            monkeypatch.delenv(name)
    for name in CELERY_OVERRIDES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits for a condition with a deadline."""
    return wait_until


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Return as soon as ``condition()`` is true; fail, saying ``what``, after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:.0f} s in vain: {what}")
        time.sleep(0.02)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes, this one aside, that carry the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [process for process in found if process.is_running()]


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[str]:
    """After the test: no process, listening socket, descriptor, thread or temporary file more
    than before. Yields the mark that the test's processes carry."""
    mark = secrets.token_hex(8)
    directory = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    me = psutil.Process()
    threads = set(threading.enumerate())
    descriptors = set(_descriptors(me))
    yield mark
    check_nothing_left(mark, directory)
    wait_until(
        lambda: set(threading.enumerate()) <= threads,
        f"threads are left: {set(threading.enumerate()) - threads}",
        GONE_WITHIN,
    )
    # The records that pytest keeps hold exceptions, these their frames, and
    # those connections; which hang together in cycles besides.
    caplog.get_records("call").clear()
    gc.collect()
    more = set(_descriptors(me)) - descriptors
    assert not more, f"descriptors are left: {more}"


def check_nothing_left(mark: str, directory: Path) -> None:
    """No process carries the mark (and so none of their sockets is open), no file is left."""
    deadline = time.monotonic() + GONE_WITHIN
    while left := marked(mark):
        if time.monotonic() > deadline:
            described = [f"{process.pid} {' '.join(process.cmdline())}" for process in left]
            for process in left:
                process.kill()
            pytest.fail(f"processes are left: {described}")
        time.sleep(0.02)
    wait_until(lambda: not list(directory.iterdir()), f"files are left in {directory}", GONE_WITHIN)


def _descriptors(process: psutil.Process) -> list[str]:
    """The open descriptors of this process that stand for something outside it."""
    root = Path("/proc/self/fd")
    if not root.is_dir():  # macOS: sockets and files are what psutil can tell
        return [str(connection) for connection in process.net_connections()]
    found = []
    for entry in root.iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith(("socket:", "pipe:", "/tmp")):
            found.append(target)
    return found
