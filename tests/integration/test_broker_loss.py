"""The broker's server dies; work goes on. Its guardian dies; the user hears of it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from celery.exceptions import TimeoutError as ResultTimeoutError
from sampleapp import add, app, kill_own_process, wait_for

import cluster
import cluster.broker.broker as broker_module
from cluster.binding import Binding
from cluster.model import State


def server_of(c: cluster.Cluster) -> psutil.Process:
    process = c._broker._server_process
    assert process is not None
    return process


def running(c: cluster.Cluster) -> list[int]:
    """The process ids of the workers."""
    processes = [worker.process for worker in c.launcher._workers.values()]
    return [process.pid for process in processes if process.poll() is None]


def guardian_of(c: cluster.Cluster) -> psutil.Process:
    return psutil.Process(c._broker._guardian.pid)


def test_a_task_that_runs_while_the_broker_restarts_runs_once(tmp_path: Path, eventually):
    """Its result arrives, on the same port, from the same worker; new tasks run as well."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        workers, port = c.workers, c._broker.endpoint.port
        result = wait_for.delay(str(go), str(log))
        waiting = [add.delay(i, 1) for i in range(20)]
        eventually(log.exists, "the task runs")
        server = server_of(c)
        server.kill()
        eventually(lambda: server_of(c).pid != server.pid, "the broker is restarted")
        go.touch()
        assert result.get(timeout=30) == "done"
        assert [r.get(timeout=30) for r in waiting] == list(range(1, 21))
        assert [add.delay(i, 2).get(timeout=30) for i in range(10)] == list(range(2, 12))
        assert (c.workers, c._broker.endpoint.port) == (workers, port)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["start", "end"]


def test_a_task_that_ends_while_the_broker_is_away_runs_once(tmp_path: Path, eventually):
    """Its result is stored and it is acknowledged once the broker is back."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(1, app=app) as c:
        result = wait_for.delay(str(go), str(log))
        eventually(log.exists, "the task runs")
        guardian = guardian_of(c)
        guardian.suspend()  # nobody restarts the broker until it goes on
        server_of(c).kill()
        go.touch()
        eventually(lambda: "end" in log.read_text(), "the task has ended")
        guardian.resume()
        assert result.get(timeout=30) == "done"
        assert add.delay(1, 1).get(timeout=30) == 2
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["start", "end"]


def test_messages_wait_out_a_restart_while_nobody_runs_them(eventually):
    """Queued tasks are in the append-only file."""
    with cluster.start(0, app=app) as c:
        for i in range(100):
            add.delay(i, i)
        server = server_of(c)
        server.kill()
        eventually(lambda: server_of(c).pid != server.pid, "the broker is restarted")
        with app.connection_for_read() as connection:
            assert connection.default_channel.client.llen("celery") == 100


def test_a_guardian_that_dies_is_replaced_and_nothing_runs_twice(
    tmp_path: Path, eventually, caplog
):
    """Its server dies with it; another guardian starts another, on the port and with the data."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(2, app=app) as c:
        workers, port = c.workers, c._broker.endpoint.port
        result = wait_for.delay(str(go), str(log))
        waiting = [add.delay(i, 1) for i in range(20)]
        eventually(log.exists, "the task runs")
        for _ in range(2):
            guardian = guardian_of(c)
            guardian.kill()
            eventually(
                lambda dead=guardian: c._broker._guardian.pid != dead.pid, "there is another"
            )
        go.touch()
        assert result.get(timeout=30) == "done"
        assert [r.get(timeout=30) for r in waiting] == list(range(1, 21))
        assert (c.workers, c._broker.endpoint.port) == (workers, port)
        pid = running(c)[0]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(set(c.workers) - set(workers)) == 1, "it looks after workers, too")
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["start", "end"]
    assert "its guardian process ended: killed by SIGKILL" in caplog.text


def test_a_guardian_that_hangs_is_replaced(monkeypatch, eventually, caplog):
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", "1")
    monkeypatch.setattr(broker_module, "GUARDIAN_ALLOWANCE", 2.0)
    with cluster.start(1, app=app) as c:
        guardian = guardian_of(c)
        guardian.suspend()
        eventually(lambda: c._broker._guardian.pid != guardian.pid, "there is another")
        assert add.delay(1, 1).get(timeout=30) == 2
    assert "its guardian process hung" in caplog.text


