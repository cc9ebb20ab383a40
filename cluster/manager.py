"""``cluster.start`` and :class:`Cluster`: start → ready → stop, and back out if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster import leaving
from cluster._version import __version__
from cluster.broker.broker import Broker
from cluster.broker.messages import Event, Failed
from cluster.errors import (
    BrokerError,
    BrokerLost,
    ClusterError,
    ConfigurationError,
    StateError,
    VersionMismatch,
    WorkerLost,
    WorkersNotReady,
)
from cluster.jsonlines import encode
from cluster.launchers.base import Launcher
from cluster.model import (
    TRANSITIONS,
    ClusterStatus,
    Endpoint,
    State,
    WorkerLogs,
    WorkerRef,
    WorkerSpec,
    WorkerView,
)
from cluster.plan import Plan, count, make_plan, seconds
from cluster.progress import Display
from cluster.readiness import Verdict, decide
from cluster.rundir import RunDirectory, kill_all, leftovers
from cluster.settings import SOCKET_TIMEOUT, STOP_TIMEOUT
from cluster.wire import keys
from cluster.wire.exitcodes import ExitCode
from cluster.wire.secret import new_secret

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

    from cluster.binding import Binding
    from cluster.supervisor import Supervisor

logger = logging.getLogger("cluster")

#: Seconds that workers get to end, beyond what their tasks get, before they are made to.
EXIT_ALLOWANCE = 1.0

#: Seconds between looks at workers that are leaving.
LOOK_EVERY = 0.02

#: Failed workers whose logs go into an error, and the last lines of each.
LOGS_SHOWN = 5
LOG_TAIL = 30

#: What a result raises that hadn't been fetched by then.
STOPPED = ClusterError(
    "The cluster has been stopped, and results that weren't fetched before are gone with it. Get "
    "them before you leave the with block or call stop()."
)


def start(
    workers: int | None = None,
    *,
    minimum: int | None = None,
    app: Celery | str | None = None,
    launcher: str | Launcher | None = None,
    timeout: float | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Cluster:
    """Start a broker and workers for an app, and wait until the workers are ready.

    Args:
        workers: how many, zero or more. Default: the launcher's own, for
            local processes one a CPU.
        minimum: go on with at least this many at the deadline. Default: ``workers``.
        app: the Celery app, or its import path, such as ``"package.module:app"``.
            Default: ``celery.current_app``.
        launcher: where the workers run: a name, or a launcher. Default: what
            ``CLUSTER_LAUNCHER`` says, else what fits where this process runs.
        timeout: seconds to wait for the workers. Default: the launcher's own,
            for local processes 60.
        progress: show how it goes, on standard error. Default: yes, live on a
            terminal and one line per change elsewhere.
        options: the launcher's own. For local processes: ``concurrency``, the
            tasks that each worker runs at once (default 1); ``environment``,
            variables for the workers besides this process's; ``output``,
            whether to show what they print (default yes); ``loglevel``, of
            their logging (default ``"WARNING"``).

    Returns:
        A running cluster. Use it in a ``with`` statement, or call its ``stop()``.

    Raises:
        ConfigurationError: an argument or a setting can't be used, or no
            worker could import the app. Nothing was started.
        StateError: the app belongs to another cluster that still runs, or
            this process is a worker. Nothing was started.
        BrokerStartError: the broker didn't come up.
        LaunchError: the workers couldn't be launched.
        WorkersNotReady: fewer than ``minimum`` were ready in time, or enough
            had failed for good. All that was started is gone again.
    """
    plan = make_plan(
        workers=workers,
        minimum=minimum,
        app=app,
        launcher=launcher,
        timeout=timeout,
        options=options,
    )
    if progress is not None and not isinstance(progress, bool):
        raise ConfigurationError(f"progress={progress!r}: give True, False or None.")
    cluster = Cluster(plan)
    cluster._start(Display(progress))
    return cluster


class Cluster:
    """A broker and its workers; made by :func:`start`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = secrets.token_hex(4)
        self._pid = os.getpid()
        self._state = State.NEW
        self._directory: RunDirectory | None = None
        self._broker: Broker | None = None
        self._binding: Binding | None = None
        self._client: Redis | None = None
        self._supervisor: Supervisor | None = None
        self._lost: BrokerLost | None = None
        self._remarks: list[str] | None = []  # while starting; later ones are logged
        self._state_lock = threading.Lock()
        self._stop_lock = threading.Lock()
        self._stopping_thread: int | None = None

    # -- what a user looks at ---------------------------------------------------------

    @property
    def app(self) -> Celery:
        """The Celery app, bound to the cluster's broker."""
        return self._plan.app

    @property
    def launcher(self) -> Launcher:
        """What runs the workers."""
        return self._plan.launcher

    @property
    def state(self) -> State:
        """Where the cluster is in its life."""
        return self._state

    @property
    def workers(self) -> tuple[str, ...]:
        """The Celery node names of the workers that are ready now."""
        supervisor = self._supervisor
        if supervisor is None or self._state in (State.STOPPING, State.STOPPED):
            return ()
        with supervisor.changed:
            return supervisor.roster.ready

    def status(self) -> ClusterStatus:
        """How the cluster and each of its workers is, as data; prints as a table."""
        broker, supervisor = self._broker, self._supervisor
        views: tuple[WorkerView, ...] = ()
        if supervisor is not None:
            with supervisor.changed:
                views = supervisor.roster.views()
        return ClusterStatus(
            id=self._id,
            state=self._state,
            launcher=self.launcher.name,
            broker=broker.endpoint.address if broker and broker.endpoint else "",
            wanted=self._plan.workers,
            workers=views,
        )

    def logs(self, worker: str | None = None, tail: int = 100) -> WorkerLogs:
        """What the workers wrote.

        Args:
            worker: a worker's id or node name. Default: all that were launched.
            tail: the last lines of each, at most.

        Returns:
            The lines by the worker's id; prints one worker after the other.

        Raises:
            ConfigurationError: there is no such worker.
            StateError: the cluster is stopped, and its workers' logs are gone.
        """
        count("tail", tail)
        supervisor = self._supervisor
        if supervisor is None or self._state is State.STOPPED:
            raise StateError(f"{self!r} has no logs any more. Ask before it is stopped.")
        with supervisor.changed:
            if worker is None:
                refs = list(supervisor.roster.statuses)
            else:
                found = supervisor.roster.find(worker)
                if found is None:
                    known = ", ".join(ref.id for ref in supervisor.roster.statuses)
                    raise ConfigurationError(f"There is no worker {worker!r}, only {known}.")
                refs = [found]
        return WorkerLogs({ref.id: self.launcher.logs(ref, tail=tail) for ref in refs})

    def wait_for_workers(self, n: int, timeout: float | None = None) -> None:
        """Wait until at least ``n`` workers are ready.

        Args:
            n: how many.
            timeout: seconds. Default: the launcher's own for a start.

        Raises:
            WorkersNotReady: they weren't, or can't be any more; nothing was stopped.
            ConfigurationError: ``n`` is no count.
            StateError: the cluster is stopping or stopped.
            ClusterError: the cluster failed; what ``state`` and the log told.
        """
        if self._state not in (State.STARTING, State.READY, State.SCALING, State.FAILED):
            raise StateError(f"{self!r} doesn't run.")
        wanted = count("n", n)
        limit = self.launcher.defaults.timeout if timeout is None else seconds("timeout", timeout)
        supervisor = self._require_supervisor()
        began = time.monotonic()
        verdict = self._wait(
            supervisor,
            wanted=wanted,
            minimum=wanted,
            began=began,
            timeout=limit,
            display=Display(False),
        )
        if verdict is not Verdict.ALL:
            raise self._not_ready(supervisor, wanted, wanted, time.monotonic() - began)

    def __repr__(self) -> str:
        return (
            f"<Cluster {self._id} {self._state}: {len(self.workers)} of {self._plan.workers} "
            f"workers ready, {self.launcher.name}>"
        )

    def _repr_html_(self) -> str:
        return self.status()._repr_html_()

    def __enter__(self) -> Self:
        if self._state in (State.STOPPING, State.STOPPED):
            raise StateError(f"{self!r} can't be used again. Start another one.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- starting -----------------------------------------------------------------------

    def _start(self, display: Display) -> None:
        self._go(State.STARTING)
        leaving.add(id(self), self.stop)
        try:
            with display:
                self._bring_up(display)
        except BaseException:
            # Whatever it was, Ctrl-C included: nothing stays behind.
            if self._state is State.STARTING:
                self._go(State.FAILED)
            self.stop(timeout=0)
            raise

    def _bring_up(self, display: Display) -> None:
        plan = self._plan
        began = time.monotonic()
        name = plan.app.main or "without a name"
        server = f"{Path(plan.server.path).name} {plan.server.version}"
        display.show(f"Starting workers for the app {name} and a broker ({server})")
        self._sweep()
        self._directory = RunDirectory(self._id)
        spec = self._spec(self._directory.path)
        try:
            plan.launcher.prepare(spec)
            self._broker = Broker(
                plan.server,
                host=plan.launcher.reach(self._id).host,
                secret=new_secret(),
                directory=self._directory.path,
                cluster_id=self._id,
                workers=plan.workers,
                limits=plan.limits,
                on_event=self._on_event,
            )
        except BaseException:
            self._directory.remove()
            raise
        # Here rather than above: that takes as long as a broker needs to start.
        from cluster.binding import Binding
        from cluster.supervisor import Supervisor
        from cluster.wire.client import connect

        endpoint = self._broker.wait()
        self._client = connect(endpoint, SOCKET_TIMEOUT)
        self._client.set(keys.MANAGER, encode(plan.side))
        self._binding = Binding(plan.app, endpoint, plan.limits.message_limit)
        self._supervisor = Supervisor(
            launcher=plan.launcher,
            spec=self._with_broker(spec, endpoint, self._binding),
            wanted=plan.workers,
            patience=plan.timeout,
            max_deliveries=plan.limits.max_deliveries,
            client=self._client,
            binding=self._binding,
            side=plan.side,
            on_ready=self._broker.watch,
            on_remark=self._on_remark,
            on_failure=self._on_failure,
        )
        if self._lost is not None:
            raise self._lost  # while there was nobody to tell
        if plan.workers == 0:
            self._broker.watch()  # others watch once one of theirs is ready
        self._supervisor.launch(plan.workers)
        self._supervisor.start()
        verdict = self._wait(
            self._supervisor,
            wanted=plan.workers,
            minimum=plan.minimum,
            began=began,
            timeout=plan.timeout,
            display=display,
        )
        elapsed = time.monotonic() - began
        if verdict is Verdict.TOO_FEW:
            raise self._not_ready(self._supervisor, plan.workers, plan.minimum, elapsed)
        self._warn_of_remarks()
        ready = len(self.workers)
        if verdict is Verdict.ENOUGH:
            warnings.warn(
                f"Only {ready} of {plan.workers} workers were ready after {elapsed:.1f} s; going "
                f"on with them (minimum={plan.minimum}). "
                + ("Later ones join as they come." if self._supervisor.coming else "No more come."),
                RuntimeWarning,
                stacklevel=4,
            )
        self._go(State.READY)
        if self._supervisor.failure is not None:
            self._on_failure(self._supervisor.failure)  # in the moment before
        display.say(f"{ready} of {plan.workers} workers ready after {elapsed:.1f} s")

    def _sweep(self) -> None:
        """End and remove what managers have left that crashed on this machine."""
        for cluster_id, path in leftovers():
            refs = self.launcher.find(cluster_id)
            self.launcher.terminate(refs, reason="its manager is gone")
            self.launcher.close(cluster_id)
            kill_all(cluster_id)
            shutil.rmtree(path, ignore_errors=True)
            logger.warning(
                "A manager had crashed here. What was left of its cluster %s has been removed: "
                "%s, %d workers.",
                cluster_id,
                path,
                len(refs),
            )

    def _spec(self, directory: Path) -> WorkerSpec:
        return WorkerSpec(
            cluster_id=self._id,
            workers=self._plan.workers,
            directory=directory,
            environment={
                "CLUSTER_ID": self._id,
                "CLUSTER_APP": self._plan.ref.to_json(),
                "CLUSTER_VERSION": __version__,
                "CLUSTER_LIVENESS_TIMEOUT": str(self._plan.limits.liveness_timeout),
                "CLUSTER_ORPHAN_TIMEOUT": str(self._plan.limits.orphan_timeout),
                "CLUSTER_MAX_DELIVERIES": str(self._plan.limits.max_deliveries),
                "CLUSTER_MESSAGE_LIMIT": str(self._plan.limits.message_limit),
                **self._plan.ref.environment,
            },
        )

    @staticmethod
    def _with_broker(spec: WorkerSpec, endpoint: Endpoint, binding: Binding) -> WorkerSpec:
        return dataclasses.replace(
            spec,
            environment={
                **spec.environment,
                **binding.set_aside,
                "CLUSTER_ADDRESS": endpoint.address,
                "CLUSTER_SECRET": endpoint.secret,
            },
        )

    def _wait(
        self,
        supervisor: Supervisor,
        *,
        wanted: int,
        minimum: int,
        began: float,
        timeout: float,
        display: Display,
    ) -> Verdict:
        """Wait for workers until there is something to say, and show how it goes."""
        while True:
            elapsed = time.monotonic() - began
            with supervisor.changed:
                ready, coming = len(supervisor.roster.ready), supervisor.coming
                verdict = decide(
                    ready=ready,
                    coming=coming,
                    wanted=wanted,
                    minimum=minimum,
                    expired=elapsed >= timeout,
                )
                failure = supervisor.failure
                if failure is not None and not isinstance(failure, WorkerLost):
                    raise type(failure)(*failure.args)
                if verdict is not Verdict.WAIT:
                    return verdict
                display.show(
                    f"{ready} of {wanted} workers ready, {coming} starting ({self.launcher.name})",
                    timing=f"{elapsed:.0f} of at most {timeout:.0f} s",
                )
                supervisor.changed.wait(min(0.25, max(0.0, timeout - elapsed)))

    def _not_ready(
        self, supervisor: Supervisor, wanted: int, minimum: int, elapsed: float
    ) -> WorkersNotReady | VersionMismatch:
        with supervisor.changed:
            ready = len(supervisor.roster.ready)
            statuses = supervisor.roster.statuses
            failed = supervisor.roster.failed
            coming = supervisor.coming
            mismatched = any(seat.status.exit_code == ExitCode.VERSION_MISMATCH for seat in failed)
            mismatches = str(supervisor.mismatches)
        if failed:
            reasons = sorted({seat.status.reason for seat in failed})
            why = f"{len(failed)} failed: {'; '.join(reasons)}."
        elif coming:
            why = (
                f"{coming} were still starting: importing the app, say. If they need longer, give "
                "them more seconds: timeout=…"
            )
        else:
            why = "No more are starting."
        shown: Sequence[WorkerRef] = [seat.ref for seat in failed] or list(statuses)
        logs: dict[str, Sequence[str]] = {}
        for ref in shown[:LOGS_SHOWN]:
            lines = self.launcher.logs(ref, tail=LOG_TAIL)
            # Workers that fail at the start mostly fail alike.
            if lines not in logs.values():
                logs[ref.id] = lines
        said = f"{ready} of {wanted} workers were ready after {elapsed:.1f} s (minimum {minimum})."
        if mismatched:
            return VersionMismatch(
                f"{said} Others run what can't work with this manager.\n{mismatches}".rstrip(),
                logs=logs,
            )
        return WorkersNotReady(
            f"{said} {why}",
            ready=ready,
            wanted=wanted,
            minimum=minimum,
            elapsed=elapsed,
            statuses=statuses,
            logs=logs,
        )

    def _on_event(self, event: Event) -> None:
        """In the broker's thread."""
        match event:
            case Failed(reason=reason, log=log):
                tail = "\n".join(log)
                why = BrokerLost(f"The broker is lost: {reason}.\n{tail}".rstrip())
                self._lost = why
                # At once: whoever waits for the broker waits in vain, and that
                # may be the supervisor, too.
                if self._binding is not None:
                    self._binding.end(why)
                if self._supervisor is not None:
                    self._supervisor.fail(why)
            case _ if self._supervisor is not None:
                self._supervisor.tell(event)

    def _on_remark(self, remark: str) -> None:
        """In the supervisor's thread, where a warning would name none of the user's lines."""
        with self._state_lock:
            if self._remarks is not None:
                self._remarks.append(remark)
                return
        logger.warning("%s", remark)

    def _warn_of_remarks(self) -> None:
        with self._state_lock:
            remarks, self._remarks = self._remarks, None
        for remark in remarks or ():
            warnings.warn(remark, RuntimeWarning, stacklevel=5)

    def _on_failure(self, why: ClusterError) -> None:
        """In the supervisor's thread: the cluster can't go on."""
        # A start that fails raises, and says it so.
        if self._state is not State.STARTING and self._try_to_go(State.FAILED):
            logger.error("%s", why)
        if self._binding is not None:
            if isinstance(why, BrokerError):
                self._binding.end(why)
            else:
                self._binding.complete(why)  # what is there can still be got

    # -- stopping -----------------------------------------------------------------------

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the workers and the broker, and put the app back as it was. Idempotent.

        Workers take no new task, and get ``timeout`` seconds to finish those
        that run. Tasks that aren't done by then are dropped, which is logged, and
        results are gone: asking for one that wasn't fetched before raises
        :class:`ClusterError`.

        Args:
            timeout: seconds for running tasks.

        Raises:
            ConfigurationError: ``timeout`` is none. Nothing was stopped.
        """
        seconds("timeout", timeout)
        if os.getpid() != self._pid:
            return  # a forked process's copy: the cluster isn't its to stop
        if self._stopping_thread == threading.get_ident():
            return  # from a signal handler, in the middle of it
        try:
            with leaving.interrupts_held() as hurry, self._stop_lock:
                self._stopping_thread = threading.get_ident()
                self._stop(timeout, hurry)
        finally:
            self._stopping_thread = None
            if self._state is State.STOPPED:
                leaving.remove(id(self))

    def _stop(self, timeout: float, hurry: leaving.Hurry) -> None:
        """Should a step fail, the others are done all the same, and all can be done again."""
        if self._state is State.STOPPED:
            return
        if self._state is not State.STOPPING:
            self._go(State.STOPPING)
        with contextlib.ExitStack() as steps:
            # From the last to the first, whichever of them fails.
            steps.callback(self._end_broker)
            steps.callback(self._unbind)
            steps.callback(self.launcher.close, self._id)
            self._end_workers(timeout, hurry)
        self._go(State.STOPPED)

    def _end_workers(self, timeout: float, hurry: leaving.Hurry) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        supervisor.stop_replacing()
        told = self._tell_workers(timeout)
        if not told and self._binding is not None:
            self._binding.end(STOPPED)  # the supervisor may be waiting for the broker
        # Meanwhile: it may be in the middle of a turn.
        supervisor.end()
        launcher, roster = self.launcher, supervisor.roster
        launcher.terminate(roster.starting, reason="the cluster is stopping")
        deadline = time.monotonic() + (timeout + EXIT_ALLOWANCE if told else 0)
        while roster.unfinished and time.monotonic() < deadline:
            roster.described(launcher.describe(roster.unfinished))
            if hurry.asked and timeout > 0:
                timeout = 0
                self._tell_workers(timeout)
                deadline = time.monotonic() + EXIT_ALLOWANCE
            if roster.unfinished:
                time.sleep(LOOK_EVERY)
        launcher.terminate(roster.unfinished, reason="the cluster is stopping")
        roster.described(launcher.describe(roster.unfinished))
        if told and supervisor.failure is None:  # else that has been said, and why
            self._say_what_is_dropped()

    def _say_what_is_dropped(self) -> None:
        """Who leaves without having waited for the results should know what that meant."""
        from redis.exceptions import RedisError

        from cluster.wire.ledger import CONNECTION_ERRORS

        assert self._client is not None and self._binding is not None
        try:
            undone = self._binding.count_undone(self._client)
        except (*CONNECTION_ERRORS, RedisError) as error:
            logger.warning("What wasn't done can't be counted (%s).", error)
            return
        if undone:
            logger.warning(
                "The cluster was stopped with %d task%s not done: dropped. Get the results first, "
                "or wait for them.",
                undone,
                "" if undone == 1 else "s",
            )

    def _tell_workers(self, grace: float) -> bool:
        """Tell the workers that it is over; false if the broker can't."""
        if self._client is None:
            return False
        from redis.exceptions import RedisError

        from cluster.wire.ledger import CONNECTION_ERRORS
        from cluster.wire.registration import announce_over

        try:
            announce_over(self._client, grace)
        except (*CONNECTION_ERRORS, RedisError) as error:
            logger.warning("The workers can't be told to leave (%s); ending them.", error)
            return False
        return True

    def _unbind(self) -> None:
        if self._binding is not None:
            binding, self._binding = self._binding, None
            binding.end(STOPPED)
            binding.release()
        if self._client is not None:
            self._client.connection_pool.disconnect()
            self._client = None

    def _end_broker(self) -> None:
        if self._broker is not None:
            self._broker.stop()
            self._broker = None
        if self._directory is not None:
            self._directory.let_go()

    # -- state ----------------------------------------------------------------------------

    def _go(self, state: State) -> None:
        if not self._try_to_go(state):
            raise StateError(f"A cluster that is {self._state} can't become {state}.")

    def _try_to_go(self, state: State) -> bool:
        with self._state_lock:
            possible = state in TRANSITIONS[self._state]
            if possible:
                self._state = state
            return possible

    def _require_supervisor(self) -> Supervisor:
        if self._supervisor is None:
            raise StateError(f"{self!r} has no workers yet.")
        return self._supervisor
