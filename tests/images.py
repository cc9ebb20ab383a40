"""Docker, and the image that tests run in containers."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
import pytest

from cluster.errors import ConfigurationError
from cluster.launchers import engine
from cluster.launchers.belongings import CLUSTER

#: What ``make image`` has made, and what is made of it here.
BASE = os.environ.get("CLUSTER_TEST_IMAGE", "celery-cluster")
TAG = "celery-cluster-tests"

HERE = Path(__file__).parent


@contextlib.contextmanager
def engine_or_skip() -> Iterator[docker.DockerClient]:
    try:
        client = engine.connect()
    except ConfigurationError as error:
        if os.environ.get("CI"):
            pytest.fail(f"no Docker in CI: {error}")
        pytest.skip(str(error))
    with contextlib.closing(client):
        yield client


def built(
    client: docker.DockerClient,
    tag: str,
    *lines: str,
    base: str = BASE,
    files: Mapping[str, str] | None = None,
) -> str:
    """An image of this name: the tests' modules, other files and lines on top of a base."""
    made = {"Dockerfile": "\n".join([f"FROM {base}", "COPY *.py ./", *lines]), **(files or {})}
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for name, text in made.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
        for path in HERE.glob("*.py"):
            tar.add(path, path.name)
    context.seek(0)
    try:
        client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True)
    except docker.errors.BuildError as error:
        pytest.fail(f"{tag} can't be built: {error}")
    return tag


def of_tests(client: docker.DockerClient) -> str:
    """The tests' image; xdist's processes make the same one, which the engine caches."""
    return built(client, TAG)


def left(client: docker.DockerClient) -> list[str]:
    """Names of what clusters have left in the engine."""
    filters = {"label": CLUSTER}
    containers = client.containers.list(all=True, filters=filters, ignore_removed=True)
    return [one.name for one in (*containers, *client.networks.list(filters=filters))]
