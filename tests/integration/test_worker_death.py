"""A worker dies; its tasks run elsewhere, and another takes its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sampleapp import (
    add,
    app,
    ask_back,
    fork_a_child,
    kill_own_process,
    kill_own_process_by_own_request,
    leave,
    run_out_of_memory,
    wait_for,
    write_down,
)

import cluster
from cluster.model import State
from cluster.wire import keys


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("victim", ["child", "main"])
def test_a_killed_worker_gives_its_task_to_another(tmp_path: Path, eventually, victim: str):
    """SIGKILL of the pool's child or of the main process: the task runs again and returns."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        before = c.workers
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        _, child, main = lines(log)[0].split()
        os.kill(int(child if victim == "child" else main), signal.SIGKILL)
        eventually(lambda: len(lines(log)) == 2, "the task runs again", timeout=5)
        go.touch()
        assert result.get(timeout=30) == "done"
        c.wait_for_workers(2, timeout=30)
        if victim == "main":
            eventually(lambda: len(set(c.workers) - set(before)) == 1, "one was replaced")
        assert [add.delay(i, i).get(timeout=30) for i in range(10)] == list(range(0, 20, 2))
    assert [line.split()[0] for line in lines(log)] == ["start", "start", "end"]


def test_no_task_is_missing_when_every_worker_is_killed(tmp_path: Path, eventually):
    """All workers at once, in the middle of many tasks; each result comes."""
    with cluster.start(2, app=app) as c:
        first = set(c.workers)
        results = [add.delay(i, 1) for i in range(300)]
        results[20].get(timeout=30)
        for ref in list(c.launcher._workers):
            c.launcher._workers[ref].process.kill()
        assert [result.get(timeout=30) for result in results] == list(range(1, 301))
        c.wait_for_workers(2, timeout=30)
        eventually(lambda: not first & set(c.workers), "both were replaced")


@pytest.mark.parametrize("task", [kill_own_process, kill_own_process_by_own_request])
def test_a_task_that_kills_whoever_runs_it_is_given_up(tmp_path: Path, task):
    """After three deliveries its result is WorkerLost; the workers go on."""
    log = tmp_path / "log"
    with cluster.start(1, app=app) as c:
        result = task.delay(str(log))
        with pytest.raises(cluster.WorkerLost, match="each of the 3 times"):
            result.get(timeout=30)
        assert len(lines(log)) == 3
        assert add.delay(1, 1).get(timeout=30) == 2
        assert c.state is State.READY


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_error_callbacks_hear_of_a_task_that_is_given_up(tmp_path: Path, eventually, compression):
    log, heard = tmp_path / "log", tmp_path / "heard"
    with cluster.start(1, app=app):
        kill_own_process.apply_async(
            (str(log),), link_error=write_down.si(str(heard)), compression=compression
        )
        eventually(heard.exists, "the error callback ran")


def test_a_task_that_exits_is_given_up_and_the_message_names_that(tmp_path: Path):
    with cluster.start(1, app=app):
        with pytest.raises(cluster.WorkerLost, match=r"sys\.exit\(\)"):
            leave.delay(str(tmp_path / "log")).get(timeout=30)
        assert len(lines(tmp_path / "log")) == 3


def test_a_memory_error_is_a_tasks_error_and_not_the_workers(tmp_path: Path):
    """It runs once, its result is the error, and the worker goes on."""
    with cluster.start(1, app=app) as c:
        before = c.workers
        with pytest.raises(MemoryError, match="8 GiB"):
            run_out_of_memory.delay(str(tmp_path / "log")).get(timeout=30)
        assert add.delay(1, 1).get(timeout=30) == 2
        assert c.workers == before
        assert lines(tmp_path / "log") == ["start"]


def test_a_task_may_ask_to_be_put_back_as_often_as_it_likes(tmp_path: Path):
    """Reject(requeue=True) isn't a death and isn't counted as one."""
    with cluster.start(1, app=app):
        assert ask_back.delay(str(tmp_path / "log"), 6).get(timeout=30) == 6


BREAKS_LATER = """
import threading
from pathlib import Path
from celery import Celery
app = Celery("breaks")
@app.task
def never(): threading.Event().wait()
if Path({path!r}).exists():
    raise RuntimeError("the licence has run out")
"""


