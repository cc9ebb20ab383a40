"""What is done to the cluster: one function a kind, each of which says what it did.

A function is given the field and the number that the plan picked a worker with. It returns
``None`` if there is nothing to do it to right now.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

import cluster
from chaos.plan import Kind
from chaos.record import Effect, Fault
from chaos.wiretap import Wiretap, port_of
from cluster.broker.broker import GUARDIAN_ALLOWANCE
from cluster.wire import keys

#: Seconds without a sign of life after which a worker is taken for dead, in a run.
LIVENESS_TIMEOUT = 2.0

#: Seconds that a worker is frozen: too short to be missed, and long enough.
BLINK = 0.4
SLEEP = 2.5 * LIVENESS_TIMEOUT

#: Seconds that the broker is: ridden out, and noticed.
BROKER_BLINK = 1.0
BROKER_SLEEP = 3 * LIVENESS_TIMEOUT

#: Seconds that the guardian is: until it is given up, and then some.
GUARDIAN_SLEEP = LIVENESS_TIMEOUT + GUARDIAN_ALLOWANCE + 3.0

#: Seconds to wait for a moment to strike at.
MOMENT_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that is ready."""

    id: str
    node: str
    main: psutil.Process

    def children(self) -> list[psutil.Process]:
        """Its pool's, without those that were killed a moment ago."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.main.children():
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)  # noqa: PERF401 (what comes before an exception counts)
        return found


class Field:
    """The cluster as a field to strike at: who is there, and what is due later."""

    def __init__(self, c: cluster.Cluster) -> None:
        self.c = c
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._frozen: set[int] = set()
        self._count = 0

    def workers(self) -> list[Target]:
        """Those that are ready, by the order they were launched in."""
        ids = {view.id: view.node for view in self.c.status().workers if view.ready}
        found = []
        for ref, worker in tuple(self.c.launcher._workers.items()):
            process = worker.process
            if ref.id in ids and process.pid and not process.dead:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(Target(ref.id, ids[ref.id], psutil.Process(process.pid)))
        return found

    def worker(self, pick: int) -> Target | None:
        """The one that the plan means."""
        workers = self.workers()
        return workers[pick % len(workers)] if workers else None

    def awake(self, pick: int) -> Target | None:
        """As :meth:`worker`, of those that aren't frozen."""
        workers = [each for each in self.workers() if each.main.pid not in self._frozen]
        return workers[pick % len(workers)] if workers else None

    @property
    def server(self) -> psutil.Process | None:
        broker = self.c._broker
        return broker._server_process if broker is not None else None

    @property
    def guardian(self) -> psutil.Process:
        assert self.c._broker is not None
        return psutil.Process(self.c._broker._guardian.pid)

    @property
    def fork_server(self) -> psutil.Process:
        [run] = self.c.launcher._runs.values()
        return psutil.Process(run.server.pid)

    def owner_of(self, port: int) -> psutil.Process | None:
        """The process that has this end of a connection, where we may know (macOS tells root)."""
        with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
            for connection in psutil.net_connections("tcp"):
                if connection.laddr and connection.laddr.port == port and connection.pid:
                    return psutil.Process(connection.pid)
        return None

    # -- time ---------------------------------------------------------------------

    def freeze(self, process: psutil.Process, seconds: float) -> None:
        """Stop it, and have it go on later, if it is still there."""
        process.suspend()
        self._frozen.add(process.pid)

        def thaw() -> None:
            self._frozen.discard(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        self._count += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._count, thaw))

    def pause(self, seconds: float) -> None:
        """Let time pass, and have go on what is due."""
        until = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            if now >= until:
                return
            time.sleep(min(until - now, 0.02))

    def settle(self) -> None:
        """Wait until nothing is frozen any more."""
        while self._due:
            self.pause(max(0.0, self._due[0][0] - time.monotonic()))

    def release(self) -> None:
        """Have all go on at once: the run has failed."""
        while self._due:
            heapq.heappop(self._due)[2]()


Strike = Callable[[Field, int], Fault | None]

#: Every kind of fault, by name.
KINDS: dict[str, tuple[Kind, Strike]] = {}


def kind(
    weight: int, group: str = "", gap: float = 0.0, *, name: str = ""
) -> Callable[[Strike], Strike]:
    """Adds a function to :data:`KINDS`, under its name."""

    def add(strike: Strike) -> Strike:
        known = name or strike.__name__.replace("_", "-")

        def careful(field: Field, pick: int) -> Fault | None:
            with contextlib.suppress(psutil.NoSuchProcess):
                return strike(field, pick)
            return None

        KINDS[known] = (Kind(known, weight, group, gap), careful)
        return strike

    return add


