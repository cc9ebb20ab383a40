"""Binds an app to a cluster's broker and back, and says how a worker imports it.

An app's own configuration stays its own. Three classes of settings:

*Ours always*: where the broker and the results are, the transport and its
keys. Set on top of whatever the app says, and taken off again.

*The user's, with other defaults than Celery's*: acknowledge late, fetch one at
a time. A default only; what the app says counts.

*The user's*: all else.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import celery
import kombu.pools
from celery.app import defaults as celery_defaults

from cluster.errors import ClusterError, ConfigurationError, StateError
from cluster.model import Endpoint
from cluster.settings import CELERY_OVERRIDES, SOCKET_TIMEOUT
from cluster.wire import ending
from cluster.wire.backend import PREFIX, Backend
from cluster.wire.secret import broker_url, password

#: The user's, with defaults that lose no task; only a worker heeds these. Celery's
#: names: https://docs.celeryq.dev/en/stable/userguide/configuration.html
WORKER_DEFAULTS: Mapping[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # With it on, a task that runs while the broker restarts ends REVOKED and
    # is never run again.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
}

#: The user's, with defaults that outlast a broker that restarts; on both sides.
CLIENT_DEFAULTS: Mapping[str, Any] = {
    "redis_socket_timeout": SOCKET_TIMEOUT,
    "redis_socket_connect_timeout": SOCKET_TIMEOUT,
    "redis_backend_health_check_interval": SOCKET_TIMEOUT,
    # Long enough for a broker that restarts with much data to load.
    "task_publish_retry_policy": {
        "max_retries": 100,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.5,
    },
}

#: Ours, inside ``broker_transport_options``: kombu has no time-outs by default.
TRANSPORT_OPTIONS: Mapping[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT,
    "socket_connect_timeout": SOCKET_TIMEOUT,
    "health_check_interval": SOCKET_TIMEOUT,
}

_TRANSPORT = "cluster.wire.transport:Transport"

#: The name under which a worker imports the user's script, as multiprocessing does.
_SCRIPT = "__mp_main__"

_MISSING = object()


@dataclass(frozen=True, slots=True)
class AppRef:
    """How a worker gets the app: what to import, and where in it the app is.

    ``home`` is the module that holds the app (``"__main__"``: the script), or
    ``""`` for an app that no module holds and that has no tasks of its own;
    ``attribute`` its name there, or the bare app's main name. ``script`` is
    the script's file and ``package`` the package it belongs to when it was run
    with ``-m``. ``modules`` hold tasks and are imported as well.
    """

    home: str
    attribute: str
    script: str = ""
    package: str = ""
    modules: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AppRef:
        return cls(**{**fields, "modules": tuple(fields["modules"])})

    @property
    def environment(self) -> Mapping[str, str]:
        """What must be set before Celery is first imported in a worker.

        Celery takes this file's tasks for those of ``__main__`` and names them
        so (celery/utils/imports.py, gen_task_name).
        """
        return {"MP_MAIN_FILE": self.script} if self.script else {}


# -- in the manager: which app, and how a worker would find it ---------------------


def find_app(app: celery.Celery | str | None) -> celery.Celery:
    """The app that ``cluster.start(app=...)`` means.

    Raises:
        ConfigurationError: there is no such app.
    """
    if app is None:
        found = celery.current_app._get_current_object()
    elif isinstance(app, str):
        found = _import_path(app)
    else:
        # celery.current_app and its like stand in for the app they mean.
        found = getattr(app, "_get_current_object", lambda: app)()
    if not isinstance(found, celery.Celery):
        raise ConfigurationError(
            f"app={app!r} is no Celery app but {type(found).__name__}. Give the app itself or "
            'its import path, such as app="package.module:app".'
        )
    return found


def _import_path(path: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(
            f"app={path!r} is no import path. Write the module, a colon and the app's name "
            'in it, such as app="package.module:app".'
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigurationError(
            f"app={path!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        return _attribute(module, attribute)
    except AttributeError as error:
        raise ConfigurationError(
            f"app={path!r} can't be imported: module {module_name} has no {attribute}."
        ) from error


def locate(app: celery.Celery) -> AppRef:
    """How a worker gets this app.

    Raises:
        ConfigurationError: it can't; the message says how to change that.
    """
    task_modules = _task_modules(app)
    holders = list(_holders(app))
    # An app that a module defines and the script imports is found in both.
    importable = [(name, attribute) for name, attribute in holders if name != "__main__"]
    if importable:
        home, attribute = importable[0]
    elif holders:
        home, attribute = holders[0]
    elif local := [name for name, task in app.tasks.items() if _is_local(task)]:
        raise ConfigurationError(
            f"{app!r} has the task {local[0]}, defined inside a function, and isn't itself the "
            "value of a name at the top level of a module: no worker can import either. Write "
            "app = Celery(...) and its tasks at the top level of a module or of the script."
        )
    else:
        home, attribute = "", app.main or ""
    script = package = ""
    if "__main__" in task_modules or home == "__main__":
        main = sys.modules["__main__"]
        script, package = _script_of(main)
        if not script:
            if "__main__" in task_modules:
                raise ConfigurationError(
                    "The tasks are defined in an interactive session or on standard input, "
                    "which no worker can import. Put them into a file: a script or a module."
                )
            home, attribute = "", app.main or ""
    return AppRef(home, attribute, script, package, tuple(sorted(task_modules - {"__main__"})))


def _is_local(task: celery.Task[Any, Any]) -> bool:
    """Whether importing the task's module doesn't define it. Celery's own are so, too."""
    local = "<locals>" in getattr(task.run, "__qualname__", "")
    return local and not _is_celerys(type(task).__module__)


