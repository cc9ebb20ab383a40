"""A worker's processes belong together: when the main one goes, so do its pool's children."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

import psutil
from celery.signals import worker_process_shutdown

from cluster.parent import end_with_parent

_main = 0
_read_end = -1
_write_end = -1


def mark_main(scratch: str) -> None:
    """Make this process the main one: those it forks from now on end when it does.

    They hold the read end of a pipe whose write end only the main process
    has: it closes when that process is gone, in whatever way.

    Args:
        scratch: directory for the files that the processes share, or an empty
            string for one that this process makes, and leaves if it is killed.
    """
    global _main, _read_end, _write_end
    if scratch:
        # What multiprocessing passes on to its own children (multiprocessing/util.py,
        # get_temp_dir, which billiard uses).
        multiprocessing.current_process()._config["tempdir"] = scratch  # type: ignore[attr-defined]
    _main = os.getpid()
    _read_end, _write_end = os.pipe()
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    global _write_end
    if _write_end != -1:
        os.close(_write_end)
        _write_end = -1


def keep_to_main(host: str, port: int) -> None:
    """Connections to this address are the main process's alone: its children let go of them.

    A copy would keep the connection open, and in the broker's eyes the process alive, for as
    long as the child lives. And the main process's own event loop would go on to hear of a
    connection that it has closed (epoll(7), question 6).
    """
    addresses = {info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    os.register_at_fork(after_in_child=lambda: _drop_connections(addresses))


def _drop_connections(addresses: Container[tuple[Any, ...]]) -> None:
    if os.getppid() != _main:
        return  # what a task forks has nothing of the main process's
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            # A copy, since the object made of it closes what it has.
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                ours = connection.getpeername()[:2] in addresses
        except OSError:
            continue  # not connected, or it was the listing's own
        if ours:
            # Not closed: what holds the number closes it some time, and must not meet another.
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def reset_in_children(number: signal.Signals) -> None:
    """A handler that the main process has for this signal isn't for those it forks."""
    os.register_at_fork(after_in_child=lambda: signal.signal(number, signal.SIG_DFL))


def begin_child(**_: object) -> None:
    """In a pool's child, as Celery's ``worker_process_init`` says that it starts: end it
    when the main process has ended."""
    end_with_parent(_main)
    threading.Thread(target=_wait_for_main, name="cluster-lifeline", daemon=True).start()
    # Only now, so that it comes after all receivers that the app has connected.
    worker_process_shutdown.connect(_end_child)


def _end_child(exitcode: int = -1, **_: object) -> None:
    """The child was told to end, and the other receivers have run: don't wait.

    billiard would sleep for a second now (billiard/pool.py, Worker._do_exit).
    A child that is only recycled has another exit code.
    """
    if exitcode == 0:
        # What tasks and receivers printed, as far as it is no complete line.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(0)


def _wait_for_main() -> None:
    os.read(_read_end, 1)
    os._exit(0)


def end_now(code: int) -> NoReturn:
    """End this process, and the pool if it is the main one, without any clean-up."""
    if os.getpid() == _main:
        for child in psutil.Process().children(recursive=True):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
    os._exit(code)
