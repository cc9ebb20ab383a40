"""Who gives no sign of life: frozen workers, workers that are cut off, managers that stall."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from network import Network, network
from sampleapp import app, wait_for, where

import cluster
from cluster.launchers.local import LocalLauncher
from cluster.model import WorkerRef, WorkerSpec
from cluster.wire import keys
from cluster.wire.exitcodes import ExitCode


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", "2")


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


class Lenient(LocalLauncher):
    """Ends nobody while a cluster runs, as a platform that can't reach its machine."""

    def terminate(self, refs: Sequence[WorkerRef], *, reason: str) -> None:
        if "stopping" in reason:
            super().terminate(refs, reason=reason)


class Networked(Lenient):
    """The first worker is behind a network that can be cut."""

    network: Network

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def launch(self, spec: WorkerSpec, count: int) -> Sequence[WorkerRef]:
        refs: list[WorkerRef] = []
        if not hasattr(self, "network"):
            host, port = spec.environment["CLUSTER_ADDRESS"].split(":")
            self.network = self._stack.enter_context(network((host, int(port))))
            address = f"{host}:{self.network.port}"
            environment = {**spec.environment, "CLUSTER_ADDRESS": address}
            refs += super().launch(dataclasses.replace(spec, environment=environment), 1)
            count -= 1
        return [*refs, *super().launch(spec, count)]


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[psutil.Process]:
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def exit_codes(c: cluster.Cluster) -> list[int | None]:
    return [worker.status.exit_code for worker in c.status().workers]


def test_a_frozen_worker_gives_its_task_to_another(tmp_path: Path, eventually, caplog):
    """Its connections stand. It is ended, and replaced."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        before = set(c.workers)
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        _, _, main = lines(log)[0].split()
        with frozen(int(main)):
            eventually(lambda: len(lines(log)) == 2, "the task runs elsewhere")
            eventually(lambda: -signal.SIGKILL in exit_codes(c), "it is ended")
        go.touch()
        assert result.get(timeout=30) == "done"
        eventually(lambda: len(set(c.workers) - before) == 1, "it is replaced")
        eventually(lambda: len(c.workers) == 2, "and no more than that")
    assert "no sign of life for 1.8 s: stopped or cut off; tasks given back: 1" in caplog.text
    assert [line.split()[0] for line in lines(log)] == ["start", "start", "end"]


def test_a_frozen_worker_is_missed_while_others_are_talked_to(eventually):
    """What the broker sends to the frozen one is no sign of life."""
    with cluster.start(2, app=app) as c:
        before = set(c.workers)
        _, _, main = where.delay().get(timeout=30)
        with frozen(main):

            def replaced() -> bool:
                app.control.broadcast("heartbeat")
                return len(before - set(c.workers)) == 1

            eventually(replaced, "it is missed")


def test_a_zombie_that_thaws_disturbs_nothing_and_leaves(tmp_path: Path, eventually):
    """Nobody has ended it: the fence does. Its result, that of the first run, isn't stored."""
    log, go, other = tmp_path / "log", tmp_path / "go", tmp_path / "other"
    with cluster.start(1, app=app, launcher=Lenient()) as c:
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        _, child, main = map(int, ["0", *lines(log)[0].split()[1:]])
        with frozen(main), frozen(child):
            eventually(lambda: len(lines(log)) == 2, "the task runs elsewhere")
            waiting = wait_for.delay(str(other), str(tmp_path / "log2"))
        eventually(lambda: ExitCode.FENCED in exit_codes(c), "it has left by itself")
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
        assert c._client.hlen(keys.FENCED) == 1
        go.touch()
        assert result.get(timeout=30) == "done"
        other.touch()
        assert waiting.get(timeout=30) == "done"
        assert c._client.llen("celery") == 0
    assert sorted(line.split()[0] for line in lines(log)) == ["end", "start", "start"]


def test_a_short_freeze_is_no_death(tmp_path: Path, eventually):
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(1, app=app) as c:
        before = c.workers
        result = wait_for.delay(str(go), str(log))
        eventually(lambda: lines(log), "the task runs")
        _, _, main = lines(log)[0].split()

        def silence() -> int:
            clients = c._client.client_list(_type="pubsub")
            return max(
                int(client["idle"])
                for client in clients
                if client["name"] == keys.presence(before[0])
            )

        with frozen(int(main)):
            eventually(lambda: silence() >= 1, "it is missed")
        eventually(lambda: silence() == 0, "it is heard again")
        go.touch()
        assert result.get(timeout=30) == "done"
        assert c.workers == before
    assert [line.split()[0] for line in lines(log)] == ["start", "end"]


@pytest.mark.parametrize("heals", [True, False], ids=["healed", "for good"])
def test_a_network_that_is_cut_without_a_word(tmp_path: Path, eventually, monkeypatch, heals):
    """The task runs elsewhere. Who was cut off finds the fence, or ends itself as an orphan."""
    monkeypatch.setenv("CLUSTER_ORPHAN_TIMEOUT", "60" if heals else "4")
    log, go = tmp_path / "log", tmp_path / "go"
    with contextlib.ExitStack() as stack:
        launcher = Networked(stack)
        with cluster.start(1, app=app, launcher=launcher) as c:
            result = wait_for.delay(str(go), str(log))
            eventually(lambda: lines(log), "the task runs")
            launcher.network.cut()
            eventually(lambda: len(lines(log)) == 2, "the task runs elsewhere")
            if heals:
                launcher.network.heal()
            code = ExitCode.FENCED if heals else ExitCode.ORPHANED
            eventually(lambda: code in exit_codes(c), "it has left by itself")
            go.touch()
            assert result.get(timeout=30) == "done"
            launcher.network.heal()
    assert sorted(line.split()[0] for line in lines(log)) == ["end", "start", "start"]


STALLED = """
import ctypes, sys, threading, time
import cluster
from celery import Celery
app = Celery("stalled")
@app.task
def nap(i):
    time.sleep(0.05)
    return i
@app.task
def large(i): return "x" * 2**20
if __name__ == "__main__":
    with cluster.start(2) as c:
        before = c.workers
        waiting = [nap.delay(i) for i in range(100)] + [large.delay(i) for i in range(40)]
        # A C extension that computes and doesn't let go of the GIL.
        ctypes.PyDLL(None).sleep(int(sys.argv[1]))
        print(sum(r.get(timeout=30) for r in waiting[:100]))
        print(sum(len(r.get(timeout=30)) for r in waiting[100:]) // 2**20)
        print(c.workers == before, nap.delay(1).get(timeout=30), c.state)
"""


def test_a_manager_that_holds_its_gil_loses_nothing(tmp_path: Path, run_script, monkeypatch):
    """For longer than everybody's patience; what became ready meanwhile is more than the server
    keeps for a subscriber that doesn't read."""
    monkeypatch.setenv("CLUSTER_ORPHAN_TIMEOUT", "3")
    script = tmp_path / "stalled.py"
    script.write_text(STALLED)
    done = run_script(script, "8")
    assert done.stdout.split() == ["4950", "40", "True", "1", "ready"], done.stderr
    assert "ended" not in done.stderr and "restarted" not in done.stderr