def _is_celerys(module: str) -> bool:
    return module.startswith("celery.")


def _holders(app: celery.Celery) -> Iterator[tuple[str, str]]:
    """The modules that have the app as an attribute, those that define it first."""
    found = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module.__name__ != name:
            continue  # an alias, or something that only poses as a module
        for attribute, value in list(vars(module).items()):
            if value is app:
                found.append((name, attribute))
                break
    # A module that holds it and has tasks comes before one that merely imported it.
    tasks_from = _task_modules(app)
    yield from sorted(found, key=lambda holder: holder[0] not in tasks_from)


def _task_modules(app: celery.Celery) -> set[str]:
    """The modules that a worker must import to have the app's tasks.

    Celery gives every app the tasks of all others in the process (``shared`` is
    the default of ``app.task``). A module that holds another app and not this
    one is taken for that other's.
    """
    found = set()
    for name in {type(task).__module__ for task in app.tasks.values()}:
        module = sys.modules.get(name)
        if module is None or _is_celerys(name):
            continue
        # By type(): asking a stand-in for its __class__ would make it find its app.
        apps = [value for value in vars(module).values() if issubclass(type(value), celery.Celery)]
        if not apps or any(value is app for value in apps):
            found.add(name)
    return found


def _script_of(main: ModuleType) -> tuple[str, str]:
    """The script's file and package, or two empty strings."""
    file = getattr(main, "__file__", None)
    if not file or not Path(file).is_file():
        return "", ""
    spec = getattr(main, "__spec__", None)
    return os.path.abspath(file), (spec.parent or "") if spec is not None else ""


# -- in the worker: import it --------------------------------------------------------


def import_app(ref: AppRef) -> celery.Celery:
    """Import the app and its tasks. Raises whatever the user's code raises."""
    if ref.script:
        _import_script(ref.script, ref.package)
    if ref.home:
        module = (
            sys.modules[_SCRIPT] if ref.home == "__main__" else importlib.import_module(ref.home)
        )
        app = _attribute(module, ref.attribute)
    else:
        app = celery.Celery(ref.attribute or None)
    if not isinstance(app, celery.Celery):
        raise ConfigurationError(f"{ref.home}.{ref.attribute} is no Celery app here.")
    app.set_current()
    for name in ref.modules:
        importlib.import_module(name)
    return app


def _import_script(path: str, package: str) -> None:
    """Run the user's script as a module that isn't ``__main__`` by name."""
    module = ModuleType(_SCRIPT)
    module.__file__ = path
    module.__package__ = package or None
    if package:
        importlib.import_module(package)
    # Under both names: its functions pickle as __main__'s, as in the manager.
    sys.modules[_SCRIPT] = sys.modules["__main__"] = module
    # Compiled here rather than by the import system, which would leave a
    # __pycache__ beside the user's script.
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    exec(code, vars(module))  # noqa: S102 (it is the user's own program)


