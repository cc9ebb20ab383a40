"""Which app is meant, how a worker can import it, and how the worker then does."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import celery
from celery.app import defaults as celery_defaults

from cluster.errors import ConfigurationError

#: The name under which a worker imports the user's script, as multiprocessing does.
_SCRIPT = "__mp_main__"


@dataclass(frozen=True, slots=True)
class AppRef:
    """How a worker gets the app: what to import, and where in it the app is.

    ``home`` is the module that holds the app (``"__main__"``: the script), or
    ``""`` for an app that no module holds and that has no tasks of its own;
    ``attribute`` its name there, or the bare app's main name. ``script`` is
    the script's file and ``package`` the package it belongs to when it was run
    with ``-m``. ``modules`` hold tasks and are imported as well. ``argv`` is the
    manager's: what the script makes of its arguments as it is imported, a
    worker must make of them, too.
    """

    home: str
    attribute: str
    script: str = ""
    package: str = ""
    modules: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AppRef:
        return cls(**{**fields, "modules": tuple(fields["modules"]), "argv": tuple(fields["argv"])})

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
        found = _current_app()
    elif isinstance(app, str):
        found = _import_path(app)
    else:
        # celery.current_app and its like stand in for the app they mean.
        found = getattr(app, "_get_current_object", lambda: app)()
    if not isinstance(found, celery.Celery):
        raise ConfigurationError(
            f"app={app!r} is no Celery app but {found.__class__.__name__}. Give the app itself or "
            'its import path, such as app="package.module:app".'
        )
    return found


def _current_app() -> Any:
    """Celery's current app; which it keeps for each thread, and so, in a thread that has
    none, the only app there is."""
    if celery._state._tls.current_app is None:
        apps = [app for app in celery._state._get_active_apps() if app is not _fallback()]
        if len(apps) == 1:
            return apps[0]
        if apps:
            raise ConfigurationError(
                f"Which app? There are {len(apps)} in this process and none is this thread's "
                "current one. Say it: cluster.start(app=...)."
            )
    return celery.current_app._get_current_object()


def _fallback() -> Any:
    """The app that Celery makes when somebody asks for one and there is none."""
    return celery._state.default_app


def _import_path(path: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(
            f"app={path!r} is no import path. Write the module, a colon and the app's name "
            'in it, such as app="package.module:app".'
        )
    if "(" in attribute:
        raise ConfigurationError(
            f"app={path!r}: a call is no import path. Every worker imports the app by a name, so "
            "keep what the factory makes in a module, such as app = create_app() or, with Flask, "
            'app = create_app().extensions["celery"], and give that one\'s path.'
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


def locate(app: celery.Celery, path: str = "") -> AppRef:
    """How a worker gets this app.

    Args:
        app: the app.
        path: its import path, if that is how it was given.

    Raises:
        ConfigurationError: it can't; the message says how to change that.
    """
    task_modules = _task_modules(app)
    holders = list(_holders(app))
    # An app that a module defines and the script imports is found in both.
    importable = [(name, attribute) for name, attribute in holders if name != "__main__"]
    if path:
        home, _, attribute = path.partition(":")
    elif importable:
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
        home, attribute = "", _name_of_bare(app)
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
            home, attribute = "", _name_of_bare(app)
    modules = tuple(sorted(task_modules - {"__main__"}))
    return AppRef(home, attribute, script, package, modules, tuple(sys.argv))


#: Settings of an app that no module holds which needn't be known in a worker: the
#: binding sets them anyway (cluster/binding.py).
_SET_BY_BINDING = ("broker_", "redis_", "result_backend")


def _name_of_bare(app: celery.Celery) -> str:
    """The main name of an app that a worker makes anew from it and nothing else.

    Raises:
        ConfigurationError: that would be another app than this one.
    """
    _ = app.conf.broker_url  # until something is read, the configuration is none yet
    own = sorted(
        name
        for name, value in app.conf.without_defaults().items()
        if name in celery_defaults.DEFAULTS
        and not name.startswith(_SET_BY_BINDING)
        and value != celery_defaults.DEFAULTS[name]
    )
    if type(app) is not celery.Celery:
        own.append(f"the class {type(app).__name__}")
    if app.task_cls != celery.Celery.task_cls:
        own.append("task_cls")
    if own:
        raise ConfigurationError(
            f"{app!r} isn't the value of a name at the top level of a module that a worker can "
            f"import, and has settings of its own that a worker would miss: {', '.join(own)}. "
            "Write app = Celery(...) at the top level of a module or of the script; or, where a "
            "function makes it, app = create_app(), with Flask "
            'app = create_app().extensions["celery"].'
        )
    return app.main or ""


def _is_local(task: celery.Task[Any, Any]) -> bool:
    """Whether importing the task's module doesn't define it. Celery's own are so, too."""
    local = "<locals>" in getattr(task.run, "__qualname__", "")
    return local and not _is_celerys(type(task).__module__)


def _is_celerys(module: str) -> bool:
    return module == "celery" or module.startswith("celery.")


def _holders(app: celery.Celery) -> Iterator[tuple[str, str]]:
    """The modules that have the app as an attribute, those that define it first."""
    found = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module.__name__ != name:
            continue  # an alias, or something that only poses as a module
        if _is_celerys(name):
            continue
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


def task_names(app: celery.Celery, ref: AppRef) -> frozenset[str]:
    """The tasks that a worker has once it has imported the app by ``ref``."""
    modules = {*ref.modules, "__main__"} if ref.script else set(ref.modules)
    return frozenset(name for name, task in app.tasks.items() if type(task).__module__ in modules)


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
    if ref.argv:
        sys.argv[:] = ref.argv
    if ref.script:
        _import_script(ref.script, ref.package)
    if ref.home:
        module = (
            sys.modules[_SCRIPT] if ref.home == "__main__" else importlib.import_module(ref.home)
        )
        try:
            app = _attribute(module, ref.attribute)
        except AttributeError as error:
            raise ConfigurationError(
                f"A worker that imports {ref.script or ref.home} finds no {ref.attribute} there. "
                "Make the app at the top level, not in a function or under "
                'if __name__ == "__main__".'
            ) from error
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
    if not Path(path).is_file():
        name = Path(path).name
        raise ConfigurationError(
            f"The script {path} isn't here, nor is {name} in the working directory {Path.cwd()}. "
            f"Where workers run in containers, it must be in their image: COPY {name} ./"
        )
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
