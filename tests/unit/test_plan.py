"""Bad input is refused with what to do about it, before anything is started."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from celery import Celery

import cluster
from cluster import manager
from cluster.broker.server import bundled_server
from cluster.launchers import base
from cluster.launchers.local import LocalLauncher, LocalOptions
from cluster.model import Finding, Severity
from cluster.wire import identity

app = Celery("planned")


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch):
    """Starting a broker would be too late for any of these."""

    def started(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr(manager, "Broker", started)


def test_in_a_worker_it_is_refused(monkeypatch):
    monkeypatch.setattr(identity, "_node", "n1@h")
    with pytest.raises(cluster.StateError, match="inside a worker.*__main__"):
        cluster.start(1, app=app)


class Picky(LocalLauncher):
    """A launcher whose preflight has something to say."""

    def __init__(self, severity: Severity) -> None:
        super().__init__()
        self.severity = severity

    def preflight(self, wanted, minimum):
        return [Finding(self.severity, f"{wanted} of them, at least {minimum}")]


def test_a_preflight_may_refuse_or_warn():
    with pytest.raises(cluster.ConfigurationError, match="3 of them, at least 2"):
        cluster.start(3, minimum=2, app=app, launcher=Picky(Severity.REFUSE))
    with (
        pytest.warns(RuntimeWarning, match="3 of them") as warned,
        pytest.raises(AssertionError, match="something was started"),
    ):
        cluster.start(3, app=app, launcher=Picky(Severity.WARN))
    assert warned[0].filename == __file__, "it points at the caller"


class Elsewhere(LocalLauncher):
    """Its workers aren't on this machine."""

    defaults = dataclasses.replace(LocalLauncher.defaults, tls=True)


def test_a_server_without_tls_is_refused_where_workers_are_elsewhere(monkeypatch):
    monkeypatch.setenv("CLUSTER_BROKER_SERVER", str(bundled_server()))
    with pytest.raises(cluster.ConfigurationError, match="it speaks no TLS"):
        cluster.start(1, app=app, launcher=Elsewhere())


def test_many_more_tasks_than_cpus_are_warned_of():
    [finding] = LocalLauncher(LocalOptions(concurrency=1000)).preflight(1, 1)
    assert finding.severity is Severity.WARN
    assert LocalLauncher().preflight(1, 1) == []


# -- which launcher ------------------------------------------------------------------


def test_without_a_sign_it_is_local():
    assert base.detect({}, "") == "local"


def test_the_users_choice_comes_first():
    assert base.detect({"AWS_BATCH_JOB_ID": "j"}, "local") == "local"


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"AWS_BATCH_JOB_ID": "j"}, "batch"),
        ({"AWS_BATCH_JOB_ID": "j", "AWS_BATCH_JOB_NUM_NODES": "2"}, "multinode"),
        ({"ECS_CONTAINER_METADATA_URI_V4": "http://x"}, "ecs"),
        ({"AWS_BATCH_JOB_ID": "j", "ECS_CONTAINER_METADATA_URI_V4": "http://x"}, "batch"),
    ],
)
def test_what_a_platform_sets_is_a_sign(environment, name, monkeypatch):
    with pytest.raises(cluster.ConfigurationError, match=f"'{name}'.*Available: .*local"):
        base.detect(environment, "")
    monkeypatch.setattr(base, "available", lambda: {name: None})
    assert base.detect(environment, "") == name


def test_the_installed_launchers_are_launchers():
    for name, point in base.available().items():
        made = base.make(name, {})
        assert isinstance(made, base.Launcher)
        assert made.name == name == point.name


def test_a_mistyped_argument_of_start_is_recognised():
    arguments = [*inspect.signature(manager.start).parameters][:-1]
    assert list(base.START_ARGUMENTS) == arguments
    with pytest.raises(cluster.ConfigurationError, match="did you mean 'minimum'"):
        cluster.start(1, app=app, minimun=1)
