"""What every launcher keeps to. One suite; a new launcher adds itself to ``LAUNCHERS``.

The workers are real and so is the broker that they join.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sampleapp
from pydantic import BaseModel
from tools import Traces, wait_until

import cluster
from cluster import __version__
from cluster.appref import AppRef, locate
from cluster.broker.broker import Broker
from cluster.broker.server import find_server
from cluster.launchers.base import Launcher, make
from cluster.model import LauncherDefaults, Limits, Phase, WorkerRef, WorkerSpec
from cluster.wire import keys
from cluster.wire.client import connect
from cluster.wire.registration import announce_over, decode
from cluster.wire.secret import new_secret

LAUNCHERS = ("local", pytest.param("docker", marks=pytest.mark.docker))

#: The cluster's.
ID = "c0ffee"


@pytest.fixture
def options(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """What this launcher can't do without."""
    return {"image": request.getfixturevalue("image")} if name == "docker" else {}


@pytest.fixture(params=LAUNCHERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def launcher(name: str, options: dict[str, Any], nothing_left: Traces) -> Launcher:
    return make(name, options)


@pytest.fixture
def directory(nothing_left: Traces) -> Iterator[Path]:
    """The run's."""
    made = Path(tempfile.mkdtemp(prefix="contract-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def before(directory: Path) -> WorkerSpec:
    """What is known before there is a broker."""
    return WorkerSpec(
        cluster_id=ID,
        workers=2,
        directory=directory,
        environment={
            "CLUSTER_ID": ID,
            "CLUSTER_APP": locate(sampleapp.app).to_json(),
            "CLUSTER_VERSION": __version__,
        },
    )


@pytest.fixture
def broker(launcher: Launcher, before: WorkerSpec) -> Iterator[Broker]:
    """Where this launcher's workers reach it."""
    tls = launcher.defaults.tls
    launcher.prepare(before)
    try:
        started = Broker(
            find_server("" if tls else os.environ.get("CLUSTER_BROKER_SERVER", ""), tls=tls),
            host=launcher.reach(ID).host,
            secret=new_secret(),
            directory=before.directory,
            cluster_id=ID,
            workers=4,
            limits=Limits(10.0, 30.0, 3, 2**30, 2**20),
            on_event=lambda _: None,
        )
        started.wait()
        assert started.endpoint.tls == tls, "in the clear on loopback only"
        yield started
        started.stop()
    finally:
        launcher.close(ID)


@pytest.fixture
def client(broker: Broker) -> Iterator[redis.Redis]:
    with connect(broker.endpoint, 5.0) as made:
        yield made


@pytest.fixture
def spec_for(before: WorkerSpec, broker: Broker) -> Callable[[AppRef], WorkerSpec]:
    def make_spec(ref: AppRef) -> WorkerSpec:
        known = {
            "CLUSTER_ADDRESS": broker.endpoint.address,
            "CLUSTER_SECRET": broker.endpoint.secret,
            "CLUSTER_APP": ref.to_json(),
        }
        return dataclasses.replace(before, environment={**before.environment, **known})

    return make_spec


@pytest.fixture
def spec(spec_for: Callable[[AppRef], WorkerSpec]) -> WorkerSpec:
    return spec_for(locate(sampleapp.app))


@pytest.fixture
def ended(launcher: Launcher, spec: WorkerSpec) -> Iterator[list[WorkerRef]]:
    """Refs put in here are ended after the test, however that ends."""
    refs: list[WorkerRef] = []
    yield refs
    launcher.terminate(refs, reason="the test is over")


def final(launcher: Launcher, refs: list[WorkerRef]) -> bool:
    return all(status.final for status in launcher.describe(refs).values())


def test_it_says_what_it_is(launcher: Launcher):
    assert isinstance(launcher, Launcher)
    assert isinstance(launcher.defaults, LauncherDefaults)
    assert launcher.defaults.timeout > 0
    assert issubclass(launcher.options, BaseModel)


def test_unknown_options_are_refused(launcher: Launcher, options: dict[str, Any]):
    with pytest.raises(cluster.ConfigurationError, match="no option 'no_such_option'"):
        make(launcher.name, {**options, "no_such_option": 1})


def test_what_it_never_launched_is_missing(launcher: Launcher):
    stranger = WorkerRef("no-such-worker", launcher.name)
    [(ref, status)] = launcher.describe([stranger]).items()
    assert (ref, status.phase, status.final) == (stranger, Phase.MISSING, True)
    assert status.reason
    assert launcher.find("no-such-cluster") == []
    assert list(launcher.logs(stranger)) == []
    launcher.terminate([stranger], reason="it doesn't exist")
    assert launcher.describe([]) == {}


def test_nothing_to_launch_is_nothing(launcher: Launcher, spec: WorkerSpec):
    assert list(launcher.launch(spec, 0)) == []


def test_workers_from_launch_to_leave(
    launcher: Launcher, spec: WorkerSpec, client: redis.Redis, ended: list[WorkerRef]
):
    """They register under the id that launch gave out, and end with code 0 when told."""
    refs = list(launcher.launch(spec, 2))
    ended += refs
    assert len(set(refs)) == 2
    assert {ref.launcher for ref in refs} == {launcher.name}
    assert set(launcher.find(spec.cluster_id)) == set(refs)
    assert list(launcher.find("another cluster")) == []
    wait_until(lambda: client.llen(keys.JOINED) == 2, "both have joined")
    registrations = [decode(entry) for entry in client.lrange(keys.JOINED, 0, -1)]
    assert {registration.worker for registration in registrations} == {ref.id for ref in refs}
    assert len({registration.node for registration in registrations}) == 2
    statuses = launcher.describe(refs)
    assert list(statuses) == refs
    for status in statuses.values():
        assert (status.phase, status.final) == (Phase.RUNNING, False)
    announce_over(client, 0)
    wait_until(lambda: final(launcher, refs), "both have left")
    for status in launcher.describe(refs).values():
        assert (status.phase, status.exit_code) == (Phase.EXITED, 0)
    assert list(launcher.find(spec.cluster_id)) == []


def test_what_was_prepared_is_let_go_of_whether_used_or_not(launcher: Launcher, before: WorkerSpec):
    """Before there is a broker; closing twice, or what was never prepared, does no harm."""
    launcher.prepare(before)
    launcher.close(before.cluster_id)
    launcher.close(before.cluster_id)
    launcher.close("no-such-cluster")


def test_terminate_ends_workers_in_any_state(
    launcher: Launcher, spec: WorkerSpec, client: redis.Redis, ended: list[WorkerRef]
):
    """One that is up, one that has only just been asked for; twice does no harm."""
    up = list(launcher.launch(spec, 1))
    ended += up
    wait_until(lambda: client.llen(keys.JOINED) == 1, "it has joined")
    refs = up + list(launcher.launch(spec, 1))
    ended += refs
    launcher.terminate(refs, reason="enough")
    wait_until(lambda: final(launcher, refs), "they are ended")
    launcher.terminate(refs, reason="once more")
    assert list(launcher.find(spec.cluster_id)) == []
    assert all(status.final and status.reason for status in launcher.describe(refs).values())


def test_workers_of_a_manager_that_is_gone_are_found_and_ended(
    launcher: Launcher,
    options: dict[str, Any],
    spec: WorkerSpec,
    client: redis.Redis,
    ended: list[WorkerRef],
):
    """By a launcher that has launched none of them: that of the next manager."""
    refs = list(launcher.launch(spec, 2))
    ended += refs
    wait_until(lambda: client.llen(keys.JOINED) == 2, "both have joined")
    successor = make(launcher.name, options)
    found = list(successor.find(spec.cluster_id))
    assert set(found) == set(refs)
    assert list(successor.find("another cluster")) == []
    assert not final(successor, found)
    assert all(successor.logs(ref) == launcher.logs(ref) for ref in refs)
    successor.terminate(found, reason="their manager is gone")
    wait_until(lambda: final(launcher, refs) and final(successor, found), "they are ended")
    assert list(successor.find(spec.cluster_id)) == []
    successor.close(spec.cluster_id)


def test_a_worker_that_cannot_import_its_app_says_so(
    launcher: Launcher, spec_for: Callable[[AppRef], WorkerSpec], ended: list[WorkerRef]
):
    """A status that tells that another one would end alike, and a log with the traceback."""
    refs = list(launcher.launch(spec_for(AppRef("no_such_module", "app")), 1))
    ended += refs
    wait_until(lambda: final(launcher, refs), "it has ended")
    [status] = launcher.describe(refs).values()
    assert (status.phase, status.exit_code, status.retryable) == (Phase.FAILED, 84, False)
    assert "can't be imported" in status.reason
    lines = list(launcher.logs(refs[0], tail=5))
    assert len(lines) <= 5
    assert any("No module named 'no_such_module'" in line for line in lines)


def test_a_worker_of_another_version_ends_at_once(
    launcher: Launcher, spec: WorkerSpec, ended: list[WorkerRef]
):
    environment = {**spec.environment, "CLUSTER_VERSION": "0.0.0"}
    other = dataclasses.replace(spec, environment=environment)
    refs = list(launcher.launch(other, 1))
    ended += refs
    wait_until(lambda: final(launcher, refs), "it has ended")
    [status] = launcher.describe(refs).values()
    assert (status.exit_code, status.retryable) == (85, False)
    assert any("its manager 0.0.0" in line for line in launcher.logs(refs[0]))
