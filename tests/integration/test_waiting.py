"""Nobody waits for ever: where no worker is left or a task keeps killing them, whoever waits is
told, and told why."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult

import cluster
import cluster.replacement
from cluster.broker.broker import Broker
from cluster.launchers.local import LocalLauncher
from cluster.model import State

#: Seconds for a result.
SOON = 25

APP = """
import os, signal, sys, threading, time
from functools import partial
from pathlib import Path
from celery import Celery
from celery.signals import worker_ready
app = Celery("waits", accept_content=["json", "pickle"])
app.conf.result_serializer = os.environ.get("SERIALIZER", "json")
task = partial(app.task, shared=False)  # each test makes this module anew
@task
def never(*_):
    while True: time.sleep(1)
@task
def add(x, y): return x + y
@task
def total(numbers): return sum(numbers)
@task
def end_child(log, how):
    print(f"child goes: {{how}}", flush=True)
    with Path(log).open("a") as file: file.write("start\\n")
    if how == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how))
@task
def end_main(log, how):
    print(f"main goes: {{how}}", flush=True)
    with Path(log).open("a") as file: file.write("start\\n")
    os.kill(os.getppid(), signal.SIGKILL if how == "SIGKILL" else signal.SIGUSR1)
    while True: time.sleep(1)
@worker_ready.connect
def leave_on_signal(**_):
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
flag = Path({flag!r})
if flag.exists():
    flag.with_suffix(".seen").touch()
    {then}
"""


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / "flag"


@pytest.fixture
def load(module: Callable[[str, str], str], flag: Path) -> Callable[[str], ModuleType]:
    """Makes the app's module. From when the flag exists on, workers do something else."""

    def make(then: str = "pass") -> ModuleType:
        name = module("waits", APP.format(flag=str(flag), then=then))
        __import__(name)
        return sys.modules[name]

    return make


BREAK = 'raise RuntimeError("the licence has run out")'


def pids(c: cluster.Cluster) -> list[int]:
    processes = [worker.process for worker in c.launcher._workers.values()]
    return [process.pid for process in processes if process.poll() is None]


def ways_to_wait(m: ModuleType) -> Mapping[str, Callable[[], object]]:
    """What a program may do to wait for what ``m.never`` returns."""
    never, add = m.never.s(), m.add.si(1, 1)
    one, several = m.never.delay(), group([never, never])()
    in_chain = chain(add, never, m.add.s(1))()
    in_chord = chord([never, add])(m.total.s())

    def poll(look: Callable[[], object]) -> None:
        while not look():
            threading.Event().wait(0.05)

    return {
        "get": one.get,
        "get with a timeout": lambda: one.get(timeout=60),
        "wait": one.wait,
        "get by id": AsyncResult(one.id, app=m.app).get,
        "get without propagating": lambda: m.never.delay().get(propagate=False),
        "get of a group": several.get,
        "join": several.join,
        "join_native": several.join_native,
        "iter_native": lambda: list(several.iter_native()),
        "collect": lambda: list(one.collect()),
        "get of a chain": in_chain.get,
        "get of a chord": in_chord.get,
        "get of a chord's header": in_chord.parent.get,
        "ready": lambda: poll(one.ready),
        "ready of a group": lambda: poll(several.ready),
        "state": lambda: poll(lambda: one.state != "PENDING"),
        "completed_count": lambda: poll(lambda: several.completed_count() == 2),
    }


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_every_way_of_waiting_ends_when_no_worker_is_left(
    how: signal.Signals, load, flag: Path, monkeypatch, eventually
):
    """In threads that wait at that moment, and for who begins to wait afterwards."""
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", "1.5")
    m = load(BREAK)
    raised: dict[str, BaseException] = {}
    began = []

    def run(name: str, wait: Callable[[], object]) -> None:
        began.append(name)
        try:
            wait()
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is looked at)
            raised[name] = error

    with cluster.start(2, app=m.app) as c:
        nodes = set(c.workers)
        ways = ways_to_wait(m)
        threads = [threading.Thread(target=run, args=way, daemon=True) for way in ways.items()]
        for thread in threads:
            thread.start()
        eventually(lambda: len(began) == len(ways), "all wait")
        flag.touch()
        for pid in pids(c):
            os.kill(pid, how)
        for thread in threads:
            thread.join(15)
        assert set(ways) - set(raised) == set(), "these go on waiting"
        eventually(lambda: c.state is State.FAILED, "the state says so")
        for name, wait in {**ways, "send": lambda: m.add.delay(1, 1)}.items():
            run(f"{name}, afterwards", wait)
    assert len(raised) == 2 * len(ways) + 1
    for name, error in raised.items():
        assert isinstance(error, cluster.WorkerLost), f"{name}: {error!r}"
        assert "No worker is left" in str(error)
        assert "the licence has run out" in str(error)
        deaths = dict(error.deaths)
        assert nodes <= set(deaths), f"{name}: {deaths}"
        [lines] = error.logs.values()
        assert any("the licence has run out" in line for line in lines)


def test_results_that_are_there_can_be_got_when_no_worker_is_left(load, flag: Path, eventually):
    """They were done, the broker has them, and an hour's work may be in them."""
    m = load(BREAK)
    with cluster.start(1, app=m.app) as c:
        done = [m.add.delay(i, i) for i in range(5)]
        eventually(lambda: all(result.ready() for result in done), "they are done")
        results = [AsyncResult(result.id, app=m.app) for result in done]
        flag.touch()
        [pid] = pids(c)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(cluster.WorkerLost):
            m.never.delay().get(timeout=SOON)
        assert [result.get(timeout=SOON) for result in results] == [0, 2, 4, 6, 8]


