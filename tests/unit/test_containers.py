"""What a container is known by, and what the engine's words mean."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import cluster
from cluster.launchers import engine
from cluster.launchers.base import make
from cluster.launchers.belongings import is_gone, manager_label
from cluster.launchers.container import container_id, own_id
from cluster.model import Phase

ID = "0123456789abcdef" * 4
OTHER = "f" * 64

#: As the files read in each place; what differs is where the id is.
CGROUPS = {
    "Docker, cgroup v1": f"12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n",
    "Docker in a group of ours": f"4:memory:/mine/docker/{ID}\n0::/\n",
    "Docker under systemd": f"11:memory:/system.slice/docker-{ID}.scope\n",
    "ECS and Batch": f"9:perf_event:/ecs/4f1c0b2e8a9d4c55/{ID}\n",
    "a runner of GitHub's": f"3:cpu:/actions_job/{ID}\n",
}
MOUNTS = "".join(
    f"520 480 254:1 /var/lib/docker/containers/{ID}/{name} /etc/{name} rw,relatime - ext4 /x rw\n"
    for name in ("resolv.conf", "hostname", "hosts")
)


@pytest.mark.parametrize("cgroup", CGROUPS.values(), ids=CGROUPS)
def test_a_container_is_known_by_its_cgroup(cgroup: str):
    assert container_id(cgroup, "") == ID


def test_with_cgroup_v2_it_is_known_by_what_is_mounted_into_it():
    assert container_id("0::/\n", MOUNTS) == ID


def test_what_is_mounted_counts_more_than_the_group():
    """A container in a container sees the outer one's group as well."""
    assert container_id(f"3:cpu:/docker/{OTHER}\n", MOUNTS) == ID


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"),
    [
        ("0::/user.slice/user-1000.slice/session-3.scope\n", ""),
        ("0::/init.scope\n4:memory:/\n", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"),
        # The host sees the containers' directories, and isn't in them.
        ("0::/\n", f"9 1 0:5 / /var/lib/docker/containers/{ID}/mounts/shm rw - tmpfs shm rw\n"),
        ("", ""),
    ],
)
def test_outside_there_is_none(cgroup: str, mountinfo: str):
    assert container_id(cgroup, mountinfo) == ""


def test_where_there_is_no_proc_there_is_no_container(tmp_path: Path):
    assert own_id(tmp_path / "nothing") == ""


def inspected(status: str, code: int = 0, *, oom: bool = False, error: str = "") -> dict[str, Any]:
    return {
        "Id": ID,
        "State": {"Status": status, "ExitCode": code, "OOMKilled": oom, "Error": error},
        "HostConfig": {"Memory": 64 * 2**20},
    }


def test_states_are_what_is_to_be_made_of_them():
    assert engine.status(inspected("created")).phase is Phase.PENDING
    for running in ("running", "paused", "restarting"):
        status = engine.status(inspected(running))
        assert (status.phase, status.final) == (Phase.RUNNING, False)
        assert running in status.reason


@pytest.mark.parametrize(
    ("attributes", "phase", "retryable", "reason"),
    [
        (inspected("exited", 0), Phase.EXITED, True, "left when told to"),
        (inspected("exited", 81), Phase.FAILED, True, "told to leave by its platform"),
        (inspected("exited", 84), Phase.FAILED, False, "can't be imported"),
        (inspected("exited", 85), Phase.FAILED, False, "can't work with the manager"),
        (inspected("exited", 1), Phase.FAILED, True, "exit code 1"),
        (inspected("exited", 137), Phase.FAILED, True, "killed by SIGKILL"),
        (inspected("exited", 139), Phase.FAILED, True, "killed by SIGSEGV"),
        (inspected("exited", 137, oom=True), Phase.FAILED, True, "want of memory.*64 MiB"),
        (inspected("exited", 0, oom=True), Phase.EXITED, True, "left when told to"),
        (inspected("exited", 82, oom=True), Phase.FAILED, True, "manager or broker gone"),
        (inspected("dead", 0, error="no space"), Phase.FAILED, True, "no space"),
    ],
)
def test_ends_are_told_apart(attributes, phase, retryable, reason):
    status = engine.status(attributes)
    assert status.final
    assert (status.phase, status.retryable) == (phase, retryable)
    assert re.search(reason, status.reason)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "Error while fetching server API version: PermissionError(13, 'Permission denied')",
            "group",
        ),
        (
            "Error while fetching server API version: FileNotFoundError(2, 'No such file')",
            "Start it",
        ),
        ("Connection refused", "DOCKER_HOST"),
    ],
)
def test_an_engine_that_cannot_be_used_is_explained(said: str, message: str):
    assert message in engine._why_unreachable(said)


def test_without_dockers_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(cluster.ConfigurationError, match=r"pip install 'celery-cluster\[docker\]'"):
        make("docker", {"image": "x"}).preflight(1, 1)


def test_a_manager_is_gone_when_its_process_or_container_is():
    me = manager_label(None)
    assert not is_gone(me, lambda _: False)
    kind, where, pid, created = me.split(":", 1)[0], *me.split(":", 1)[1].rsplit(":", 2)
    child = psutil.Popen(["true"])
    child.wait()
    assert is_gone(f"{kind}:{where}:{child.pid}:{created}", lambda _: False)
    assert is_gone(f"{kind}:{where}:{pid}:{float(created) - 3600}", lambda _: False)
    assert not is_gone(f"{kind}:elsewhere:{child.pid}:{created}", lambda _: False)
    assert is_gone(f"container:{ID}", lambda _: False)
    assert not is_gone(f"container:{ID}", lambda running: running == ID)
    assert not is_gone("", lambda _: False), "nobody knows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, "image"),
        ({"name": "my cluster"}, "name"),
        ({"memory": "much"}, "memory"),
        ({"memory": 1000}, "no less than 6MiB"),
        ({"cpus": 0}, "cpus"),
        ({"volumes": {"/data": "data"}}, "no absolute path in the worker"),
        ({"volumes": {"./data": "/data"}}, "neither an absolute path nor a volume's name"),
        ({"gpus": 0}, "1 or more"),
        ({"gpus": "some"}, "gpus"),
        ({"network": ""}, "network"),
        ({"environment": {"CLUSTER_ID": "x"}}, "the cluster's own"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(cluster.ConfigurationError, match=message):
        make("docker", options)


def test_sizes_are_taken_as_people_write_them():
    for memory in ("2GiB", "2147483648", 2**31):
        assert make("docker", {"memory": memory})._options.memory == 2**31


def test_on_the_hosts_network_the_broker_is_on_loopback_and_needs_no_tls():
    assert make("docker", {"network": "host"}).defaults.tls is False
    assert make("docker", {}).defaults.tls is True
