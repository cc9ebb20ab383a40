"""What every launcher does, and how one is found: by name, or by where this process runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from cluster.errors import ConfigurationError
from cluster.model import Finding, LauncherDefaults, Reach, WorkerRef, WorkerSpec, WorkerStatus

#: Packages offer launchers under this entry-point group.
GROUP = "cluster.launchers"

#: What ``cluster.start`` takes besides: whoever mistypes one of these comes here, too.
START_ARGUMENTS = ("workers", "minimum", "app", "launcher", "timeout", "progress")

#: What platforms put into a container's environment, the most special first.
#: https://docs.aws.amazon.com/batch/latest/userguide/job_env_vars.html
#: https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
SIGNS: Mapping[str, str] = {
    "AWS_BATCH_JOB_NUM_NODES": "multinode",
    "AWS_BATCH_JOB_ID": "batch",
    "ECS_CONTAINER_METADATA_URI_V4": "ecs",
}


@runtime_checkable
class Launcher(Protocol):
    """A platform that runs workers. Its constructor takes validated options and
    touches no network."""

    @property
    def name(self) -> str:
        """As in ``cluster.start(launcher=...)``."""
        ...

    @property
    def defaults(self) -> LauncherDefaults:
        """What holds where the caller leaves something out."""
        ...

    @property
    def options(self) -> type[BaseModel]:
        """The schema of the launcher's own options."""
        ...

    def preflight(self, wanted: int, minimum: int) -> Sequence[Finding]:
        """What can be known before anything starts: to refuse, to warn of, to say."""
        ...

    def prepare(self, spec: WorkerSpec) -> None:
        """Begin what takes time and needs no broker: it is being started meanwhile.

        Args:
            spec: as for :meth:`launch`, but for the broker's address and secret.

        Raises:
            LaunchError: no worker can be launched here.
        """
        ...

    def reach(self, cluster_id: str) -> Reach:
        """Where the broker must listen so that the workers of a cluster reach it, which was
        prepared.

        Raises:
            LaunchError: there is no such place.
        """
        ...

    def launch(self, spec: WorkerSpec, count: int) -> Sequence[WorkerRef]:
        """Start ``count`` workers; return once the platform has accepted them.

        Raises:
            LaunchError: with the refs of those accepted before.
        """
        ...

    def describe(self, refs: Sequence[WorkerRef]) -> Mapping[WorkerRef, WorkerStatus]:
        """How each of ``refs`` is; an unknown one is ``MISSING``, none is left out."""
        ...

    def terminate(self, refs: Sequence[WorkerRef], *, reason: str) -> None:
        """End these workers, whatever state they are in. Idempotent."""
        ...

    def close(self, cluster_id: str) -> None:
        """The cluster's workers have been terminated: let go of what else there is for it.
        Idempotent."""
        ...

    def find(self, cluster_id: str) -> Sequence[WorkerRef]:
        """The workers of a cluster that the platform still has."""
        ...

    def logs(self, ref: WorkerRef, *, tail: int = 100) -> Sequence[str]:
        """The last ``tail`` lines a worker wrote."""
        ...


def available() -> Mapping[str, EntryPoint]:
    """The installed launchers by name."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return {point.name: point for point in points}


def detect(environment: Mapping[str, str], chosen: str) -> str:
    """The launcher for where this process runs.

    Args:
        environment: the process's environment.
        chosen: the user's own choice (``CLUSTER_LAUNCHER``), or an empty string.

    Raises:
        ConfigurationError: the one that fits isn't installed.
    """
    if chosen:
        return chosen
    for variable, name in SIGNS.items():
        if variable not in environment:
            continue
        if name not in available():
            raise ConfigurationError(
                f"{variable} is set, so the launcher that fits here is {name!r}, and this version "
                f"of celery-cluster doesn't have it. Available: {', '.join(available())}. To use "
                'one of them all the same, say so: launcher="local" or CLUSTER_LAUNCHER=local.'
            )
        return name
    return "local"


def make(launcher: str | Launcher, options: Mapping[str, Any]) -> Launcher:
    """The launcher of that name, with the caller's options validated.

    Args:
        launcher: a name, or a launcher made by the caller, which takes no options here.
        options: the launcher's own.

    Raises:
        ConfigurationError: an unknown name or option, or a value it can't use.
    """
    if isinstance(launcher, str):
        point = available().get(launcher)
        if point is None:
            raise ConfigurationError(
                f"There is no launcher {launcher!r}{_meant(launcher, tuple(available()))}. "
                f"Available: {', '.join(available())}."
            )
        return _with_options(launcher, point.load(), options)
    if not isinstance(launcher, Launcher):
        raise ConfigurationError(
            f"launcher={launcher!r} is neither a launcher nor the name of one. "
            f"Names: {', '.join(available())}."
        )
    if options:
        raise ConfigurationError(
            f"{', '.join(sorted(options))}: give options to the launcher's own constructor when "
            "you pass a launcher rather than a name."
        )
    return launcher


def _with_options(name: str, factory: Any, options: Mapping[str, Any]) -> Launcher:
    schema: type[BaseModel] = factory.options
    try:
        validated = schema.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigurationError(_explain(name, schema, error)) from error
    made: Launcher = factory(validated)
    return made


def _explain(name: str, schema: type[BaseModel], error: ValidationError) -> str:
    known = tuple(schema.model_fields)
    problems = []
    for problem in error.errors(include_url=False):
        option, value = ".".join(map(str, problem["loc"])), problem["input"]
        if problem["type"] == "extra_forbidden":
            meant = _meant(option, (*known, *START_ARGUMENTS))
            problems.append(f"there is no option {option!r}{meant}")
        elif problem["type"] == "value_error":
            problems.append(f"{option}: {problem['ctx']['error']}")
        elif option in known and option != "environment":
            problems.append(f"{option}={value!r}: {problem['msg']}")
        else:  # it may hold a password
            problems.append(f"{option}: {problem['msg']}")
    takes = ", ".join(known) or "no options"
    return f"The launcher {name!r} can't use this: {'; '.join(problems)}. It takes {takes}."


def _meant(name: str, known: Sequence[str]) -> str:
    close = [one for one in known if one.startswith(name.lower())]
    close = close or difflib.get_close_matches(name.lower(), known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