def test_with_no_worker_left_a_waiting_get_raises(tmp_path: Path, eventually, module):
    """No worker and none to come: WorkerLost with the last one's log, and the state says it."""
    broken = tmp_path / "broken"
    name = module("breaks", BREAKS_LATER.format(path=str(broken)))
    with cluster.start(1, app=f"{name}:app") as c:
        broken.touch()
        result = sys.modules[name].never.delay()
        [worker] = c.launcher._workers.values()
        worker.process.kill()
        with pytest.raises(cluster.WorkerLost, match="licence has run out"):
            result.get(timeout=30)
        eventually(lambda: c.state is State.FAILED, "the state says so")


def test_a_worker_that_its_platform_ends_hands_its_work_back(tmp_path: Path, eventually):
    """SIGTERM: nothing new is taken, what runs may finish, the exit code is the platform's."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(1, app=app) as c:
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        [(ref, worker)] = c.launcher._workers.items()
        worker.process.terminate()
        later = add.delay(2, 3)
        go.touch()
        assert result.get(timeout=30) == "done"
        assert later.get(timeout=30) == 5, "by the worker that takes its place"
        eventually(lambda: worker.process.poll() is not None, "it has left")
        assert c.launcher.describe([ref])[ref].exit_code == 81
    assert [line.split()[0] for line in lines(log)] == ["start", "end"]


def test_a_task_that_waits_for_its_time_has_killed_nobody(tmp_path: Path, eventually):
    """However many workers are lost meanwhile; once it runs and kills, it counts."""
    with cluster.start(1, app=app) as c:
        later = add.apply_async((1, 2), countdown=8)
        for _ in range(3):
            [node] = c.workers
            held = keys.unacked(node)
            eventually(lambda held=held: c._client.hlen(held) == 1, "the worker holds it")
            running(c).kill()
            eventually(lambda node=node: c.workers not in ((), (node,)), "it is replaced")
        assert later.get(timeout=30) == 3
        deadly = kill_own_process.apply_async((str(tmp_path / "log"),), countdown=0.1)
        with pytest.raises(cluster.WorkerLost):
            deadly.get(timeout=30)


def running(c: cluster.Cluster) -> subprocess.Popen[bytes]:
    [process] = [
        worker.process for worker in c.launcher._workers.values() if worker.process.poll() is None
    ]
    return process


def test_a_worker_whose_connection_breaks_is_not_taken_for_dead(tmp_path: Path, eventually):
    """Its sign of life comes back at once; its task goes on, and is run once."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        before = c.workers
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        for _ in range(3):
            killed = {client["id"] for client in c._client.client_list() if client["sub"] == "2"}
            assert len(killed) == 2
            for id_ in killed:
                c._client.client_kill_filter(_id=id_)
            eventually(
                lambda killed=killed: (
                    sum(
                        client["sub"] == "2" and client["id"] not in killed
                        for client in c._client.client_list()
                    )
                    == 2
                ),
                "both have subscribed again",
            )
        go.touch()
        assert result.get(timeout=30) == "done"
        assert c.workers == before
    assert [line.split()[0] for line in lines(log)] == ["start", "end"]


def test_a_worker_too_busy_to_come_back_at_once_is_not_dead(tmp_path: Path, eventually):
    """Its sign of life broke, but the process has other connections: it gets time."""
    with cluster.start(1, app=app) as c:
        before = c.workers
        pid = running(c).pid

        def asked() -> int:
            counts = c._client.info("commandstats")
            return counts.get("cmdstat_client|list", {}).get("calls", 0)

        [watchdog] = [client["id"] for client in c._client.client_list() if client["sub"] == "2"]
        already = asked()
        os.kill(pid, signal.SIGSTOP)
        try:
            # Its threads go on until one of them has met the signal.
            stopped = psutil.STATUS_STOPPED
            eventually(lambda: psutil.Process(pid).status() == stopped, "it has stopped")
            c._client.client_kill_filter(_id=watchdog)
            eventually(lambda: asked() >= already + 2, "the guardian has looked at it twice")
            assert c._client.hlen(keys.FENCED) == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        assert add.delay(1, 1).get(timeout=30) == 2
        assert c.workers == before


def test_a_task_may_fork(tmp_path: Path):
    """Without a traceback in the worker's log."""
    with cluster.start(1, app=app) as c:
        assert fork_a_child.delay().get(timeout=30) == 7
        assert "Traceback" not in str(c.logs())
