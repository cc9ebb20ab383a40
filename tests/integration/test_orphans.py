"""What a crash leaves: workers that hold the GIL, and what nobody was left to remove."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sampleapp import add, app
from tools import GONE_WITHIN, Traces

import cluster
from cluster import rundir

SCRIPT = """
import ctypes, os, pathlib, sys, time
import cluster
from celery import Celery
here = pathlib.Path(__file__).parent
def hold():
    (here / f"held-{os.getpid()}").touch()
    ctypes.PyDLL(None).sleep(3600)  # a C extension that doesn't let go of the GIL
app = Celery("holding")
@app.task
def hold_gil(): hold()
if __name__ == "__main__":
    c = cluster.start(1, output=False, minimum=0 if sys.argv[1] == "import" else 1, timeout=3)
    if sys.argv[1] == "task":
        hold_gil.delay()
    (here / "ready").write_text(str(c._broker._guardian.pid))
    time.sleep(3600)
elif (here / "import").exists():
    hold()
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Runs the script, as one that can be killed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(what: str) -> subprocess.Popen[bytes]:
        (tmp_path / what).touch()
        started.append(subprocess.Popen([sys.executable, str(tmp_path / "script.py"), what]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def gone(traces: Traces) -> None:
    """Fail unless no process is left, soon."""
    deadline = time.monotonic() + GONE_WITHIN
    while left := traces.processes():
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the GIL has to be free for that")
@pytest.mark.parametrize("where", ["task", "import"])
def test_workers_that_hold_the_gil_end_with_their_manager(
    where: str, tmp_path: Path, traces: Traces, manager, eventually
):
    """In a task, which is a child's, and as the app is imported, which is the main process's."""
    process = manager(where)
    eventually(lambda: list(tmp_path.glob("held-*")), "the GIL is held")
    eventually((tmp_path / "ready").exists, "the manager goes on")
    process.kill()
    process.wait()
    gone(traces)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the GIL has to be free for that")
def test_a_child_that_holds_the_gil_ends_with_its_worker(
    tmp_path: Path, traces: Traces, manager, eventually
):
    manager("task")
    eventually(lambda: list(tmp_path.glob("held-*")), "the GIL is held")
    [child] = [int(path.name.removeprefix("held-")) for path in tmp_path.glob("held-*")]
    parent = psutil.Process(child).parent()
    assert parent is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        # Its fork server, too, which would see to it.
        parent.parent().kill()
        parent.kill()
    eventually(lambda: not psutil.pid_exists(child), "the child has ended")


def test_what_a_crash_of_all_has_left_is_removed_by_the_next_start(
    tmp_path: Path, traces: Traces, manager, eventually, caplog
):
    """Manager, guardian and fork server are killed at once, and a worker is stopped."""
    process = manager("nothing")
    eventually((tmp_path / "ready").exists, "the cluster runs")
    [path] = traces.directory.glob("cluster-*")
    cluster_id = path.name.split("-")[1]
    launcher = cluster.launchers.local.LocalLauncher()
    [ref] = launcher.find(cluster_id)
    assert list(rundir.leftovers()) == [], "its manager lives"
    for pid in (process.pid, int((tmp_path / "ready").read_text())):
        os.kill(pid, signal.SIGSTOP)
    for pid in (process.pid, int((tmp_path / "ready").read_text())):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert list(rundir.leftovers()) == [(cluster_id, path)]
    with caplog.at_level(logging.WARNING, "cluster"), cluster.start(1, app=app):
        assert not path.exists()
        assert launcher.find(cluster_id) == []
        assert launcher.describe([ref])[ref].final
        assert add.delay(1, 1).get(timeout=30) == 2
    assert f"What was left of its cluster {cluster_id} has been removed" in caplog.text


def test_a_directory_that_is_held_or_has_no_lock_is_no_leftover(traces: Traces):
    held = rundir.RunDirectory("held")
    (traces.directory / "cluster-other-x").mkdir()
    assert list(rundir.leftovers()) == []
    held.let_go()
    held.let_go()
    assert list(rundir.leftovers()) == [("held", held.path)]
    held.remove()
    (traces.directory / "cluster-other-x").rmdir()


def test_a_forked_process_holds_no_directory(eventually):
    """It may outlive the manager."""
    held = rundir.RunDirectory("held")
    go, stop = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stop)
        os.read(go, 1)
        os._exit(0)
    held.let_go()
    eventually(lambda: list(rundir.leftovers()) == [("held", held.path)], "it is a leftover")
    os.close(stop)
    os.waitpid(child, 0)
    os.close(go)
    held.remove()