def test_replacements_that_never_become_ready_are_not_waited_for(load, flag: Path, eventually):
    """None has been ready for as long as a start may take."""
    m = load("threading.Event().wait()")
    with cluster.start(1, app=m.app, timeout=8) as c:
        [node], [pid] = c.workers, pids(c)
        flag.touch()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(cluster.WorkerLost, match="has been ready for 8 s") as caught:
            m.add.delay(1, 1).get(timeout=SOON)
        assert flag.with_suffix(".seen").exists()
        assert dict(caught.value.deaths) == {node: "killed by SIGKILL"}
        assert c.state is State.FAILED


def test_one_that_dies_as_it_becomes_ready_was_ready(load, flag, monkeypatch, eventually):
    """And with replacements that never are, nobody waits for ever."""
    m, launcher = load("threading.Event().wait()"), LocalLauncher()
    watch, started = Broker.watch, threading.Event()

    def kill_and_watch(broker: Broker) -> None:
        [worker] = launcher._workers.values()
        assert started.wait(SOON)
        flag.touch()
        os.kill(worker.process.pid, signal.SIGKILL)
        eventually(lambda: worker.process.over, "its launcher has heard")
        watch(broker)

    monkeypatch.setattr(Broker, "watch", kill_and_watch)
    with cluster.start(1, app=m.app, launcher=launcher, timeout=8):
        started.set()
        with pytest.raises(cluster.WorkerLost, match="has been ready for 8 s"):
            m.add.delay(1, 1).get(timeout=SOON)


CRASHES = """
@worker_ready.connect
def crash(**_): threading.Timer(0.3, os._exit, [3]).start()
"""


def test_a_crash_loop_of_idle_workers_ends(load, flag: Path, monkeypatch, eventually):
    """Each becomes ready and ends a moment later, having done nothing."""
    monkeypatch.setattr(cluster.replacement, "IDLE_AT_LEAST", 3)
    m = load(CRASHES.replace("\n", "\n    "))
    with cluster.start(1, app=m.app) as c:
        flag.touch()
        [pid] = pids(c)
        os.kill(pid, signal.SIGKILL)
        result = m.add.apply_async((1, 1), countdown=600)
        with pytest.raises(cluster.WorkerLost, match="too many ended.*exit code 3") as caught:
            result.get(timeout=SOON)
        assert [how for _, how in caught.value.deaths][1:] == ["exit code 3"] * 3
        assert len(c.launcher._workers) == 4


# -- a task that kills its process ------------------------------------------------------

END = ["child by a signal", "child by an exit", "main by a signal", "main by an exit"]


def end(m: ModuleType, kind: str, log: Path) -> Any:
    task = m.end_child if kind.startswith("child") else m.end_main
    return task.delay(str(log), "SIGKILL" if "signal" in kind else "3")


WORDS = {
    "child by a signal": "signal 9 (SIGKILL)",
    "child by an exit": "3",
    "main by a signal": "killed by SIGKILL",
    "main by an exit": "exit code 3",
}


@pytest.mark.parametrize(("serializer", "kinds"), [("json", END), ("pickle", END[::2])])
def test_who_died_of_a_task_and_how_is_in_its_error(
    serializer: str, kinds: Sequence[str], load, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("CLUSTER_MAX_DELIVERIES", "2")
    monkeypatch.setenv("SERIALIZER", serializer)
    m = load()
    with cluster.start(1, app=m.app) as c:
        for kind in kinds:
            log, words = tmp_path / kind, WORDS[kind]
            with pytest.raises(cluster.WorkerLost, match="each of the 2 times") as caught:
                end(m, kind, log).get(timeout=SOON)
            error = caught.value
            assert len(error.deaths) == 2
            assert all(words in how for _, how in error.deaths), error.deaths
            launched = {view.id for view in c.status().workers}
            assert all(node.startswith(tuple(launched)) for node, _ in error.deaths)
            assert set(error.logs) <= launched
            part = kind.split()[0]
            for lines in error.logs.values():
                assert any(f"{part} goes: " in line for line in lines)
            for node, how in error.deaths:
                assert f"{node}: {how}" in str(error)
            for other in (
                pickle.loads(pickle.dumps(error)),
                copy.copy(error),
                cluster.WorkerLost(*json.loads(json.dumps(error.args))),
            ):
                assert (str(other), other.deaths, other.logs) == (
                    str(error),
                    error.deaths,
                    error.logs,
                )
            c.wait_for_workers(1, timeout=SOON)
        assert m.add.delay(1, 1).get(timeout=SOON) == 2


@pytest.mark.parametrize("most", [1, 4])
def test_the_number_of_deliveries_is_the_users(most: int, load, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CLUSTER_MAX_DELIVERIES", str(most))
    m = load()
    with cluster.start(1, app=m.app) as c:
        for kind in END[::2]:
            log = tmp_path / kind
            with pytest.raises(cluster.WorkerLost, match=f"each of the {most} times") as caught:
                end(m, kind, log).get(timeout=SOON)
            assert len(caught.value.deaths) == most
            assert len(log.read_text().splitlines()) == most
        c.wait_for_workers(1, timeout=SOON)
        assert m.add.delay(1, 1).get(timeout=SOON) == 2
