"""A run: a cluster, clients that send tasks, and the plan's faults, one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

import cluster
from chaos.app import app
from chaos.faults import KINDS, Field
from chaos.load import CLIENTS, Client
from chaos.plan import Plan, Step
from chaos.record import VARIABLE, Fault, outcome, read
from chaos.referee import Evidence, Verdict, judge
from cluster.model import State
from cluster.settings import SOCKET_TIMEOUT
from cluster.wire import keys
from cluster.wire.client import connect
from cluster.wire.scripts import FREED

#: Seconds for a batch's results, from when it was sent. Long: a task of some seconds may be killed
#: a dozen times.
PATIENCE = 120.0

#: Seconds until there is somebody to strike at.
TARGET_TIMEOUT = 30.0

#: Seconds for the cluster to be whole again after the last fault, and for its queues to be empty.
HEALING = 60.0

#: Missing tasks that are searched for in the broker, all of which is read for each.
SEARCHED = 3

#: Results that are looked up at once.
AT_ONCE = 500


class Abandoned(Exception):
    """The run can't go on; why."""


@dataclass(slots=True)
class Run:
    """What happened."""

    plan: Plan
    faults: list[Fault] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    #: What went wrong, besides what the referee says.
    troubles: list[str] = field(default_factory=list)
    batches: int = 0
    seconds: float = 0.0
    healing: float = 0.0
    stopping: float = 0.0


def run(plan: Plan, record: Path, say: Callable[[str], None]) -> Run:
    """Carry out a plan.

    Args:
        plan: what to do.
        record: a file for the executions.
        say: told now and then how it goes.
    """
    done = Run(plan)
    began = time.monotonic()
    clients = [Client(plan.seed, number, PATIENCE) for number in range(len(CLIENTS))]
    c = cluster.start(
        plan.workers,
        app=app,
        concurrency=plan.concurrency,
        environment={VARIABLE: str(record)},
        output=False,
    )
    try:
        for client in clients:
            client.start()
        with _troubles_in(done):
            _strike_all(Field(c), plan, clients, done, say)
            say("faults are over")
        for client in clients:
            client.stop()
        for client in clients:
            client.join(2 * PATIENCE)
            if client.is_alive():
                done.troubles.append(f"{client.name} hangs")
        with _troubles_in(done):
            _heal(c, plan, done)
        evidence = _evidence(c, clients, record, done)
        record.with_suffix(".logs").write_text(str(c.logs(tail=1000)))
    finally:
        stopping = time.monotonic()
        c.stop()
        done.stopping = time.monotonic() - stopping
    done.verdict = judge(evidence)
    done.batches = sum(client.batches for client in clients)
    for client in clients:
        done.troubles += client.tally.troubles
    done.seconds = time.monotonic() - began
    return done


@contextlib.contextmanager
def _troubles_in(done: Run) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 (what was found so far is to be reported)
        done.troubles.append(f"{type(error).__name__}: {error}")


def _strike_all(
    field: Field, plan: Plan, clients: list[Client], done: Run, say: Callable[[str], None]
) -> None:
    try:
        for number, step in enumerate(plan.steps, 1):
            field.pause(step.pause)
            _wait_for_targets(field, plan)
            _strike(field, step, done)
            if number % 50 == 0:
                say(f"{number} of {len(plan.steps)} faults, {len(field.workers())} workers ready")
            if any(client.tally.troubles for client in clients):
                raise Abandoned(f"a client has trouble, after {number} faults")
        field.settle()
    finally:
        field.release()


def _strike(field: Field, step: Step, done: Run) -> None:
    """Do what the plan says; where there is nothing to do it to, wait until there is."""
    _, strike = KINDS[step.fault]
    deadline = time.monotonic() + TARGET_TIMEOUT
    while (fault := strike(field, step.pick)) is None:
        if time.monotonic() > deadline:
            raise Abandoned(f"nothing was there for {step.fault}: {field.c.status()}")
        field.pause(0.05)
    done.faults.append(fault)


