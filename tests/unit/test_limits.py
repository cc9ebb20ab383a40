"""How much memory there is, and what that means for the broker."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

import cluster
from cluster import settings
from cluster.broker.memory import available
from cluster.plan import _limits

TOTAL = psutil.virtual_memory().total


@pytest.fixture
def groups(tmp_path: Path):
    """A tree of control groups, and who is in which."""

    def make(membership: str, **files: str) -> tuple[Path, Path]:
        memberships = tmp_path / "cgroup"
        memberships.write_text(membership)
        for name, text in files.items():
            file = tmp_path / "fs" / name.replace("__", "/").replace("_DOT_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return memberships, tmp_path / "fs"

    return make


def test_the_least_limit_of_all_groups_counts(groups):
    at = groups(
        "0::/user/job\n",
        user__memory_DOT_max=f"{2**30}\n",
        user__job__memory_DOT_max=f"{2**31}\n",
    )
    assert available(*at) == 2**30


def test_no_limit_is_the_machines_memory(groups):
    assert available(*groups("0::/\n", memory_DOT_max="max\n")) == TOTAL
    assert available(*groups("0::/gone\n")) == TOTAL
    assert available(Path("/no/such/file"), Path("/nowhere")) == TOTAL


def test_a_container_sees_its_own_group_as_the_root(groups):
    """And the first version of control groups has another place for each controller."""
    at = groups("0::/../../docker/abc\n", memory_DOT_max=f"{2**29}\n")
    assert available(*at) == 2**29
    at = groups(
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
        memory__memory_DOT_limit_in_bytes=f"{2**28}\n",
    )
    assert available(*at) == 2**28


def limits(**environment: str):
    return _limits(settings.manager_settings(environment))


def test_the_broker_gets_half_of_what_there_is():
    found = limits()
    assert found.broker_memory == available() // 2
    assert found.message_limit == settings.MESSAGE_LIMIT
    assert (found.liveness_timeout, found.orphan_timeout, found.max_deliveries) == (10, 30, 3)


def test_what_the_user_sets_counts_within_reason():
    found = limits(CLUSTER_BROKER_MEMORY="64MiB")
    assert (found.broker_memory, found.message_limit) == (2**26, 2**24)
    found = limits(CLUSTER_BROKER_MEMORY="4GiB", CLUSTER_MESSAGE_LIMIT="512MiB")
    assert (found.broker_memory, found.message_limit) == (2**32, 2**29)
    with pytest.raises(cluster.ConfigurationError, match="a quarter"):
        limits(CLUSTER_BROKER_MEMORY="64MiB", CLUSTER_MESSAGE_LIMIT="17MiB")
