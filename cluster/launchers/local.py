"""Workers as processes of this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel

from cluster.errors import LaunchError
from cluster.interpreter import original_python_path, search_path
from cluster.launchers.echo import Echo
from cluster.launchers.forkserver import ID_PREFIX, ForkServer, Process, strays, wait_for
from cluster.launchers.options import WorkerOptions
from cluster.logfile import last_lines
from cluster.model import (
    Finding,
    LauncherDefaults,
    Phase,
    Reach,
    Severity,
    WorkerRef,
    WorkerSpec,
    WorkerStatus,
)
from cluster.wire.exitcodes import HOPELESS, ExitCode, explain

logger = logging.getLogger("cluster")

#: Seconds between SIGTERM and SIGKILL when a worker is ended.
TERM_GRACE = 0.5

#: Seconds for the kernel to end processes after SIGKILL.
KILL_TIMEOUT = 5.0

#: Bytes that each process of a worker takes for itself, before it imports anything of the user's
#: (docs/benchmarks.md).
PROCESS_MEMORY = 13 * 2**20

#: Tasks at once for each CPU above which preflight warns.
CROWDED = 4


def cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalOptions(WorkerOptions):
    """``cluster.start(4, launcher="local", concurrency=2)``."""


@dataclass(slots=True)
class _Worker:
    cluster_id: str
    process: Process
    log: Path


@dataclass(slots=True)
class _Run:
    """What there is for one cluster.

    The surroundings are the manager's as it started: a worker that takes
    another's place must find what that one found, wherever the manager has
    gone since.
    """

    server: ForkServer
    echo: Echo | None
    cwd: Path
    path: str
    environment: Mapping[str, str]


class LocalLauncher:
    """Forks workers from a process that has imported what they need, each in a session of its own.

    Ctrl-C then reaches the manager alone, and a worker can be ended together
    with all that it started.
    """

    name = "local"
    defaults = LauncherDefaults(workers=cpus(), timeout=60, resizable=True, launches=True)
    options: type[BaseModel] = LocalOptions

    def __init__(self, options: LocalOptions | None = None) -> None:
        self._options = options or LocalOptions()
        self._runs: dict[str, _Run] = {}  # by the cluster's id
        self._workers: dict[WorkerRef, _Worker] = {}

    def preflight(self, wanted: int, minimum: int) -> Sequence[Finding]:
        at_once = wanted * self._options.concurrency
        room = psutil.virtual_memory().total // PROCESS_MEMORY
        if wanted + at_once > room:
            return [
                Finding(
                    Severity.REFUSE,
                    f"{wanted} workers with {self._options.concurrency} tasks at once each are "
                    f"{wanted + at_once} processes, and this machine's memory has room for {room} "
                    "at most. Ask for fewer.",
                )
            ]
        if at_once <= CROWDED * cpus():
            return []
        return [
            Finding(
                Severity.WARN,
                f"{at_once} tasks at once on {cpus()} CPUs: that is faster than {cpus()} only for "
                "tasks that mostly wait.",
            )
        ]

    def prepare(self, spec: WorkerSpec) -> None:
        try:
            cwd, path = Path.cwd(), search_path()
        except FileNotFoundError as error:
            raise LaunchError("The working directory has been removed.") from error
        self._runs[spec.cluster_id] = _Run(
            server=self._fork_server(spec),
            echo=Echo() if self._options.output else None,
            cwd=cwd,
            path=path,
            environment={**os.environ, **self._options.environment},
        )

    def _fork_server(self, spec: WorkerSpec) -> ForkServer:
        # With the user's variables, for those that Python reads as it starts; and without the
        # secret, which everything that is forked would show as its environment.
        environment = {**self._options.environment, **spec.environment}
        environment.pop("CLUSTER_SECRET", None)
        return ForkServer(spec.directory, environment)

    def reach(self, cluster_id: str) -> Reach:
        return Reach("127.0.0.1")

    def launch(self, spec: WorkerSpec, count: int) -> Sequence[WorkerRef]:
        if count == 0:
            return []
        if spec.cluster_id not in self._runs:
            self.prepare(spec)
        run = self._runs[spec.cluster_id]
        if run.server.gone:
            run.server.end()
            run.server = self._fork_server(spec)
        refs = [WorkerRef(f"{ID_PREFIX}{secrets.token_hex(3)}", self.name) for _ in range(count)]
        processes = run.server.fork(
            [ref.id for ref in refs],
            environment=self._environment(spec, run),
            cwd=run.cwd,
            logs=spec.directory,
        )
        for ref in refs:
            log = spec.directory / f"{ref.id}.log"
            self._workers[ref] = _Worker(spec.cluster_id, processes[ref.id], log)
            if run.echo is not None:
                run.echo.follow(ref.id, log)
        failed = [ref for ref in refs if processes[ref.id].failure]
        if failed:
            raise LaunchError(
                f"A worker process can't be started: {processes[failed[0].id].failure}.",
                accepted=[ref for ref in refs if ref not in failed],
            )
        return refs

    def _environment(self, spec: WorkerSpec, run: _Run) -> Mapping[str, str]:
        at_once = max(1, spec.workers) * self._options.concurrency
        return {
            **run.environment,
            **original_python_path(run.environment),
            **spec.environment,
            "CLUSTER_CONCURRENCY": str(self._options.concurrency),
            "CLUSTER_PATH": run.path,
            "CLUSTER_SCRATCH": str(spec.directory),
            "CLUSTER_LOGLEVEL": self._options.loglevel,
            "CLUSTER_THREADS": str(max(1, cpus() // at_once)),
        }

    def describe(self, refs: Sequence[WorkerRef]) -> Mapping[WorkerRef, WorkerStatus]:
        return {ref: self._describe_one(ref) for ref in refs}

    def _describe_one(self, ref: WorkerRef) -> WorkerStatus:
        worker = self._workers.get(ref)
        if worker is None:
            return WorkerStatus(Phase.MISSING, final=True, reason="no process of this launcher's")
        process = worker.process
        code = process.poll()
        if code is None:
            if process.lost:
                return WorkerStatus(Phase.FAILED, final=True, reason="nobody saw how it ended")
            if process.failure:
                return WorkerStatus(Phase.FAILED, final=True, reason=process.failure)
            return WorkerStatus(Phase.RUNNING, reason=f"process {process.pid}")
        return WorkerStatus(
            Phase.EXITED if code == ExitCode.LEFT else Phase.FAILED,
            final=True,
            retryable=code not in HOPELESS,
            reason=explain(code),
            exit_code=code,
        )

    def terminate(self, refs: Sequence[WorkerRef], *, reason: str) -> None:
        known = [self._workers[ref].process for ref in refs if ref in self._workers]
        alive = [process for process in known if not process.over]
        for process in alive:
            # Its main process alone: that one drains, with its children.
            process.terminate()
        wait_for(alive, TERM_GRACE)
        for process in alive:
            process.kill_all()
        for process in wait_for(alive, KILL_TIMEOUT):
            logger.warning("Process %s doesn't end, even when killed.", process.pid)

    def close(self, cluster_id: str) -> None:
        run = self._runs.pop(cluster_id, None)
        if run is not None:
            run.server.end()
            if run.echo is not None:
                run.echo.end()
        for ref in [ref for ref, one in self._workers.items() if one.cluster_id == cluster_id]:
            del self._workers[ref]

    def find(self, cluster_id: str) -> Sequence[WorkerRef]:
        if cluster_id not in self._runs:
            for worker, (process, log) in strays(cluster_id).items():
                ref = WorkerRef(worker, self.name)
                self._workers.setdefault(ref, _Worker(cluster_id, process, log))
        return [
            ref
            for ref, worker in self._workers.items()
            if worker.cluster_id == cluster_id and not worker.process.over
        ]

    def logs(self, ref: WorkerRef, *, tail: int = 100) -> Sequence[str]:
        worker = self._workers.get(ref)
        return last_lines(worker.log, tail) if worker is not None else []
