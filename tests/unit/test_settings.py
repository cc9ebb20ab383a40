"""What is read from the environment, and what is said when it can't be."""

from __future__ import annotations

import pytest

import cluster
from cluster import settings

WORKER = {
    "CLUSTER_ID": "c0ffee",
    "CLUSTER_ADDRESS": "127.0.0.1:7000",
    "CLUSTER_SECRET": "00",
    "CLUSTER_APP": '{"home": "tasks", "attribute": "app"}',
    "CLUSTER_VERSION": "1",
    "CLUSTER_WORKER": "w1",
}


def test_a_managers_settings():
    assert settings.manager_settings({}).launcher == ""
    read = settings.manager_settings({"CLUSTER_LAUNCHER": "local", "CLUSTER_BROKER_SERVER": "/x"})
    assert (read.launcher, read.broker_server) == ("local", "/x")


def test_a_workers_settings():
    read = settings.worker_settings({**WORKER, "CLUSTER_CONCURRENCY": "3"})
    assert (read.id, read.app["home"], read.concurrency, read.parent) == ("c0ffee", "tasks", 3, 0)


def test_what_is_missing_is_named():
    with pytest.raises(cluster.ConfigurationError, match="CLUSTER_APP, CLUSTER_ID.*cluster.start"):
        settings.worker_settings({"CLUSTER_ADDRESS": "x:1"})


@pytest.mark.parametrize("name", ["CLUSTER_CONCURRENCY", "CLUSTER_PARENT", "CLUSTER_APP"])
def test_what_is_unusable_is_said(name):
    with pytest.raises(cluster.ConfigurationError, match="can't be used"):
        settings.worker_settings({**WORKER, name: "many"})


def test_a_worker_takes_all_it_was_given_out_of_its_environment():
    fields = {f"CLUSTER_{field.name.upper()}" for field in settings.WorkerSettings.__attrs_attrs__}
    assert set(settings.WORKER_VARIABLES) == fields
