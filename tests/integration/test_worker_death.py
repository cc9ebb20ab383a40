"""A worker dies; its tasks run elsewhere, and another takes its place."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from sampleapp import add, app, ask_back, kill_own_process, wait_for

import cluster
from cluster.model import State


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


def test_a_task_that_kills_whoever_runs_it_is_given_up(tmp_path: Path):
    """After three deliveries its result is WorkerLost; the workers go on."""
    log = tmp_path / "log"
    with cluster.start(1, app=app) as c:
        result = kill_own_process.delay(str(log))
        with pytest.raises(cluster.WorkerLost, match="each of the 3 times"):
            result.get(timeout=30)
        assert len(lines(log)) == 3
        assert add.delay(1, 1).get(timeout=30) == 2
        assert c.state is State.READY


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
