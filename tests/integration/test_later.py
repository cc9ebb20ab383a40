"""What a worker has taken and doesn't run yet is its own, too: when it goes, in whatever way, each
task runs elsewhere, once, at its time; and what was revoked meanwhile doesn't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from laterapp import ahead, app, hold, hold_up, kill_worker, limited, put_down, try_again, write

import cluster
from cluster.wire import keys

#: Seconds for a result.
SOON = 25

#: Seconds until tasks are due that a worker shall hold until it is gone.
COUNTDOWN = 3

LOSSES = ["killed", "frozen", "told to leave"]

Eventually = Callable[..., None]


@pytest.fixture(autouse=True)
def soon_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", "1.5")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def held(c: cluster.Cluster) -> int:
    """How many messages the workers have taken and not settled, once they have taken all."""
    with c.app.connection_for_read() as connection:
        if connection.default_channel._size("celery"):
            return -1
    return sum(c._client.hlen(keys.unacked(node)) for node in c.workers)


def worker_of(c: cluster.Cluster) -> subprocess.Popen[bytes]:
    [process] = [
        worker.process for worker in c.launcher._workers.values() if worker.process.poll() is None
    ]
    return process


def begin_to_lose(c: cluster.Cluster, how: str, eventually: Eventually) -> None:
    """The only worker begins to go."""
    pid = worker_of(c).pid
    if how == "frozen":
        os.kill(pid, signal.SIGSTOP)
        stopped = psutil.STATUS_STOPPED
        eventually(lambda: psutil.Process(pid).status() == stopped, "it has stopped")
    else:
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGTERM)


def lose(c: cluster.Cluster, how: str, eventually: Eventually) -> None:
    """The only worker goes, and is missed."""
    [before] = c.workers
    process = worker_of(c)
    begin_to_lose(c, how, eventually)
    eventually(lambda: before not in c.workers, "it is missed", timeout=8)
    eventually(lambda: process.poll() is not None, "it has ended", timeout=8)
    if how == "told to leave":
        assert process.poll() == 81


@pytest.mark.parametrize("how", LOSSES)
def test_what_a_worker_holds_for_later_runs_elsewhere_once(how: str, log: Path, eventually):
    with cluster.start(1, app=app, concurrency=2) as c:
        results = {name: limited.delay(str(log), name) for name in ("first", "second")}
        results["first"].get(timeout=SOON)
        eventually(lambda: held(c) == 1, "the worker holds the second")
        results["retry"] = try_again.delay(str(log), COUNTDOWN)
        results |= {
            name: write.apply_async((str(log), name), countdown=COUNTDOWN, **options)
            for name, options in {
                "countdown": {},
                "has time": {"expires": 60},
                "has no time": {"expires": COUNTDOWN - 2},
                "time limit": {"time_limit": 30, "soft_time_limit": 20},
            }.items()
        }
        eventually(lambda: "try 0" in lines(log) and held(c) >= 5, "the worker holds the others")
        lose(c, how, eventually)
        assert results["second"].get(timeout=SOON) == "second"
        assert results["retry"].get(timeout=SOON) == 1
        for name in ("countdown", "has time", "time limit"):
            assert results[name].get(timeout=SOON) is True
        with pytest.raises(TaskRevokedError, match="expired"):
            results["has no time"].get(timeout=SOON)
        assert write.delay(str(log), "last").get(timeout=SOON) is True
        eventually(lambda: held(c) == 0, "all are settled")
    assert sorted(lines(log)) == sorted(
        ["first", "try 0", "second", "try 1", "countdown", "has time", "time limit", "last"]
    )


def test_a_worker_that_leaves_does_not_wait_for_what_waits(log: Path, go: Path, eventually):
    """It waits for what runs, and for nothing that would run in a minute only."""
    with cluster.start(1, app=app, concurrency=2) as c:
        running = hold.delay(str(go), str(log))
        eventually(lambda: lines(log), "it runs")
        later = write.apply_async((str(log), "later"), countdown=600)
        first = limited.delay(str(log), "first")
        first.get(timeout=SOON)
        second = limited.delay(str(log), "second")
        eventually(lambda: held(c) == 3, "the worker holds them")
        process, nodes = worker_of(c), set(c.workers)
        process.terminate()
        asked = app.control.inspect(destination=list(nodes), limit=1, timeout=3)
        assert asked.ping().keys() == nodes, "it answers until it has left"
        go.touch()
        assert running.get(timeout=SOON) == "held"
        eventually(lambda: process.poll() == 81, "it has left", timeout=5)
        assert second.get(timeout=SOON) == "second", "by another one"
        eventually(lambda: held(c) == 1, "that one holds the other")
        later.revoke()
    assert [line.split()[0] for line in lines(log)] == ["hold", "first", "second"]


def test_a_task_that_waits_for_its_turn_has_killed_nobody(log: Path, monkeypatch, eventually):
    """Where one death is enough, it must have been a death of this task's."""
    monkeypatch.setenv("CLUSTER_MAX_DELIVERIES", "1")
    with cluster.start(1, app=app) as c:
        first, second = (limited.delay(str(log), str(i)) for i in range(2))
        assert first.get(timeout=SOON) == "0"
        eventually(lambda: held(c) == 1, "the worker holds the second")
        lose(c, "killed", eventually)
        assert second.get(timeout=SOON) == "1"
    assert lines(log) == ["0", "1"]


def test_a_time_limit_holds_for_the_second_run_as_well(log: Path, go: Path, eventually):
    with cluster.start(1, app=app) as c:
        result = hold.apply_async((str(go), str(log)), time_limit=1)
        eventually(lambda: lines(log), "it runs")
        lose(c, "killed", eventually)
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=SOON)
    assert len(lines(log)) == 2