def _attribute(module: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def set_defaults() -> None:
    """In a worker, before the app is imported: our defaults in place of Celery's.

    ``app.add_defaults`` would come too late for tasks that are bound as they
    are defined, and would beat what the app takes from an object.
    """
    ours = {**WORKER_DEFAULTS, **CLIENT_DEFAULTS}
    celery_defaults.DEFAULTS.update(ours)
    for name, value in ours.items():
        old = celery_defaults._TO_OLD_KEY.get(name)
        if old in celery_defaults._OLD_DEFAULTS:
            celery_defaults._OLD_DEFAULTS[old] = value


# -- in both: ours always --------------------------------------------------------------


def _ours(app: celery.Celery, endpoint: Endpoint) -> Mapping[str, Any]:
    url = broker_url(endpoint.host, endpoint.port, endpoint.secret)
    return {
        "broker_url": url,
        "broker_read_url": url,
        "broker_write_url": url,
        "broker_transport": _TRANSPORT,
        "broker_transport_options": {
            **(app.conf.broker_transport_options or {}),
            **TRANSPORT_OPTIONS,
        },
        "result_backend": PREFIX + url,
    }


def bind_worker(app: celery.Celery, endpoint: Endpoint) -> None:
    """In a worker: for the process's life."""
    app.conf.update(_ours(app, endpoint))
    app.backend_cls = app.conf.result_backend
    _swap_caches(app, _NO_CACHES)


class Binding:
    """An app bound to a cluster, in the manager; :meth:`release` undoes it.

    Args:
        app: the app.
        endpoint: the broker.

    Raises:
        StateError: it is bound to another cluster.
    """

    _bound: ClassVar[dict[int, Binding]] = {}  # by the app's id
    _aside: ClassVar[dict[str, str]] = {}  # the environment's overrides, while any is bound
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, app: celery.Celery, endpoint: Endpoint) -> None:
        self.app = app
        with self._lock:
            check_unbound(app)
            if not self._bound:
                for name in CELERY_OVERRIDES:
                    if name in os.environ:
                        self._aside[name] = os.environ.pop(name)
            self._bound[id(app)] = self
        changes = app.conf.maps[0]
        values = {
            **{
                key: value
                for key, value in CLIENT_DEFAULTS.items()
                if not app.conf.value_set_for(key)
            },
            **_ours(app, endpoint),
        }
        self._before = {key: changes.get(key, _MISSING) for key in values}
        self._backend_before = app.backend_cls
        changes.update(values)
        app.backend_cls = values["result_backend"]
        self._caches_before = _swap_caches(app, _NO_CACHES)
        self._backend: Backend = app.backend
        self._password = password(endpoint.secret)

    def end(self, why: ClusterError) -> None:
        """From now on, whoever sends a task, waits for a result or asks for one gets ``why``."""
        ending.end(self._password, why)

    def fail_task(self, request: Any, why: ClusterError) -> None:
        """Store ``why`` as the result of a task that won't be run any more.

        Args:
            request: the task's context, rebuilt from its message.
        """
        self._backend.mark_as_failure(request.id, why, request=request)

    def release(self) -> None:
        """Put the app back as it was. Call :meth:`end` first."""
        self._backend.result_consumer.stop()
        self._backend.client.connection_pool.disconnect()
        changes = self.app.conf.maps[0]
        for key, value in self._before.items():
            if value is _MISSING:
                changes.pop(key, None)
            else:
                changes[key] = value
        self.app.backend_cls = self._backend_before
        ours = _swap_caches(self.app, self._caches_before)
        _close(ours)
        with self._lock:
            del self._bound[id(self.app)]
            if not self._bound:
                os.environ.update(self._aside)
                self._aside.clear()


def check_unbound(app: celery.Celery) -> None:
    """Raise :class:`StateError` if the app belongs to a running cluster."""
    if id(app) in Binding._bound:
        raise StateError(
            f"{app!r} belongs to a cluster that still runs. Stop that one first, or use "
            "another app."
        )


@dataclass(frozen=True, slots=True)
class _Caches:
    """Where Celery keeps connections to a broker it has used."""

    connections: Any = None
    producers: Any = None
    backend: Any = None
    local_backend: Any = None


_NO_CACHES = _Caches()


def _swap_caches(app: celery.Celery, new: _Caches) -> _Caches:
    """Put others in their place; what was there stays open."""
    local = vars(app._local)
    old = _Caches(
        app._pool, app.amqp._producer_pool, app._backend_cache, local.pop("backend", None)
    )
    app._pool = new.connections
    app.amqp._producer_pool = new.producers
    app._backend_cache = new.backend
    if new.local_backend is not None:
        local["backend"] = new.local_backend
    return old


def _close(caches: _Caches) -> None:
    """Close our connections, and take their pools out of kombu's registry of all pools."""
    for registry, pool in (
        (kombu.pools.producers, caches.producers),
        (kombu.pools.connections, caches.connections),
    ):
        if pool is None:
            continue
        for key in [key for key, value in registry.items() if value is pool]:
            dict.pop(registry, key)
        pool.force_close_all()
