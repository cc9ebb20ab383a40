"""Starts local workers by forking: what they import before the user's app, one process imports.

A cluster has one. It runs as ``python -m cluster.worker.forkserver`` with
``MP_MAIN_FILE`` set as its workers need it, since Celery reads that as it is
imported. It has no threads, and imports nothing of the user's: a fork copies
neither a thread nor a connection, and would give every worker the same random
numbers.

It ends with the manager, and sees to it that the workers have ended before: one
that holds the GIL, as it imports the app, say, doesn't notice by itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from cluster.companion import Leash
from cluster.forkorders import Ended, Event, Fork, Forked, NotForked
from cluster.interpreter import restore_search_path
from cluster.jsonlines import decode, encode
from cluster.parent import end_with_parent

#: Seconds for workers to leave when the manager is gone.
LEAVE_WITHIN = 2.0

#: What a worker imports, up to its first task.
PRELOAD = (
    "cluster.worker.boot",
    "cluster.appref",
    "cluster.binding",
    "cluster.worker.membership",
    "cluster.worker.pool",
    "cluster.worker.request",
    "cluster.wire.backend",
    "cluster.wire.transport",
    "billiard.heap",
    "billiard.popen_fork",
    "billiard.sharedctypes",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.apps.worker",
    "celery.events",
    "celery.loaders.app",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.strategy",
    "kombu.pidbox",
)


class ForkServer:
    """The loop around the workers' main processes."""

    def __init__(self, leash: Leash) -> None:
        self._leash = leash
        self._pid = os.getpid()
        self._workers: dict[int, str] = {}  # id by process id
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        self._pipes = (self._wake, wake)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> bool:
        """Fork as told. Until the manager is gone: false. In a worker just forked: true."""
        while not self._leash.wait(self._wake):
            self._reap()
            while (line := self._leash.line()) is not None:
                if self._fork_all(decode(line, Fork)):
                    return True
        return False

    def end_workers(self) -> None:
        """The manager is gone: the guardian tells the workers, and they leave. End who doesn't."""
        deadline = time.monotonic() + LEAVE_WITHIN
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            while self._workers and (left := deadline - time.monotonic()) > 0:
                selector.select(left)
                self._reap()
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _fork_all(self, order: Fork) -> bool:
        for worker in order.workers:
            try:
                pid = os.fork()
            except OSError as error:
                self._say(NotForked(worker, str(error)))
                continue
            if pid == 0:
                self._become(worker, order)
                return True
            self._workers[pid] = worker
            self._say(Forked(worker, pid))
        return False

    def _become(self, worker: str, order: Fork) -> None:
        """In a worker just forked: be as a process started by itself would be."""
        os.setsid()
        end_with_parent(self._pid)
        self._leash.drop()
        signal.set_wakeup_fd(-1)
        for pipe in self._pipes:
            os.close(pipe)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(Path(order.logs) / f"{worker}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
        os.environ.clear()
        os.environ.update(order.environment)
        os.environ.update({"CLUSTER_WORKER": worker, "CLUSTER_PARENT": str(self._pid)})
        time.tzset()  # a process started by itself would find TZ there
        os.chdir(order.cwd)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        for pid in tuple(self._workers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            # Its children, and theirs. At once: its number is kept from others
            # only for as long as one of them is left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # macOS says PermissionError of a group of nothing but zombies.
                os.killpg(pid, signal.SIGKILL)
            self._say(Ended(self._workers.pop(pid), os.waitstatus_to_exitcode(status)))

    def _say(self, event: Event) -> None:
        self._leash.say(encode(event))


def _ignore(*_: object) -> None:
    """The wake-up descriptor does it; a handler must be there for that."""


def main() -> None:
    """Import, then fork as told; a worker goes on to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leash = Leash()
    restore_search_path(os.environ.pop("CLUSTER_PATH", ""))
    # What is imported stays: to search it for garbage takes a quarter of the
    # time, and in a worker would unshare its memory.
    gc.disable()
    for module in PRELOAD:
        import_module(module)
    gc.freeze()
    gc.enable()
    server = ForkServer(leash)
    try:
        forked = server.run()
    except OSError:
        # In a worker, if its directory is gone, say.
        traceback.print_exc()
        os._exit(1)
    if not forked:
        server.end_workers()
        os._exit(0)
    from cluster.worker import boot

    boot.main()


if __name__ == "__main__":
    main()
