"""What a cluster has in a Docker engine, how it is known there, and how it is removed."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.launchers.container import own_id

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

logger = logging.getLogger("cluster")

#: Labels of a cluster's containers and network: whose, which worker's, and who must be there for
#: them to be of any use (:func:`manager_label`).
CLUSTER = "celery-cluster.cluster"
WORKER = "celery-cluster.worker"
MANAGER = "celery-cluster.manager"

#: Seconds by which the same process may seem to have begun at another time: a clock may be set.
CLOCK_SET = 60.0

#: Containers that are removed at the same time.
AT_ONCE = 8


def own_container(client: docker.DockerClient) -> Container | None:
    """The container that this process runs in, if it is one of this engine's."""
    import docker

    own = own_id()
    if not own:
        return None
    try:
        return client.containers.get(own)
    except docker.errors.NotFound:
        return None


def manager_label(me: Container | None) -> str:
    """What tells whether the manager is still there: its container, or on the host its process."""
    if me is not None:
        return f"container:{me.id}"
    # A process id says little elsewhere than in the same namespace.
    space = Path("/proc/self/ns/pid")
    process = psutil.Process()
    where = space.readlink() if space.exists() else "host"
    return f"process:{where}:{process.pid}:{process.create_time()}"


def is_gone(manager: str, running: Callable[[str], bool]) -> bool:
    """Whether it certainly is.

    Args:
        manager: from :func:`manager_label`.
        running: whether a container of this id runs.
    """
    kind, _, rest = manager.partition(":")
    if kind == "container":
        return not running(rest)
    match = re.fullmatch(r"(.*):(\d+):([\d.]+)", rest)
    if kind != "process" or match is None:
        return False
    where, pid, created = match.groups()
    if not manager_label(None).startswith(f"process:{where}:"):
        return False  # it can't be seen from here
    try:
        began = psutil.Process(int(pid)).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(began - float(created)) > CLOCK_SET


def sweep(client: docker.DockerClient) -> None:
    """Remove what managers have left that are gone. Its workers end by themselves."""
    running = {container["Id"] for container in client.api.containers()}
    found = [
        *(container["Labels"] for container in client.api.containers(all=True, filters=_LABELLED)),
        *(network["Labels"] for network in client.api.networks(filters=_LABELLED)),
    ]
    gone = {
        labels[CLUSTER]
        for labels in found
        if is_gone(labels.get(MANAGER, ""), running.__contains__)
    }
    for cluster_id in gone:
        remove_all(client, cluster_id)
        logger.warning(
            "A manager had crashed. What was left of its cluster %s in the Docker engine has been "
            "removed.",
            cluster_id,
        )


_LABELLED: dict[str, str | list[str] | bool] = {"label": CLUSTER}


def remove_all(client: docker.DockerClient, cluster_id: str) -> None:
    """A cluster's containers and network; what is gone already is no mistake."""
    import docker

    labelled: dict[str, str | list[str] | bool] = {"label": f"{CLUSTER}={cluster_id}"}

    def remove(container: Container) -> None:
        with contextlib.suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)

    containers = client.containers.list(all=True, filters=labelled, ignore_removed=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(remove, containers))
    for network in client.networks.list(filters=labelled):
        with contextlib.suppress(docker.errors.NotFound):
            network.remove()
