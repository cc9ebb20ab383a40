"""What only the launcher of local processes does."""

from __future__ import annotations

import os
import signal
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
        [server] = c.launcher._servers.values()
        os.kill(server.pid, signal.SIGKILL)
        eventually(
            lambda: len(c.workers) == 2 and not set(c.workers) & set(before), "both are replaced"
        )
        go.touch()
        assert result.get(timeout=30) == "done"
        assert add.delay(1, 2).get(timeout=30) == 3
        [another] = c.launcher._servers.values()
        assert another.pid != server.pid


def test_a_fork_server_has_one_thread(eventually):
    """Others would be missing in what it forks, with their locks held."""
    with cluster.start(1, app=app) as c:
        [server] = c.launcher._servers.values()
        assert psutil.Process(server.pid).num_threads() == 1