# -- taken ahead ------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOSSES[:2])
def test_high_priorities_come_first_when_they_come_back(how: str, log: Path, go: Path, eventually):
    """Also before those that were taken ahead of them."""
    with cluster.start(1, app=ahead) as c:
        results = [hold_up.apply_async((str(go), str(log)), priority=0)]
        eventually(lambda: lines(log), "the worker is busy")
        for number, priority in enumerate((9, 6, 3)):
            results.append(put_down.apply_async((str(log), f"{priority}"), priority=priority))
            eventually(lambda n=number: held(c) == n + 2, "it is taken ahead")
        results += [put_down.apply_async((str(log), f"{p} waits"), priority=p) for p in (9, 0, 3)]
        lose(c, how, eventually)
        go.touch()
        for result in results:
            result.get(timeout=SOON)
    seen = [line for line in lines(log) if not line.startswith("hold")]
    assert seen == ["0 waits", "3", "3 waits", "6", "9", "9 waits"]


def test_what_was_taken_ahead_of_a_deadly_task_is_not_given_up_with_it(
    log: Path, go: Path, tmp_path: Path, eventually
):
    """It never ran: the deaths are the other's."""
    other = tmp_path / "other"
    with cluster.start(1, app=ahead) as c:
        deadly = kill_worker.delay(str(go), str(log))
        innocent = [put_down.delay(str(other), str(i)) for i in range(3)]
        for times in range(1, 4):
            eventually(lambda n=times: len(lines(log)) == n and held(c) == 4, "it has all")
            Path(f"{go}{times}").touch()
        with pytest.raises(cluster.WorkerLost):
            deadly.get(timeout=SOON)
        assert [result.get(timeout=SOON) for result in innocent] == ["0", "1", "2"]
        c.wait_for_workers(1, timeout=SOON)
    assert lines(other) == ["0", "1", "2"]


# -- revoked ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOSSES)
def test_what_is_revoked_while_its_worker_is_lost_is_not_run(
    how: str, log: Path, go: Path, tmp_path: Path, eventually
):
    """One that it holds for later, one that waits for its turn, one that waits in the queue, and
    one that runs and is to be terminated."""
    other = tmp_path / "other"
    with cluster.start(1, app=app, concurrency=2) as c:
        later = write.apply_async((str(other), "later"), countdown=600)
        running = hold.delay(str(go), str(log))
        eventually(lambda: lines(log), "it runs")
        limited.delay(str(other), "first").get(timeout=SOON)
        turn = limited.delay(str(other), "turn")
        eventually(lambda: held(c) == 3, "the worker holds them")
        queued = write.delay(str(other), "queued")
        begin_to_lose(c, how, eventually)
        app.control.revoke([later.id, turn.id, queued.id])
        running.revoke(terminate=True)
        for result in (later, running, queued, turn):
            with pytest.raises(TaskRevokedError):
                result.get(timeout=SOON)
        assert write.delay(str(other), "last").get(timeout=SOON) is True
    assert len(lines(log)) == 1
    assert lines(other) == ["first", "last"]


def test_a_task_that_is_terminated_as_its_worker_dies_is_not_run_again(
    log: Path, go: Path, eventually
):
    with cluster.start(1, app=app) as c:
        running = hold.delay(str(go), str(log))
        eventually(lambda: lines(log), "it runs")
        running.revoke(terminate=True, signal="SIGKILL")
        worker_of(c).kill()
        with pytest.raises(TaskRevokedError):
            running.get(timeout=SOON)
        assert write.delay(str(log), "last").get(timeout=SOON) is True
    assert [line.split()[0] for line in lines(log)] == ["hold", "last"]


def test_what_was_revoked_is_not_run_after_the_broker_was_restarted(
    log: Path, go: Path, tmp_path: Path, eventually
):
    """By the worker that was there, nor by one that comes afterwards."""
    never = tmp_path / "never"
    with cluster.start(1, app=app) as c:
        running = hold.delay(str(go), str(log))
        eventually(lambda: lines(log), "the worker is busy")
        revoked = [write.delay(str(never), str(i)) for i in range(2)]
        app.control.revoke([result.id for result in revoked])
        server = c._broker._server_process
        server.kill()
        eventually(lambda: c._broker._server_process.pid != server.pid, "it is restarted")
        worker_of(c).kill()
        go.touch()
        assert running.get(timeout=SOON) == "held"
        for result in revoked:
            with pytest.raises(TaskRevokedError):
                result.get(timeout=SOON)
    assert not never.exists()


PAUSES = """
import os, time
from pathlib import Path
from celery import Celery
from cluster.worker import revokes
app = Celery("pauses")
here = Path({path!r})
@app.task
def write(name): (here / name).touch()
def learn(client, really=revokes.learn):
    really(client)
    (here / "learnt").touch()
    deadline = time.monotonic() + 20
    while not (here / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
revokes.learn = learn
"""


def test_what_is_revoked_in_the_moment_that_a_worker_joins_is_not_run(
    tmp_path: Path, module, eventually
):
    """When it has asked what was revoked, and doesn't listen to orders yet."""
    name = module("pauses", PAUSES.format(path=str(tmp_path)))
    go, learnt = tmp_path / "go", tmp_path / "learnt"
    go.touch()
    with cluster.start(1, app=f"{name}:app") as c:
        write = sys.modules[name].write
        learnt.unlink()
        go.unlink()
        worker_of(c).kill()
        eventually(learnt.exists, "another one is about to join")
        result = write.delay("ran")
        result.revoke()
        go.touch()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=SOON)
    assert not (tmp_path / "ran").exists()