# -- workers ---------------------------------------------------------------------------


@kind(20)
def worker_kill(field: Field, pick: int) -> Fault | None:
    """SIGKILL of a worker's main process."""
    target = field.worker(pick)
    if target is None:
        return None
    at = time.monotonic()
    target.main.kill()
    return Fault("worker-kill", Effect.NODE_ENDED, at, (target.id,), (target.main.pid,))


@kind(20)
def child_kill(field: Field, pick: int) -> Fault | None:
    """SIGKILL of a process of a worker's pool."""
    target = field.worker(pick)
    children = target.children() if target is not None else []
    if target is None or not children:
        return None
    child = children[pick % len(children)]
    at = time.monotonic()
    child.kill()
    return Fault("child-kill", Effect.CHILD_ENDED, at, (target.id,), (child.pid,))


@kind(8)
def worker_blink(field: Field, pick: int) -> Fault | None:
    """SIGSTOP of a main process for a moment: nobody may notice."""
    target = field.awake(pick)
    if target is None:
        return None
    at = time.monotonic()
    field.freeze(target.main, BLINK)
    return Fault("worker-blink", Effect.NONE, at, (target.id,), (target.main.pid,))


@kind(8)
def worker_sleep(field: Field, pick: int) -> Fault | None:
    """SIGSTOP of a main process for so long that it is taken for dead."""
    target = field.awake(pick)
    if target is None:
        return None
    at = time.monotonic()
    field.freeze(target.main, SLEEP)
    return Fault("worker-sleep", Effect.NODE_FENCED, at, (target.id,), (target.main.pid,))


@kind(6)
def child_sleep(field: Field, pick: int) -> Fault | None:
    """SIGSTOP of a process of the pool: its task takes longer, and that is all."""
    target = field.worker(pick)
    children = target.children() if target is not None else []
    if target is None or not children:
        return None
    child = children[pick % len(children)]
    at = time.monotonic()
    field.freeze(child, SLEEP)
    return Fault("child-sleep", Effect.NONE, at, (target.id,), (child.pid,))


@kind(8)
def worker_term(field: Field, pick: int) -> Fault | None:
    """SIGTERM of a worker: it finishes what it runs."""
    target = field.worker(pick)
    if target is None:
        return None
    at = time.monotonic()
    target.main.terminate()
    return Fault("worker-term", Effect.TOLD_TO_LEAVE, at, (target.id,), (target.main.pid,))


# -- at a moment -------------------------------------------------------------------------


def _at(field: Field, words: bytes) -> bytes | None:
    """Wait until the broker is told this."""
    endpoint = field.c._broker.endpoint
    assert endpoint is not None
    with contextlib.suppress(OSError), Wiretap(endpoint) as tap:
        return tap.wait_for(words, MOMENT_TIMEOUT)
    return None


def _kill_worker_at(
    field: Field, pick: int, moment: str, words: Callable[[str], str]
) -> Fault | None:
    target = field.awake(pick)
    if target is None or _at(field, words(target.node).encode()) is None:
        return worker_kill(field, pick)
    at = time.monotonic()
    target.main.kill()
    return Fault(f"worker-kill-{moment}", Effect.NODE_ENDED, at, (target.id,), (target.main.pid,))


@kind(16)
def worker_kill_as_it_takes(field: Field, pick: int) -> Fault | None:
    """The message is popped, and the reply on its way."""
    return _kill_worker_at(
        field, pick, "as-it-takes", lambda node: f'"HSET" "{keys.unacked(node)}"'
    )


@kind(8)
def worker_kill_as_it_acknowledges(field: Field, pick: int) -> Fault | None:
    """The task is done, its message gone or about to be."""
    return _kill_worker_at(
        field, pick, "as-it-acknowledges", lambda node: f'"{keys.RETURNS}" "{keys.started(node)}"'
    )


def _kill_owner_at(field: Field, pick: int, moment: str, words: bytes) -> Fault | None:
    """Freeze the broker at the moment, kill whoever was talking to it, and have it go on."""
    server = field.server
    if server is None:
        return None
    line = _at(field, words)
    if line is None:
        return child_kill(field, pick)
    at = time.monotonic()
    server.suspend()
    try:
        port = port_of(line)
        owner = field.owner_of(port) if port is not None else None
        for target in field.workers():
            if owner is not None and owner in target.children():
                owner.kill()
                return Fault(
                    f"child-kill-{moment}", Effect.CHILD_ENDED, at, (target.id,), (owner.pid,)
                )
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.resume()
    return child_kill(field, pick)


@kind(6)
def child_kill_as_it_stores(field: Field, pick: int) -> Fault | None:
    """The result is stored, and nobody knows that the task is done."""
    return _kill_owner_at(field, pick, "as-it-stores", b'"cluster:fenced" "celery-task-meta-')


