"""A broker that workers reach over a network: TLS, one secret, and a user of their own.

The workers are local processes, and reach it at an address that isn't loopback.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from sampleapp import add, app, wait_for, where

import cluster
from cluster.broker.server import KEY, find_server
from cluster.launchers.local import LocalLauncher
from cluster.model import Endpoint, Reach
from cluster.wire.client import connect
from cluster.wire.secret import WORKER, new_secret, password
from cluster.wire.tls import authority

#: Seconds for a result, and for a program.
SOON = 30


def own_address() -> str:
    """One of this machine's that isn't loopback."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family is socket.AF_INET:
                address = ipaddress.ip_address(one.address)
                if not address.is_loopback and not address.is_link_local:
                    return one.address
    pytest.fail("this machine has no network interface")


class Elsewhere(LocalLauncher):
    """Local processes that reach the broker as others would."""

    defaults = dataclasses.replace(LocalLauncher.defaults, tls=True)

    def reach(self, cluster_id: str) -> Reach:
        return Reach(own_address())


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others are to use: the bundled server speaks no TLS."""
    monkeypatch.delenv("CLUSTER_BROKER_SERVER", raising=False)


@pytest.fixture
def running(capable: None) -> Iterator[cluster.Cluster]:
    with cluster.start(2, app=app, launcher=Elsewhere(), progress=False) as c:
        yield c


@pytest.fixture
def endpoint(running: cluster.Cluster) -> Endpoint:
    found = running._broker.endpoint
    assert found.tls
    return found


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_tasks_run_and_survive_their_worker_and_the_broker(
    running: cluster.Cluster, tmp_path: Path, eventually
):
    assert [add.delay(i, i).get(timeout=SOON) for i in range(20)] == [2 * i for i in range(20)]
    large = "x" * 1_000_000
    assert add.delay(large, "y").get(timeout=SOON) == large + "y"
    log, go = tmp_path / "log", tmp_path / "go"
    result = wait_for.delay(str(go), str(log))
    eventually(lambda: lines(log), "the task runs")
    os.kill(int(lines(log)[0].split()[2]), signal.SIGKILL)
    eventually(lambda: len(lines(log)) == 2, "it runs elsewhere")
    running._broker._server_process.kill()
    go.touch()
    assert result.get(timeout=SOON) == "done"
    assert add.delay(1, 2).get(timeout=SOON) == 3
    assert [line.split()[0] for line in lines(log)] == ["start", "start", "end"]


def test_nobody_connects_without_the_secret(endpoint: Endpoint):
    connect(endpoint, SOON).ping()
    other = dataclasses.replace(endpoint, secret=new_secret())
    with pytest.raises(redis.exceptions.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        connect(other, SOON).ping()
    with pytest.raises(redis.exceptions.ConnectionError):
        redis.Redis(endpoint.host, endpoint.port, password=password(endpoint.secret)).ping()
    verified = {"ssl": True, "ssl_ca_data": authority(endpoint.secret)}
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(endpoint.host, endpoint.port, **verified).ping()
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(endpoint.host, endpoint.port, password=new_secret(), **verified).ping()


def test_a_worker_may_run_tasks_and_not_the_broker(endpoint: Endpoint):
    client = connect(dataclasses.replace(endpoint, user=WORKER), SOON)
    assert client.ping()
    for command in (
        ("CONFIG", "GET", "requirepass"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("MONITOR",),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("SHUTDOWN", "NOSAVE"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


def test_what_a_task_sees_is_its_workers_user(running: cluster.Cluster, endpoint: Endpoint):
    where.delay().get(timeout=SOON)
    users = {client["user"] for client in connect(endpoint, SOON).client_list()}
    assert users == {"default", WORKER}
    named = {
        client["user"]
        for client in connect(endpoint, SOON).client_list()
        if client["name"] in running.workers
    }
    assert named == {WORKER}


def run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=SOON, check=False
    )


def test_other_programs_verify_it_as_well(endpoint: Endpoint, tmp_path: Path):
    ca = tmp_path / "ca.pem"
    ca.write_text(authority(endpoint.secret))
    address = ("-connect", endpoint.address, "-verify_return_error", "-verify_ip", endpoint.host)
    shown = run("openssl", "s_client", "-CAfile", str(ca), "-x509_strict", *address)
    assert "Verification: OK" in shown.stdout, shown.stderr
    assert "TLSv1.3" in shown.stdout
    ca.write_text(authority(new_secret()))
    assert run("openssl", "s_client", "-CAfile", str(ca), *address).returncode != 0


def test_redis_cli_with_the_right_words_and_others(endpoint: Endpoint, tmp_path: Path):
    ca = tmp_path / "ca.pem"
    ca.write_text(authority(endpoint.secret))
    to = ("redis-cli", "-h", endpoint.host, "-p", str(endpoint.port))
    word = f"AUTH {password(endpoint.secret)}\nPING\n"
    assert run(*to, "--tls", "--cacert", str(ca), given=word).stdout.split() == ["OK", "PONG"]
    assert "NOAUTH" in run(*to, "--tls", "--cacert", str(ca), given="PING\n").stdout
    assert "PONG" not in run(*to, given=word).stdout
    ca.write_text(authority(new_secret()))
    refused = run(*to, "--tls", "--cacert", str(ca), given=word)
    assert "PONG" not in refused.stdout and "certificate verify failed" in refused.stderr


def test_a_stock_celery_worker_joins_with_the_url_and_the_authority(
    endpoint: Endpoint, tmp_path: Path, eventually
):
    """It takes from the queues as any other does; its own word is all it has for its safety."""
    ca = tmp_path / "ca.pem"
    ca.write_text(authority(endpoint.secret))
    script = tmp_path / "stock.py"
    user = f"{WORKER}:{password(endpoint.secret, WORKER)}"
    url = f"rediss://{user}@{endpoint.address}/0?ssl_cert_reqs=required&ssl_ca_certs={ca}"
    script.write_text(
        "from celery import Celery\n"
        f"app = Celery('stock', broker='{url}', backend='{url}')\n"
        "app.conf.task_default_queue = 'stock'\n"
        "@app.task(name='stock.add')\n"
        "def add(x, y):\n"
        "    return x + y\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "stock", "worker", "-c", "1", "--without-mingle"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as worker:
        try:
            result = app.send_task("stock.add", (20, 22), queue="stock")
            assert result.get(timeout=SOON) == 42
        finally:
            worker.terminate()


def test_the_secret_is_nowhere_to_be_seen(
    running: cluster.Cluster, endpoint: Endpoint, tmp_path: Path
):
    words = {endpoint.secret, password(endpoint.secret), password(endpoint.secret, WORKER)}
    shown = [repr(running), repr(endpoint), str(running.status()), str(running.logs())]
    for process in psutil.Process().children(recursive=True):
        with_arguments = " ".join(process.cmdline())
        shown.append(with_arguments)
    directory = running._directory.path
    shown += [path.read_text() for path in directory.rglob("*.log")]
    assert (directory / KEY).stat().st_mode & 0o077 == 0
    assert not [word for word in words for text in shown if word in text]


def test_the_server_that_is_found_speaks_tls():
    assert find_server(tls=True).path
