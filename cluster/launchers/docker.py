"""Workers as containers of a Docker engine, each with an address of its own."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
from pydantic import BaseModel, ByteSize, Field, StringConstraints, field_validator

from cluster.errors import ConfigurationError, LaunchError
from cluster.launchers import engine
from cluster.launchers.belongings import (
    CLUSTER,
    MANAGER,
    WORKER,
    manager_label,
    own_container,
    remove_all,
    sweep,
)
from cluster.launchers.echo import Echo
from cluster.launchers.options import WorkerOptions
from cluster.model import (
    Finding,
    LauncherDefaults,
    Phase,
    Reach,
    Severity,
    WorkerRef,
    WorkerSpec,
    WorkerStatus,
)

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

logger = logging.getLogger("cluster")

#: What a worker's container runs.
COMMAND = ("cluster", "worker")

#: Seconds between SIGTERM and SIGKILL when a worker is ended; whole ones, for the engine.
TERM_GRACE = 1

#: Requests to the engine at the same time.
AT_ONCE = 8

#: Seconds between looks at the containers, which the engine takes some milliseconds for.
LOOK_EVERY = 0.25

#: Seconds for the threads that follow output to end with their containers.
FOLLOW_TIMEOUT = 2.0

#: Bytes that the engine keeps of a worker's output, in two files of which one may be empty.
LOG_AT_MOST = "32m"

#: The least that the engine takes for a limit:
#: https://docs.docker.com/engine/containers/resource_constraints/
MEMORY_AT_LEAST = 6 * 2**20

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$", max_length=40)]


class DockerOptions(WorkerOptions):
    """``cluster.start(4, launcher="docker", image="my-image", memory="2GiB")``."""

    image: str | None = Field(
        default=None, min_length=1, description="to run; default: that of the container we are in"
    )
    name: Name = Field(default="cluster", description="how the names of containers begin")
    memory: ByteSize | None = Field(default=None, description="of each worker, such as 2GiB")
    cpus: float | None = Field(default=None, gt=0, description="that each worker may use")
    volumes: dict[str, str] = Field(
        default={}, description="a path of the host, or a volume: where it is in the worker[:ro]"
    )
    gpus: int | Literal["all"] | None = Field(default=None, description="that each worker gets")
    network: str | None = Field(
        default=None,
        min_length=1,
        description='"host", or the name of a network; default: one made for the run',
    )

    @field_validator("memory", mode="before")
    @classmethod
    def _a_size(cls, memory: Any) -> Any:
        # Bytes as a number, and words as people write them, though the rest is strict.
        return str(memory) if isinstance(memory, int) and not isinstance(memory, bool) else memory

    @field_validator("memory")
    @classmethod
    def _enough(cls, memory: ByteSize | None) -> ByteSize | None:
        if memory is not None and memory < MEMORY_AT_LEAST:
            raise ValueError(f"{memory} bytes, and the engine takes no less than 6MiB")
        return memory

    @field_validator("gpus")
    @classmethod
    def _some(cls, gpus: int | str | None) -> int | str | None:
        if isinstance(gpus, int) and gpus < 1:
            raise ValueError(f'{gpus}: give 1 or more, or "all"')
        return gpus

    @field_validator("volumes")
    @classmethod
    def _absolute(cls, volumes: dict[str, str]) -> dict[str, str]:
        for source, target in volumes.items():
            if not target.startswith("/"):
                raise ValueError(f"{target!r} is no absolute path in the worker")
            if "/" in source and not source.startswith("/"):
                raise ValueError(f"{source!r} is neither an absolute path nor a volume's name")
        return volumes


@dataclass(slots=True)
class _Run:
    """What there is for one cluster."""

    client: docker.DockerClient
    image: str
    manager: str  # the label that says who that is
    network: str = "host"  # its name
    host: str = "127.0.0.1"  # where the broker is reached
    member: str = ""  # the container of ours that was connected to the network for the run
    echo: Echo | None = None
    followers: list[threading.Thread] = field(default_factory=list)


@dataclass(slots=True)
class _Worker:
    cluster_id: str
    container: str  # its id


class DockerLauncher:
    """Runs workers in containers, from a process outside or inside of one."""

    name = "docker"
    options: type[BaseModel] = DockerOptions

    def __init__(self, options: DockerOptions | None = None) -> None:
        self._options = options or DockerOptions()
        self._runs: dict[str, _Run] = {}  # by the cluster's id
        self._workers: dict[WorkerRef, _Worker] = {}
        self._statuses: dict[WorkerRef, WorkerStatus] = {}
        self._look_again_at = 0.0

    @property
    def defaults(self) -> LauncherDefaults:
        return LauncherDefaults(
            workers=None, timeout=60, resizable=True, launches=True, tls=not self._on_host
        )

    @property
    def _on_host(self) -> bool:
        return self._options.network == "host"

    # -- before anything starts ---------------------------------------------------------

    def preflight(self, wanted: int, minimum: int) -> Sequence[Finding]:
        with contextlib.closing(engine.connect()) as client:
            import docker  # which is there, if that has connected

            try:
                image = self._image(own_container(client))
                entry = client.images.get(image)
                total = client.info()["MemTotal"]
                if self._options.network and not self._on_host:
                    client.networks.get(self._options.network)
            except docker.errors.ImageNotFound:
                return [_refuse(f"The Docker engine has no image {image}. Build or pull it first.")]
            except docker.errors.NotFound:
                network = self._options.network
                return [_refuse(f"The Docker engine has no network {network!r}. Make it first.")]
            except ConfigurationError as error:
                return [_refuse(str(error))]
            except (docker.errors.DockerException, OSError) as error:
                return [_refuse(f"The Docker engine can't be used: {error}")]
        memory = self._options.memory or 0
        if wanted * memory > total:
            return [
                Finding(
                    Severity.WARN,
                    f"{wanted} workers with {memory // 2**20} MiB each are more than the engine's "
                    f"machine has ({total // 2**20} MiB): it may kill some.",
                )
            ]
        return [Finding(Severity.INFORM, f"The workers' image is {image} ({entry.short_id}).")]

    def _image(self, me: Container | None) -> str:
        if self._options.image is not None:
            return self._options.image
        if me is None:
            raise ConfigurationError(
                'Say which image the workers run: cluster.start(…, image="my-image"). There is no '
                "default, since this process runs in no container of the Docker engine."
            )
        return engine.image_of(me.attrs)

    def prepare(self, spec: WorkerSpec) -> None:
        client = engine.connect()
        with _explained("The workers' network can't be made"):
            me = own_container(client)
            run = _Run(client, self._image(me), manager_label(me))
            self._runs[spec.cluster_id] = run
            sweep(client)
            if not self._on_host:
                self._join_network(run, spec.cluster_id, me)
            elif me is not None and not _has_hosts_network(me):
                raise LaunchError(
                    'network="host" is for a manager on the host, or in a container that has the '
                    "host's network as well; this one has another."
                )
        if self._options.output:
            run.echo = Echo()

    def _join_network(self, run: _Run, cluster_id: str, me: Container | None) -> None:
        if self._options.network is None:
            run.network = f"{self._options.name}-{cluster_id}"
            labels = {CLUSTER: cluster_id, MANAGER: run.manager}
            run.client.networks.create(run.network, driver="bridge", labels=labels)
        else:
            run.network = self._options.network
        network = run.client.networks.get(run.network)
        if me is None or _has_hosts_network(me):
            run.host = engine.gateway_of(network.attrs)
            if run.host not in _own_addresses():
                raise LaunchError(
                    "This process isn't on the Docker engine's machine, where the workers could "
                    f"reach it: none of its addresses is {run.host or 'a gateway'}, that of the "
                    f"network {run.network}. Run it in a container of that engine, with the "
                    "engine's socket mounted."
                )
            return
        if not engine.address_in(run.network, me.attrs):
            network.connect(me)
            run.member = str(me.id)
            me.reload()
        run.host = engine.address_in(run.network, me.attrs)

    def reach(self, cluster_id: str) -> Reach:
        return Reach(self._runs[cluster_id].host)

    # -- workers ------------------------------------------------------------------------

    def launch(self, spec: WorkerSpec, count: int) -> Sequence[WorkerRef]:
        if count == 0:
            return []
        if spec.cluster_id not in self._runs:
            self.prepare(spec)
        run = self._runs[spec.cluster_id]
        refs = [WorkerRef(f"docker-{secrets.token_hex(3)}", self.name) for _ in range(count)]
        with ThreadPoolExecutor(min(count, AT_ONCE)) as pool:
            starts = {ref: pool.submit(self._start, run, spec, ref) for ref in refs}
        self._look_again_at = 0.0
        for ref in refs:
            if starts[ref].exception() is None:
                self._follow(run, spec, ref)
        for ref in refs:
            error = starts[ref].exception()
            if error is not None:
                accepted = [one for one in refs if starts[one].exception() is None]
                if not isinstance(error, LaunchError):
                    raise error
                raise LaunchError(str(error), accepted=accepted)
        return refs

    def _start(self, run: _Run, spec: WorkerSpec, ref: WorkerRef) -> None:
        import docker

        program, *arguments = COMMAND
        with _explained("A worker's container can't be started"):
            container = run.client.containers.create(
                run.image,
                arguments,
                entrypoint=[program],  # an image's own might take the command for something else
                name=f"{self._options.name}-{spec.cluster_id}-{ref.id.rpartition('-')[2]}",
                init=True,
                detach=True,
                environment=dict(self._environment(spec, ref)),
                labels={CLUSTER: spec.cluster_id, WORKER: ref.id, MANAGER: run.manager},
                network=run.network,
                volumes=[":".join(pair) for pair in self._options.volumes.items()],
                log_config=docker.types.LogConfig(
                    type="json-file", config={"max-size": LOG_AT_MOST, "max-file": "2"}
                ),
                **self._limits(),
            )
            self._workers[ref] = _Worker(spec.cluster_id, str(container.id))
            try:
                container.start()
            except BaseException:
                del self._workers[ref]
                container.remove(force=True)
                raise

    def _limits(self) -> Mapping[str, Any]:
        limits: dict[str, Any] = {}
        if self._options.memory is not None:
            # Without swap: a worker that swaps is slow, and nobody sees why.
            limits |= {"mem_limit": self._options.memory, "memswap_limit": self._options.memory}
        if self._options.cpus is not None:
            limits["nano_cpus"] = round(self._options.cpus * 10**9)
        if self._options.gpus is not None:
            import docker

            count = -1 if self._options.gpus == "all" else self._options.gpus
            limits["device_requests"] = [
                docker.types.DeviceRequest(count=count, capabilities=[["gpu"]])
            ]
        return limits

    def _environment(self, spec: WorkerSpec, ref: WorkerRef) -> Mapping[str, str]:
        machine = (psutil.cpu_count() or 1) / max(1, spec.workers)
        threads = int((self._options.cpus or machine) / self._options.concurrency)
        return {
            **self._options.environment,
            **spec.environment,
            "CLUSTER_WORKER": ref.id,
            "CLUSTER_CONCURRENCY": str(self._options.concurrency),
            "CLUSTER_LOGLEVEL": self._options.loglevel,
            "CLUSTER_THREADS": str(max(1, threads)),
        }

    def _follow(self, run: _Run, spec: WorkerSpec, ref: WorkerRef) -> None:
        if run.echo is None:
            return
        log = spec.directory / f"{ref.id}.log"
        thread = threading.Thread(
            target=_copy_output,
            args=(run.client, self._workers[ref].container, log),
            name=f"cluster-output-{ref.id}",
            daemon=True,
        )
        run.followers.append(thread)
        thread.start()
        run.echo.follow(ref.id, log)

    def describe(self, refs: Sequence[WorkerRef]) -> Mapping[WorkerRef, WorkerStatus]:
        known = {ref for ref in refs if ref in self._workers}
        if not known <= self._statuses.keys() or time.monotonic() >= self._look_again_at:
            self._look(known)
        missing = WorkerStatus(Phase.MISSING, final=True, reason="no container of this launcher's")
        return {ref: self._statuses.get(ref, missing) for ref in refs}

    def _look(self, refs: Iterable[WorkerRef]) -> None:
        import docker

        self._look_again_at = time.monotonic() + LOOK_EVERY
        open_ = [ref for ref in refs if not self._is_final(ref)]
        try:
            listed = {
                container["Id"]: container["State"]
                for cluster_id in {self._workers[ref].cluster_id for ref in open_}
                for container in self._listed(cluster_id)
            }
            for ref in open_:
                self._statuses[ref] = self._status(ref, listed)
        except (docker.errors.DockerException, OSError) as error:
            # It may be restarted, and its containers with it. Who is dead the broker knows.
            reason = f"the Docker engine doesn't answer ({error})"
            for ref in open_:
                self._statuses[ref] = WorkerStatus(Phase.RUNNING, reason=reason)

    def _is_final(self, ref: WorkerRef) -> bool:
        return ref in self._statuses and self._statuses[ref].final

    def _listed(self, cluster_id: str) -> Sequence[Mapping[str, Any]]:
        with self._engine(cluster_id) as client:
            found: Sequence[Mapping[str, Any]] = client.api.containers(
                all=True, filters={"label": f"{CLUSTER}={cluster_id}"}
            )
            return found

    def _status(self, ref: WorkerRef, listed: Mapping[str, str]) -> WorkerStatus:
        import docker

        worker = self._workers[ref]
        state = listed.get(worker.container)
        if state == "running":
            reason = f"container {worker.container[:12]}"
            return WorkerStatus(Phase.RUNNING, reason=reason)
        try:
            with self._engine(worker.cluster_id) as client:
                return engine.status(client.api.inspect_container(worker.container))
        except docker.errors.NotFound:
            return WorkerStatus(Phase.MISSING, final=True, reason="its container has been removed")

    @contextlib.contextmanager
    def _engine(self, cluster_id: str) -> Iterator[docker.DockerClient]:
        """A client: the run's, or one for a moment where the run is another launcher's."""
        if cluster_id in self._runs:
            yield self._runs[cluster_id].client
            return
        with contextlib.closing(engine.connect()) as client:
            yield client

    def terminate(self, refs: Sequence[WorkerRef], *, reason: str) -> None:
        known = [self._workers[ref] for ref in refs if ref in self._workers]
        if not known:
            return
        self._each(known, _end)
        self._look_again_at = 0.0

    def _each(self, workers: Sequence[_Worker], act: Callable[[Container], None]) -> None:
        import docker

        def act_on(worker: _Worker) -> None:
            with self._engine(worker.cluster_id) as client:
                try:
                    act(client.containers.get(worker.container))
                except docker.errors.NotFound:
                    return
                except (docker.errors.DockerException, OSError) as error:
                    logger.warning(
                        "The Docker engine couldn't end the container %s (%s).",
                        worker.container[:12],
                        error,
                    )

        with ThreadPoolExecutor(min(len(workers), AT_ONCE)) as pool:
            list(pool.map(act_on, workers))

    def close(self, cluster_id: str) -> None:
        import docker

        run = self._runs.pop(cluster_id, None)
        try:
            client = run.client if run is not None else engine.connect()
        except ConfigurationError as error:
            logger.warning("What a cluster left in the Docker engine stays there: %s", error)
            return
        with contextlib.closing(client):
            try:
                if run is not None and run.member:
                    with contextlib.suppress(docker.errors.NotFound):  # or removed by others
                        network = client.networks.get(run.network)
                        network.disconnect(run.member, force=True)
                remove_all(client, cluster_id)
            except (docker.errors.DockerException, OSError) as error:
                logger.warning(
                    "The Docker engine couldn't remove all of the cluster %s (%s). The next start "
                    "does, or docker rm and docker network rm.",
                    cluster_id,
                    error,
                )
            if run is not None:
                deadline = time.monotonic() + FOLLOW_TIMEOUT
                for thread in run.followers:
                    thread.join(max(0.0, deadline - time.monotonic()))
                if run.echo is not None:
                    run.echo.end()
        for ref in [ref for ref, one in self._workers.items() if one.cluster_id == cluster_id]:
            del self._workers[ref]
            self._statuses.pop(ref, None)

    def find(self, cluster_id: str) -> Sequence[WorkerRef]:
        found = []
        for container in self._listed(cluster_id):
            if container["State"] in engine.ENDED or WORKER not in container["Labels"]:
                continue
            ref = WorkerRef(container["Labels"][WORKER], self.name)
            self._workers.setdefault(ref, _Worker(cluster_id, container["Id"]))
            found.append(ref)
        return found

    def logs(self, ref: WorkerRef, *, tail: int = 100) -> Sequence[str]:
        import docker

        worker = self._workers.get(ref)
        if worker is None or tail == 0:
            return []
        try:
            with self._engine(worker.cluster_id) as client:
                text: bytes = client.containers.get(worker.container).logs(tail=tail)
        except (docker.errors.DockerException, OSError) as error:
            return [f"[its output can't be got: {error}]"]
        return text.decode(errors="replace").splitlines()


def _refuse(message: str) -> Finding:
    return Finding(Severity.REFUSE, message)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """The engine's errors as ours."""
    import docker

    try:
        yield
    except docker.errors.APIError as error:
        raise LaunchError(f"{what}: {error.explanation or error}.") from error
    except (docker.errors.DockerException, OSError) as error:
        raise LaunchError(f"{what}: {error}.") from error


def _has_hosts_network(me: Container) -> bool:
    """Whether this container has the network of the engine's machine, and no other."""
    mode: str = me.attrs["HostConfig"]["NetworkMode"]
    return mode == "host"


def _own_addresses() -> set[str]:
    return {one.address for found in psutil.net_if_addrs().values() for one in found}


def _end(container: Container) -> None:
    if container.status == "created":
        container.remove(force=True)
        return
    if container.status == "paused":
        container.kill()  # it could heed nothing else
        container.unpause()
        return
    container.stop(timeout=TERM_GRACE)


def _copy_output(client: docker.DockerClient, container: str, log: Path) -> None:
    """Into a file, until the container ends or is removed."""
    import docker

    try:
        pieces = client.containers.get(container).logs(stream=True, follow=True)
        with contextlib.closing(pieces), log.open("ab") as file:
            for piece in pieces:
                file.write(piece)
                file.flush()
    except (docker.errors.DockerException, OSError) as error:
        logger.debug("The output of container %s is followed no more (%s).", container[:12], error)