@kind(6)
def child_kill_in_a_chord(field: Field, pick: int) -> Fault | None:
    """A header's task has been counted; the body may or may not have been sent."""
    return _kill_owner_at(field, pick, "in-a-chord", b'"celery-taskset-meta-')


# -- what is around them ------------------------------------------------------------------


@kind(6, "broker", 9.0)
def broker_kill(field: Field, _pick: int) -> Fault | None:
    """SIGKILL of the server."""
    return _kill_server(field, "broker-kill")


def _kill_server(field: Field, name: str) -> Fault | None:
    server = field.server
    if server is None:
        return None
    at = time.monotonic()
    server.kill()
    return Fault(name, Effect.BROKER, at, (), (server.pid,))


@kind(4, "broker", 9.0)
def broker_kill_as_a_message_is_taken(field: Field, _pick: int) -> Fault | None:
    """Its reply is lost."""
    _at(field, b'"HSET" "cluster:unacked:')
    return _kill_server(field, "broker-kill-as-a-message-is-taken")


@kind(4, "broker", 9.0)
def broker_kill_as_a_message_is_sent(field: Field, _pick: int) -> Fault | None:
    """Whoever sends it can't know whether it was."""
    _at(field, b'"LPUSH" "celery"')
    return _kill_server(field, "broker-kill-as-a-message-is-sent")


@kind(3, "broker", 9.0)
def broker_kill_in_a_chord(field: Field, _pick: int) -> Fault | None:
    """A header's task is being counted."""
    _at(field, b'"ZADD" "celery-taskset-meta-')
    return _kill_server(field, "broker-kill-in-a-chord")


@kind(4, "broker", 9.0)
def broker_blink(field: Field, _pick: int) -> Fault | None:
    """SIGSTOP of the server for a second: ridden out."""
    server = field.server
    if server is None:
        return None
    at = time.monotonic()
    field.freeze(server, BROKER_BLINK)
    return Fault("broker-blink", Effect.BROKER, at, (), (server.pid,))


@kind(2, "broker", 9.0)
def broker_sleep(field: Field, _pick: int) -> Fault | None:
    """SIGSTOP of the server for so long that the guardian gives it up."""
    server = field.server
    if server is None:
        return None
    at = time.monotonic()
    field.freeze(server, BROKER_SLEEP)
    return Fault("broker-sleep", Effect.BROKER, at, (), (server.pid,))


@kind(4, "guardian", 15.0)
def guardian_kill(field: Field, _pick: int) -> Fault | None:
    """SIGKILL of the guardian, with which the server ends."""
    guardian = field.guardian
    at = time.monotonic()
    guardian.kill()
    return Fault("guardian-kill", Effect.BROKER, at, (), (guardian.pid,))


@kind(2, "guardian", 15.0)
def guardian_blink(field: Field, _pick: int) -> Fault | None:
    """SIGSTOP of the guardian for a moment: a death is noticed later, and that is all."""
    guardian = field.guardian
    at = time.monotonic()
    field.freeze(guardian, BROKER_BLINK)
    return Fault("guardian-blink", Effect.NONE, at, (), (guardian.pid,))


@kind(2, "guardian", 15.0)
def guardian_sleep(field: Field, _pick: int) -> Fault | None:
    """SIGSTOP of the guardian for so long that the manager gives it up, and the server with it."""
    guardian = field.guardian
    at = time.monotonic()
    field.freeze(guardian, GUARDIAN_SLEEP)
    return Fault("guardian-sleep", Effect.BROKER, at, (), (guardian.pid,))


@kind(3, "fork server", 15.0)
def fork_server_blink(field: Field, _pick: int) -> Fault | None:
    """SIGSTOP of the fork server for a moment: who ends is reaped later."""
    server = field.fork_server
    at = time.monotonic()
    field.freeze(server, BROKER_BLINK)
    return Fault("fork-server-blink", Effect.NONE, at, (), (server.pid,))


@kind(3, "fork server", 15.0)
def fork_server_kill(field: Field, _pick: int) -> Fault | None:
    """SIGKILL of the process that forks the workers, with which they end."""
    # All, for one that isn't known to be ready may have taken a task.
    workers = tuple(
        ref.id for ref, one in tuple(field.c.launcher._workers.items()) if not one.process.over
    )
    server = field.fork_server
    at = time.monotonic()
    server.kill()
    return Fault("fork-server-kill", Effect.NODE_ENDED, at, workers, (server.pid,))


def chosen(names: Sequence[str]) -> list[Kind]:
    """The kinds with these names, or all that are there."""
    return [KINDS[name][0] for name in names or KINDS]
