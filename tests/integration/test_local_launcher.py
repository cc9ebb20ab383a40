"""What only the launcher of local processes does."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from sampleapp import add, app, wait_for

import cluster
from cluster.launchers.forkserver import ForkServer, Process
from cluster.launchers.local import LocalLauncher
from cluster.model import WorkerSpec


def test_a_worker_that_cannot_be_started_is_a_launch_error(tmp_path: Path):
    spec = WorkerSpec("c0ffee", 2, tmp_path / "gone", {})
    launcher = LocalLauncher()
    with pytest.raises(cluster.LaunchError, match="fork server can't be started") as caught:
        launcher.launch(spec, 2)
    assert caught.value.accepted == ()
    launcher.close("c0ffee")


def test_a_launch_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    """The second of two workers can't be started: the first is ended, and so is the broker."""
    original = ForkServer.fork

    def only_one(self: ForkServer, workers, **how):
        made = dict(original(self, workers[:1], **how))
        for worker in workers[1:]:
            made[worker] = Process(self._changed)
            made[worker].failure = "no more processes"
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkServer, "fork", only_one)
        with pytest.raises(cluster.LaunchError, match="no more processes") as caught:
            cluster.start(2, app=app)
    assert len(caught.value.accepted) == 1
    with cluster.start(1, app=app) as c:
        assert len(c.workers) == 1


def test_a_lost_fork_server_loses_no_task(tmp_path: Path, eventually):
    """Its workers end with it; others come, from another one, and do what those had begun."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        before = c.workers
        result = wait_for.delay(str(go), str(log))
        eventually(log.exists, "the task runs")
        [run] = c.launcher._runs.values()
        first = run.server.pid
        os.kill(first, signal.SIGKILL)
        eventually(
            lambda: len(c.workers) == 2 and not set(c.workers) & set(before), "both are replaced"
        )
        go.touch()
        assert result.get(timeout=30) == "done"
        assert add.delay(1, 2).get(timeout=30) == 3
        assert run.server.pid != first


def test_a_fork_server_has_one_thread(eventually):
    """Others would be missing in what it forks, with their locks held."""
    with cluster.start(1, app=app) as c:
        [run] = c.launcher._runs.values()
        assert psutil.Process(run.server.pid).num_threads() == 1


LOOKS = """
import os, subprocess, sys
from celery import Celery
app = Celery("looks")
@app.task
def look(expression): return eval(expression)
@app.task
def flood():
    process = subprocess.Popen(["yes", "flood"], start_new_session=True)
    return process.pid
@app.task
def parent(): return os.getppid()
"""


def test_a_worker_that_comes_later_finds_what_the_first_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually
):
    """Its working directory and search path, wherever the manager has gone since."""
    home = tmp_path / "ho:me"  # which PYTHONPATH couldn't hold
    home.mkdir()
    (home / "looks_late.py").write_text(LOOKS)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend("")
    looks = importlib.import_module("looks_late")
    with cluster.start(1, app=looks.app) as c:
        before = c.workers
        monkeypatch.chdir("/")
        os.kill(looks.parent.delay().get(timeout=30), signal.SIGKILL)
        eventually(lambda: c.workers not in ((), before), "it is replaced")
        assert looks.look.delay("os.getcwd()").get(timeout=30) == str(home)
    sys.modules.pop("looks_late")


def test_variables_that_python_reads_as_it_starts_and_those_of_numerical_libraries(module):
    """Who limits OpenMP limits the others, too."""
    name = module("looks_env", LOOKS)
    environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}
    with cluster.start(1, app=f"{name}:app", environment=environment):
        look = sys.modules[name].look
        assert look.delay("sys.flags.hash_randomization").get(timeout=30) == 0
        names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
        asked = look.delay(f"[os.environ[name] for name in {names}]")
        assert asked.get(timeout=30) == ["3", "3", "2"]


def test_a_stop_waits_for_no_end_of_a_flood(module, capsys):
    """What a process that outlives its worker goes on to print is cut off."""
    name = module("looks_flood", LOOKS)
    c = cluster.start(1, app=f"{name}:app", progress=False)
    pid = sys.modules[name].flood.delay().get(timeout=30)
    try:
        c.stop()
    finally:
        os.kill(pid, signal.SIGKILL)
    assert "| flood" in capsys.readouterr().err


def test_a_python_that_prints_as_it_starts_does_no_harm(tmp_path: Path, run_script, monkeypatch):
    """A sitecustomize, unbuffered as in many images: it isn't taken for a report."""
    (tmp_path / "sitecustomize.py").write_text("print('hello from site')")
    (tmp_path / "script.py").write_text(
        """
import cluster
from celery import Celery
app = Celery("greeted")
@app.task
def one(): return 1
if __name__ == "__main__":
    with cluster.start(1):
        print("result", one.delay().get(timeout=30))
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    done = run_script(tmp_path / "script.py")
    assert "result 1" in done.stdout
    assert "Traceback" not in done.stderr
