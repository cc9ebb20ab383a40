"""The Docker engine as the launcher needs it: what it says, in our words.

Pure but for :func:`connect`. What the engine's answers hold:
https://docs.docker.com/reference/api/engine/version/v1.41/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigurationError
from cluster.model import Phase, WorkerStatus
from cluster.wire.exitcodes import HOPELESS, ExitCode, explain

if TYPE_CHECKING:
    import docker

#: Seconds for one answer of the engine's.
TIMEOUT = 30

#: Connections to it that are kept: one for each worker whose output is followed, and some.
CONNECTIONS = 100

#: Of what the engine says of a container: created, running, paused, restarting, removing, exited,
#: dead.
PENDING = frozenset({"created"})
ENDED = frozenset({"exited", "dead", "removing"})

#: A shell's way to say that a signal ended a program, which the container's init follows.
SIGNALLED = 128
SIGKILLED = SIGNALLED + 9

#: The init's, as a shell's: a command that can't be run, or isn't there.
NO_COMMAND = frozenset({126, 127})


def connect() -> docker.DockerClient:
    """The engine that ``DOCKER_HOST`` names, or this machine's.

    Raises:
        ConfigurationError: there is none, or not for us; with what to do.
    """
    try:
        import docker
    except ImportError as error:
        raise ConfigurationError(
            "The launcher 'docker' needs Docker's Python package: pip install "
            "'celery-cluster[docker]'."
        ) from error
    try:
        client = docker.from_env(timeout=TIMEOUT, max_pool_size=CONNECTIONS)
        client.ping()
    except docker.errors.DockerException as error:
        raise ConfigurationError(_why_unreachable(str(error))) from error
    except OSError as error:  # requests' errors are
        raise ConfigurationError(_why_unreachable(str(error))) from error
    return client


def _why_unreachable(said: str) -> str:
    if "PermissionError" in said or "Permission denied" in said:
        return (
            "The Docker engine is there, but this user may not use it. Add him to the group docker "
            "(and log in again), or run this as root."
        )
    return (
        f"No Docker engine answers ({said}). Start it, or say where it is by DOCKER_HOST; in a "
        "container, mount the host's socket: -v /var/run/docker.sock:/var/run/docker.sock."
    )


def status(attributes: Mapping[str, Any]) -> WorkerStatus:
    """How a worker is, by what the engine says of its container when inspected."""
    state = attributes["State"]
    if state["Status"] not in ENDED:
        phase = Phase.PENDING if state["Status"] in PENDING else Phase.RUNNING
        return WorkerStatus(phase, reason=f"container {attributes['Id'][:12]} {state['Status']}")
    code = int(state["ExitCode"])
    if code == ExitCode.LEFT and not state["Error"]:
        return WorkerStatus(Phase.EXITED, final=True, reason=explain(code), exit_code=code)
    return WorkerStatus(
        Phase.FAILED,
        final=True,
        retryable=code not in {*HOPELESS, *NO_COMMAND},
        reason=state["Error"] or _reason(code, attributes),
        exit_code=code,
    )


def _reason(code: int, attributes: Mapping[str, Any]) -> str:
    if code in NO_COMMAND:
        return (
            "its image has no program 'cluster' that can be run: install celery-cluster in it, the "
            "same version as here"
        )
    # The flag is also set when a child was killed for memory and the worker went on.
    if code == SIGKILLED and attributes["State"]["OOMKilled"]:
        limit = attributes["HostConfig"]["Memory"]
        most = f"its limit of {limit // 2**20} MiB" if limit else "the machine's memory"
        return f"killed for want of memory: it used up {most}. Give it more: memory=…"
    return explain(SIGNALLED - code if code > SIGNALLED else code)


def image_of(attributes: Mapping[str, Any]) -> str:
    """The image that an inspected container was made from, by its id: a tag may have moved on."""
    image: str = attributes["Image"]
    return image


def address_in(network: str, attributes: Mapping[str, Any]) -> str:
    """The IPv4 address of an inspected container in a network, or an empty string."""
    joined = attributes["NetworkSettings"]["Networks"].get(network) or {}
    return joined.get("IPAddress") or ""


def gateway_of(attributes: Mapping[str, Any]) -> str:
    """The IPv4 address of an inspected bridge network's gateway, which is the engine's machine's;
    or an empty string."""
    pools: Iterable[Mapping[str, str]] = attributes["IPAM"]["Config"] or ()
    for pool in pools:
        gateway = pool.get("Gateway", "")
        if "." in gateway:
            return gateway.partition("/")[0]
    return ""
