"""What only the launcher of local processes does."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster
from cluster.launchers.local import LocalLauncher
from cluster.model import WorkerSpec


def test_a_worker_that_cannot_be_started_is_a_launch_error(tmp_path: Path):
    spec = WorkerSpec("c0ffee", tmp_path / "gone", {})
    with pytest.raises(cluster.LaunchError, match="can't be started") as caught:
        LocalLauncher().launch(spec, 2)
    assert caught.value.accepted == ()


def test_a_launch_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    """The second of two workers can't be started: the first is ended, and so is the broker."""
    from sampleapp import app

    started = []
    original = LocalLauncher._launch_one

    def once(self: LocalLauncher, spec: WorkerSpec):
        if started:
            raise OSError("no more processes")
        started.append(original(self, spec))
        return started[0]

    monkeypatch.setattr(LocalLauncher, "_launch_one", once)
    with pytest.raises(cluster.LaunchError, match="no more processes") as caught:
        cluster.start(2, app=app)
    assert list(caught.value.accepted) == started
    with pytest.MonkeyPatch.context() as fresh:
        fresh.setattr(LocalLauncher, "_launch_one", original)
        with cluster.start(1, app=app) as c:
            assert len(c.workers) == 1
