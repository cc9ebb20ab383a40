"""Workers that run something else than the manager: a table at join."""

from __future__ import annotations

import sys

import pytest

import cluster

DIFFERS = """
import celery, platform
from celery import Celery
from cluster.wire import identity
app = Celery("{name}")
if identity.current():
    {in_a_worker}
@app.task
def add(x, y): return x + y
if not identity.current():
    {in_the_manager}
"""


@pytest.fixture
def differing(module):
    """An app that isn't the same on both sides."""

    def make(name: str, in_a_worker: str = "pass", in_the_manager: str = "pass") -> str:
        text = DIFFERS.format(name=name, in_a_worker=in_a_worker, in_the_manager=in_the_manager)
        return f"{module(name, text)}:app"

    return make


def test_another_major_version_is_refused_with_a_table(differing):
    """No worker that can't work is counted, replaced, or left running."""
    app = differing("oldcelery", in_a_worker='celery.__version__ = "4.4.7"')
    with pytest.raises(cluster.VersionMismatch) as caught:
        cluster.start(2, app=app)
    [head, titles, row] = str(caught.value).splitlines()[:3]
    assert "0 of 2 workers" in head and "can't work with this manager" in head
    assert titles.split() == ["manager", "worker", "on"]
    assert "4.4.7" in row and "can't work: another major version" in row


def test_what_may_work_is_warned_of_once(differing):
    app = differing("newpython", in_a_worker='platform.python_version = lambda: "3.99.1"')
    with pytest.warns(RuntimeWarning, match=r"Python +3\.\d+\.\d+ +3\.99\.1") as warned:
        c = cluster.start(2, app=app)
    with c:
        assert sys.modules["newpython"].add.delay(1, 2).get(timeout=30) == 3
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_a_task_that_workers_lack_is_named_and_its_result_says_so(differing):
    app = differing("lacking", in_the_manager="app.task(name='lacking.extra')(add.run)")
    with pytest.warns(RuntimeWarning, match="not registered there: lacking.extra"):
        c = cluster.start(1, app=app)
    with c, pytest.raises(Exception, match="lacking.extra"):
        c.app.tasks["lacking.extra"].delay(1, 2).get(timeout=30)


def test_workers_that_have_none_of_the_tasks_are_refused(differing):
    app = differing("empty", in_a_worker="Celery.gen_task_name = lambda self, name, module: name")
    with pytest.raises(cluster.VersionMismatch, match="not registered there: empty.add"):
        cluster.start(1, app=app)


def test_a_worker_that_comes_later_and_lacks_the_tasks_fails_none(differing, tmp_path, eventually):
    """It ends before it takes one; those that wait are told why no other comes."""
    changed = tmp_path / "changed"
    app = differing(
        "changing",
        in_a_worker=f"""import pathlib
    if pathlib.Path({str(changed)!r}).exists():
        Celery.gen_task_name = lambda self, name, module: name""",
    )
    with cluster.start(1, app=app) as c:
        changed.touch()
        [worker] = c.launcher._workers.values()
        worker.process.kill()
        results = [sys.modules["changing"].add.delay(i, i) for i in range(20)]
        for result in results:
            with pytest.raises(cluster.WorkerLost, match="can't work with the manager"):
                result.get(timeout=30)
