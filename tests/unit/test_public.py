"""What the package shows to the world, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cluster
from cluster import errors


def test_the_public_names_are_these():
    assert sorted(cluster.__all__) == [
        "BrokerError",
        "BrokerFull",
        "BrokerLost",
        "BrokerStartError",
        "Cluster",
        "ClusterError",
        "ConfigurationError",
        "LaunchError",
        "MessageTooLarge",
        "StateError",
        "VersionMismatch",
        "WorkerLost",
        "WorkersNotReady",
        "__version__",
        "start",
    ]
    assert all(getattr(cluster, name) is not None for name in cluster.__all__)
    assert dir(cluster) == sorted(cluster.__all__)


def test_every_error_is_a_cluster_error_and_in_the_docstring():
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, cluster.ClusterError)
        assert name in (errors.__doc__ or "")
    assert issubclass(cluster.ConfigurationError, ValueError)
    assert issubclass(cluster.StateError, RuntimeError)
    assert issubclass(cluster.WorkersNotReady, TimeoutError)


def test_importing_it_is_light():
    """No cloud, no container, no terminal library, not even Celery, until they are used."""
    heavy = "boto3", "docker", "celery", "redis", "pydantic", "rich", "typer"
    code = f"import sys, cluster; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_starting_loads_no_cloud_library():
    code = (
        "import sys, cluster; cluster.start; print('boto3' in sys.modules, 'docker' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        cluster.nothing  # noqa: B018


def test_an_error_shows_the_logs_it_carries():
    error = cluster.WorkersNotReady(
        "0 of 1 workers were ready.",
        ready=0,
        wanted=1,
        minimum=1,
        elapsed=1.0,
        statuses={},
        logs={"local-1": ["Traceback", "boom"], "local-2": []},
    )
    assert str(error).splitlines() == [
        "0 of 1 workers were ready.",
        "--- last lines of local-1 ---",
        "Traceback",
        "boom",
    ]
    assert str(cluster.BrokerStartError("no", log=["x"])).endswith("x")