def _wait_for_targets(field: Field, plan: Plan) -> None:
    """Half of the workers are there: the load goes on, too."""
    deadline = time.monotonic() + TARGET_TIMEOUT
    while len(field.workers()) < max(1, plan.workers // 2):
        if field.c.state is not State.READY:
            raise Abandoned(f"the cluster is {field.c.state}: {field.c._supervisor.failure}")
        if time.monotonic() > deadline:
            raise Abandoned(f"workers didn't come back: {field.c.status()}")
        field.pause(0.02)


def _heal(c: cluster.Cluster, plan: Plan, done: Run) -> None:
    began = time.monotonic()
    c.wait_for_workers(plan.workers, timeout=HEALING)
    done.healing = time.monotonic() - began
    with _client(c) as client:
        while left := _left(client):
            if time.monotonic() > began + HEALING:
                raise Abandoned(f"messages are left: {left}")
            time.sleep(0.05)


@contextlib.contextmanager
def _client(c: cluster.Cluster) -> Iterator[Redis]:
    endpoint = c._broker.endpoint
    assert endpoint is not None
    client = connect(endpoint, SOCKET_TIMEOUT)
    try:
        yield client
    finally:
        client.close()


def _left(client: Redis) -> dict[str, int]:
    """Where there are messages, and how many."""
    steps = app.connection_for_write().default_channel.priority_steps
    sep = "\x06\x16"
    queues = [f"celery{sep}{step}" if step else "celery" for step in steps]
    found = {queue: client.llen(queue) for queue in queues}
    held = f"{keys.unacked('')}*"
    found |= {key.decode(): client.hlen(key) for key in client.scan_iter(held, 1000, "hash")}
    found |= {key.decode(): client.llen(key) for key in client.scan_iter(held, 1000, "list")}
    found[keys.GIVEN_UP] = client.llen(keys.GIVEN_UP)
    return {name: count for name, count in found.items() if count}


def _evidence(c: cluster.Cluster, clients: list[Client], record: Path, done: Run) -> Evidence:
    expected = [one for client in clients for one in client.tally.expected]
    outcomes: dict[str, str] = {}
    for client in clients:
        outcomes |= client.tally.outcomes
    later: dict[str, str] = {}
    fenced: dict[str, str] = {}
    with _troubles_in(done), _client(c) as client:
        later = _stored(client, [one.task for one in expected])
        fenced = {node.decode(): why.decode() for node, why in client.hgetall(keys.FENCED).items()}
        missing = [one.task for one in expected if one.task not in outcomes]
        for task in missing[:SEARCHED]:
            where = _where_is(client, task)
            done.troubles.append(f"no result of {task}; the broker has it in: {where}")
    return Evidence(
        expected=expected,
        outcomes=outcomes,
        executions=read(record),
        faults=done.faults,
        later=later,
        fenced=fenced,
        idempotent=True,
    )


def _stored(client: Redis, tasks: list[str]) -> dict[str, str]:
    backend = app.backend
    found = {}
    for first in range(0, len(tasks), AT_ONCE):
        some = tasks[first : first + AT_ONCE]
        for task, raw in zip(
            some, client.mget([backend.get_key_for_task(task) for task in some]), strict=True
        ):
            if raw not in {None, FREED}:
                meta: Any = backend.decode_result(raw)
                found[task] = outcome(meta["result"])
    return found


def _where_is(client: Redis, task: str) -> list[str]:
    """The keys whose value has the task's id in it."""
    found = []
    for key in client.scan_iter("*", 1000):
        kind = client.type(key)
        if kind == b"list":
            values = client.lrange(key, 0, -1)
        elif kind == b"hash":
            values = client.hvals(key)
        elif kind == b"string":
            values = [client.get(key) or b""]
        else:
            values = []
        if task in key.decode() or any(task.encode() in value for value in values):
            found.append(f"{key.decode()} ({kind.decode()})")
    return found
