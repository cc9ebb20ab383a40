"""The fork server and its workers' processes, as the local launcher holds them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from cluster.companion import Companion
from cluster.errors import LaunchError
from cluster.forkorders import EVENTS, Ended, Fork, Forked, NotForked
from cluster.interpreter import search_path
from cluster.jsonlines import decode, encode
from cluster.logfile import last_lines

#: Seconds for a fork server to import what it must and fork what it was told.
FORK_TIMEOUT = 30.0

#: Seconds between looks at whether a process has ended without a report.
LOOK_EVERY = 0.1

#: Seconds for it to end.
END_TIMEOUT = 2.0

#: The file for what it prints; each worker has one of its own beside it.
FORK_SERVER_LOG = "forkserver.log"

#: How a worker's id begins, and with it the name of its file.
ID_PREFIX = "local-"

_STDOUT = 1

#: Lines of its log that go into an error.
LOG_TAIL = 20


class Process:
    """A worker's main process: a child of the fork server, which reports its end."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._handle: psutil.Process | None = None
        self._code: int | None = None
        self.failure = ""
        self._lost = False

    @property
    def pid(self) -> int:
        """Its process id, 0 before it has one."""
        return self._handle.pid if self._handle is not None else 0

    @property
    def settled(self) -> bool:
        """Whether it runs or has run, or it is known that it can't."""
        return bool(self._handle is not None or self.failure or self.over)

    @property
    def over(self) -> bool:
        """Whether it has ended, or its end can't be reported any more."""
        return self.lost or self._code is not None

    @property
    def lost(self) -> bool:
        """Whether its end can't be reported any more."""
        return self._lost

    def poll(self) -> int | None:
        """Its exit code as in ``subprocess``, or ``None`` while it runs or if nobody knows."""
        return self._code

    def wait(self, timeout: float) -> None:
        """Wait for its end to be reported, for at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.over, timeout)

    def terminate(self) -> None:
        """SIGTERM to the main process alone."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the main process alone."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._handle is not None and not self.over:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._handle.send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL to all processes of its session."""
        # psutil has seen to it that the number is still this process's.
        if self._handle is not None and not self.over and self._handle.is_running():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # macOS says PermissionError of a group of nothing but zombies.
                os.killpg(self._handle.pid, signal.SIGKILL)

    @property
    def dead(self) -> bool:
        """Whether it has ended, whoever says so: a fork server that is stopped reports nothing."""
        if self.over or self._handle is None:
            return True
        try:
            return self._handle.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    # -- told by the fork server ------------------------------------------------------

    def forked(self, pid: int) -> None:
        """It runs."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
            self._handle = psutil.Process(pid)

    def ended(self, code: int) -> None:
        """It has ended."""
        self._code = code

    def unreported(self) -> None:
        """The fork server is gone, and with it whoever could report."""
        if self._code is None:
            self.kill_all()
            self._lost = True


class Stray(Process):
    """A worker's main process whose manager is another one, and mostly gone: nobody reports."""

    def __init__(self, handle: psutil.Process) -> None:
        super().__init__(threading.Condition())
        self._handle = handle

    @property
    def lost(self) -> bool:
        assert self._handle is not None
        try:
            return not self._handle.is_running() or self._handle.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def strays(cluster_id: str) -> Mapping[str, tuple[Stray, Path]]:
    """The main processes of a cluster's workers on this machine, with their logs, by their ids.

    They are known by what all forks of a fork server have in their environment, and by leading
    a session whose output goes to a worker's log.
    """
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("CLUSTER_ID") != cluster_id:
                continue
            if process.pid != os.getsid(process.pid):
                continue
            logs = [Path(file.path) for file in process.open_files() if file.fd == _STDOUT]
        except (psutil.Error, ProcessLookupError):
            continue  # it has just ended, or is another user's
        for log in logs:
            if log.name.startswith(ID_PREFIX):
                found[log.stem] = Stray(process), log
    return found


def wait_for(processes: Sequence[Process], timeout: float) -> Sequence[Process]:
    """Wait until all of these have ended; return those that haven't within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if not process.dead]:
        left = deadline - time.monotonic()
        if left <= 0:
            return alive
        alive[0].wait(min(left, LOOK_EVERY))
    return ()


class ForkServer:
    """Starts the fork server and the workers of one cluster.

    Args:
        directory: for its log.
        environment: what must be set as it imports Celery.

    Raises:
        LaunchError: it can't be started.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._changed = threading.Condition()
        self._processes: dict[str, Process] = {}
        self._log = directory / FORK_SERVER_LOG
        self._gone = False
        try:
            self._companion = Companion(
                "cluster.worker.forkserver",
                log=self._log,
                environment={**environment, "CLUSTER_PATH": search_path()},
                on_line=self._on_line,
                on_end=self._on_end,
            )
        except OSError as error:
            raise LaunchError(f"The workers' fork server can't be started: {error}.") from error

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._gone

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._companion.pid

    def fork(
        self, workers: Sequence[str], *, environment: Mapping[str, str], cwd: Path, logs: Path
    ) -> Mapping[str, Process]:
        """Start workers.

        Args:
            workers: their ids.
            environment: all of theirs.
            cwd: their working directory.
            logs: directory for what they print, each into ``<its id>.log``.

        Returns:
            Their processes. One that couldn't be started has a ``failure``.
        """
        made = {worker: Process(self._changed) for worker in workers}
        with self._changed:
            self._processes.update(made)
        order = Fork(workers=tuple(workers), environment=environment, cwd=str(cwd), logs=str(logs))
        heard = self._companion.send(encode(order), FORK_TIMEOUT)
        with self._changed:
            if self._gone:
                self._lose()
            self._changed.wait_for(
                lambda: all(process.settled for process in made.values()),
                FORK_TIMEOUT if heard else 0,
            )
        for process in made.values():
            if not process.settled or (process.lost and not process.pid):
                process.failure = self._why_not()
        return made

    def _why_not(self) -> str:
        log = "\n".join(last_lines(self._log, LOG_TAIL))
        state = "has ended" if self._gone else f"hasn't answered for {FORK_TIMEOUT:.0f} s"
        return f"the fork server {state}\n{log}".rstrip()

    def end(self) -> None:
        """End it. Idempotent."""
        self._companion.end(END_TIMEOUT)

    # -- in the companion's thread ----------------------------------------------------

    def _on_line(self, line: bytes) -> None:
        event = decode(line, *EVENTS)
        with self._changed:
            process = self._processes[event.worker]
            match event:
                case Forked(pid=pid):
                    process.forked(pid)
                case NotForked(reason=reason):
                    process.failure = reason
                case Ended(code=code):
                    process.ended(code)
            self._changed.notify_all()

    def _on_end(self) -> None:
        with self._changed:
            self._gone = True
            self._lose()

    def _lose(self) -> None:
        for process in self._processes.values():
            process.unreported()
        self._changed.notify_all()
