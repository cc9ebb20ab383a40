"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import LaunchError
from cluster.interpreter import (
    module_command,
    module_environment,
    original_python_path,
    search_path,
)
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

#: Seconds between SIGTERM and SIGKILL when a worker is ended.
TERM_GRACE = 0.5

#: Tasks at once for each CPU above which preflight warns.
CROWDED = 4


def cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalOptions(BaseModel):
    """``cluster.start(4, launcher="local", concurrency=2)``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: int = Field(default=1, ge=1, description="tasks that each worker runs at once")


@dataclass(slots=True)
class _Worker:
    cluster_id: str
    process: subprocess.Popen[bytes]
    log: Path
    swept: bool = False

    def ended(self) -> int | None:
        """The exit code of its main process, or ``None``; what it left behind is killed."""
        code = self.process.poll()
        if code is not None and not self.swept:
            # Once, right after it was reaped: later its number may be another's.
            self.swept = True
            self.signal(signal.SIGKILL)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the worker's session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # macOS says PermissionError of a group of nothing but zombies.
            os.killpg(self.process.pid, number)


class LocalLauncher:
    """Starts each worker as a child process in a session of its own.

    Ctrl-C then reaches the manager alone, and a worker can be ended together
    with all that it started.
    """

    name = "local"
    defaults = LauncherDefaults(workers=cpus(), timeout=60, resizable=True, launches=True)
    options: type[BaseModel] = LocalOptions

    def __init__(self, options: LocalOptions | None = None) -> None:
        self._options = options or LocalOptions()
        self._workers: dict[WorkerRef, _Worker] = {}

    def preflight(self, wanted: int, minimum: int) -> Sequence[Finding]:
        at_once = wanted * self._options.concurrency
        if at_once <= CROWDED * cpus():
            return []
        return [
            Finding(
                Severity.WARN,
                f"{at_once} tasks at once on {cpus()} CPUs: that is faster than {cpus()} only for "
                "tasks that mostly wait.",
            )
        ]

    def reach(self) -> Reach:
        return Reach(host="127.0.0.1", tls=False)

    def launch(self, spec: WorkerSpec, count: int) -> Sequence[WorkerRef]:
        accepted: list[WorkerRef] = []
        for _ in range(count):
            try:
                accepted.append(self._launch_one(spec))
            except OSError as error:
                raise LaunchError(
                    f"A worker process can't be started: {error}.", accepted=accepted
                ) from error
        return accepted

    def _launch_one(self, spec: WorkerSpec) -> WorkerRef:
        ref = WorkerRef(f"local-{secrets.token_hex(3)}", self.name)
        path = spec.directory / f"{ref.id}.log"
        environment = {
            **spec.environment,
            **original_python_path(),
            "CLUSTER_WORKER": ref.id,
            "CLUSTER_CONCURRENCY": str(self._options.concurrency),
            "CLUSTER_PARENT": str(os.getpid()),
            "CLUSTER_PATH": search_path(),
            "CLUSTER_SCRATCH": str(spec.directory),
        }
        with path.open("wb") as log:
            process = subprocess.Popen(
                module_command("cluster.worker"),
                env=module_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._workers[ref] = _Worker(spec.cluster_id, process, path)
        return ref

    def describe(self, refs: Sequence[WorkerRef]) -> Mapping[WorkerRef, WorkerStatus]:
        return {ref: self._describe_one(ref) for ref in refs}

    def _describe_one(self, ref: WorkerRef) -> WorkerStatus:
        worker = self._workers.get(ref)
        if worker is None:
            return WorkerStatus(Phase.MISSING, final=True, reason="no process of this launcher's")
        code = worker.ended()
        if code is None:
            return WorkerStatus(Phase.RUNNING, reason=f"process {worker.process.pid}")
        return WorkerStatus(
            Phase.EXITED if code == ExitCode.LEFT else Phase.FAILED,
            final=True,
            retryable=code not in HOPELESS,
            reason=explain(code),
            exit_code=code,
        )

    def terminate(self, refs: Sequence[WorkerRef], *, reason: str) -> None:
        known = [self._workers[ref] for ref in refs if ref in self._workers]
        alive = [worker for worker in known if worker.ended() is None]
        for worker in alive:
            # Its main process alone: that one drains, with its children.
            worker.process.terminate()
        deadline = time.monotonic() + TERM_GRACE
        for worker in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        for worker in alive:
            worker.signal(signal.SIGKILL)
            worker.process.wait()
            worker.swept = True

    def find(self, cluster_id: str) -> Sequence[WorkerRef]:
        # Those of another manager aren't looked for: they end when it does.
        return [
            ref
            for ref, worker in self._workers.items()
            if worker.cluster_id == cluster_id and worker.ended() is None
        ]

    def logs(self, ref: WorkerRef, *, tail: int = 100) -> Sequence[str]:
        worker = self._workers.get(ref)
        return last_lines(worker.log, tail) if worker is not None else []