def test_a_guardian_lost_again_and_again_is_a_lost_broker(tmp_path: Path, monkeypatch, eventually):
    """Waiting callers and new calls raise BrokerLost at once; stop leaves nothing."""
    monkeypatch.setattr(broker_module, "GUARDIANS", 0)
    with cluster.start(1, app=app) as c:
        result = wait_for.delay(str(tmp_path / "never"), str(tmp_path / "log"))
        server = server_of(c)
        os.kill(guardian_of(c).pid, signal.SIGKILL)
        with pytest.raises(cluster.BrokerLost, match="guardian process ended.*again and again"):
            result.get(timeout=60)
        eventually(lambda: c.state is State.FAILED, "the state says so")
        eventually(lambda: not server.is_running(), "the server was ended")
        with pytest.raises(cluster.BrokerLost):
            add.delay(1, 1)
        with pytest.raises(cluster.BrokerLost):
            c.wait_for_workers(2, timeout=60)


def test_a_broker_that_dies_again_and_again_is_given_up(tmp_path: Path):
    """After a few restarts in a short time BrokerLost says why, and nobody waits for ever."""
    with cluster.start(1, app=app) as c:
        result = wait_for.delay(str(tmp_path / "never"), str(tmp_path / "log"))

        def kill_and_wait() -> None:
            for _ in range(300):
                with contextlib.suppress(psutil.NoSuchProcess):
                    server_of(c).kill()
                with contextlib.suppress(ResultTimeoutError):
                    result.get(timeout=0.1)

        with pytest.raises(cluster.BrokerLost, match="again and again"):
            kill_and_wait()


def test_a_stop_ends_all_even_if_the_broker_cannot_write(tmp_path: Path, eventually):
    """With a task running, which can't be told; what stop does is the same."""
    log = tmp_path / "log"
    with cluster.start(2, app=app) as c:
        wait_for.delay(str(tmp_path / "never"), str(log))
        eventually(log.exists, "the task runs")
        c._client.config_set("min-replicas-to-write", 1)
    assert c.state is State.STOPPED


def test_a_step_of_stop_that_fails_keeps_no_other_from_being_done(monkeypatch):
    """And once it works, stop is complete."""
    c = cluster.start(1, app=app)
    server, broker = server_of(c), c._broker
    with monkeypatch.context() as broken:
        broken.setattr(type(c.launcher), "describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            c.stop()
    assert not server.is_running()
    assert not broker._directory.exists()
    assert app.conf.broker_url is None
    c.stop()
    assert c.state is State.STOPPED


def test_a_loss_in_the_middle_of_giving_up_hangs_nobody(tmp_path: Path, monkeypatch):
    """The supervisor stores a result when the broker goes for good: all are told."""
    monkeypatch.setattr(broker_module, "GUARDIANS", 0)
    original = Binding.fail_task

    def lose_all(self: Binding, *arguments: object) -> None:
        guardian_of(c).kill()
        server_of(c).kill()
        original(self, *arguments)

    monkeypatch.setattr(Binding, "fail_task", lose_all)
    with cluster.start(1, app=app) as c:
        result = kill_own_process.delay(str(tmp_path / "log"))
        with pytest.raises(cluster.BrokerLost):
            result.get(timeout=60)


def test_a_get_keeps_its_timeout_while_the_broker_is_away(eventually):
    with cluster.start(0, app=app) as c:
        result = add.delay(1, 1)
        guardian = guardian_of(c)
        guardian.suspend()
        server = server_of(c)
        server.kill()
        eventually(lambda: server.status() == psutil.STATUS_ZOMBIE, "the server is dead")
        with pytest.raises(ResultTimeoutError):
            result.get(timeout=0.5)
        guardian.resume()


def test_a_broker_that_refuses_writes_for_a_while_is_waited_for(tmp_path: Path, eventually, caplog):
    """As with a full disk: what ends meanwhile is settled afterwards, once."""
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(1, app=app) as c:
        result = wait_for.delay(str(go), str(log))
        eventually(log.exists, "the task runs")
        c._client.config_set("min-replicas-to-write", 1)
        go.touch()
        eventually(lambda: "out of reach" in str(c.logs()), "the worker can't store its result")
        eventually(lambda: "can't write" in caplog.text, "nor can the manager")
        c._client.config_set("min-replicas-to-write", 0)
        assert result.get(timeout=30) == "done"
        assert add.delay(1, 1).get(timeout=30) == 2
        assert c.state is State.READY
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["start", "end"]
