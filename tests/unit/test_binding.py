"""Where a worker finds an app, and what binding changes and gives back."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import celery
import pytest
from celery import Celery, shared_task
from celery.app import defaults

import cluster
from cluster import binding
from cluster.appref import AppRef, find_app, locate
from cluster.binding import Binding
from cluster.model import Endpoint

app = Celery("located")
ENDPOINT = Endpoint("127.0.0.1", 1, "00" * 32)  # nothing listens there, and nothing is asked


@app.task
def one() -> int:
    return 1


@shared_task
def shared() -> int:
    return 2


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Stands in for the user's script."""
    module = types.ModuleType("__main__")
    module.__file__ = str(tmp_path / "script.py")
    Path(module.__file__).write_text("")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def task_of(owner: Celery, module: str, name: str = "work"):
    def work() -> None: ...

    work.__module__, work.__qualname__ = module, name
    return owner.task(work, name=f"{module}.{name}", shared=False)


def test_an_app_in_a_module_is_found_by_its_path():
    ref = locate(app)
    assert (ref.home, ref.attribute, ref.script) == (__name__, "app", "")
    assert __name__ in ref.modules
    assert AppRef.from_fields(__import__("json").loads(ref.to_json())) == ref
    assert ref.environment == {}


def test_an_app_in_the_script_is_found_by_its_file(main):
    main.mine = Celery("mine")
    task_of(main.mine, "__main__")
    ref = locate(main.mine)
    assert (ref.home, ref.attribute, ref.script) == ("__main__", "mine", main.__file__)
    assert "__main__" not in ref.modules
    assert ref.environment == {"MP_MAIN_FILE": main.__file__}


def test_tasks_in_the_script_of_an_app_in_a_module_need_both(main):
    main.app = app
    task_of(app, "__main__", "in_main")
    try:
        ref = locate(app)
        assert (ref.home, ref.script) == (__name__, main.__file__)
    finally:
        app.tasks.pop("__main__.in_main")


def test_an_app_without_tasks_starts_anywhere(main):
    del main.__file__
    main.bare = Celery("bare")
    assert (locate(main.bare).home, locate(main.bare).attribute) == ("", "bare")
    assert locate(Celery("nowhere")).attribute == "nowhere"


def test_tasks_in_an_interactive_session_are_refused(main):
    del main.__file__
    main.mine = Celery("mine")
    task_of(main.mine, "__main__")
    with pytest.raises(cluster.ConfigurationError, match="interactive session.*into a file"):
        locate(main.mine)


def test_an_app_and_tasks_inside_a_function_are_refused():
    hidden = Celery("hidden")
    task_of(hidden, __name__, "test.<locals>.work")
    with pytest.raises(cluster.ConfigurationError, match="inside a function.*top level"):
        locate(hidden)


def test_another_apps_tasks_are_not_imported_along(monkeypatch):
    """Celery shares them with every app; their modules are none of this one's."""
    other = types.ModuleType("other_module")
    other.app = Celery("other")
    other.mine = mine = Celery("mine")
    monkeypatch.setitem(sys.modules, "other_module", other)
    assert "other_module" not in locate(app).modules
    task_of(mine, "other_module")
    assert "other_module" in locate(mine).modules
    task_of(app, "module_that_is_gone")
    try:
        assert "module_that_is_gone" not in locate(app).modules
    finally:
        app.tasks.pop("module_that_is_gone.work")


def test_the_app_is_the_one_given_or_the_current():
    assert find_app(app) is app
    assert find_app(f"{__name__}:app") is app
    app.set_current()
    assert find_app(None) is app
    assert find_app(celery.current_app) is app


def test_in_a_thread_without_a_current_app_it_is_the_only_one(monkeypatch):
    monkeypatch.setattr(celery._state._tls, "current_app", None)
    monkeypatch.setattr(celery._state, "_get_active_apps", lambda: {app, celery._state.default_app})
    assert find_app(None) is app
    monkeypatch.setattr(celery._state, "_get_active_apps", lambda: {app, Celery("another")})
    with pytest.raises(cluster.ConfigurationError, match="There are 2"):
        find_app(None)
    monkeypatch.setattr(celery._state, "_get_active_apps", set)
    assert locate(find_app(None)).home == "", "the one that Celery makes has no module"


def test_binding_gives_back_all_it_took():
    mine = Celery("mine", broker="amqp://elsewhere//")
    mine.conf.broker_transport_options = {"visibility_timeout": 5, "socket_timeout": 99}
    mine.conf.redis_socket_timeout = 77
    before, pool, backend = dict(mine.conf), mine.pool, mine.backend
    bound = Binding(mine, ENDPOINT, 2**20)
    try:
        assert mine.conf.broker_url.endswith("@127.0.0.1:1/0")
        assert mine.conf.broker_transport_options["visibility_timeout"] == 5, "the user's stay"
        assert mine.conf.broker_transport_options["socket_timeout"] == 5, "ours win"
        assert mine.conf.redis_socket_timeout == 77, "a default only"
        assert mine.conf.redis_socket_connect_timeout == 5
        assert type(mine.backend).__module__ == "cluster.wire.backend"
        with pytest.raises(cluster.StateError):
            binding.check_unbound(mine)
        with pytest.raises(cluster.StateError):
            Binding(mine, ENDPOINT, 2**20)
    finally:
        bound.release()
    binding.check_unbound(mine)
    assert dict(mine.conf) == before
    assert mine.pool is pool
    assert mine.backend is backend


def test_binding_that_fails_leaves_all_as_it_was(monkeypatch):
    """The app has a setting that Celery can't use: that is said, and it can be mended."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://mine//")
    mine = Celery("mine")
    mine.conf.result_serializer = "msgpackk"
    before = dict(mine.conf)
    with pytest.raises(cluster.ConfigurationError, match="mine.*msgpackk"):
        Binding(mine, ENDPOINT, 2**20)
    assert dict(mine.conf) == before
    assert os.environ["CELERY_BROKER_URL"] == "amqp://mine//"
    mine.conf.result_serializer = "json"
    bound = Binding(mine, ENDPOINT, 2**20)
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://meanwhile//")
    bound.release()
    assert os.environ["CELERY_BROKER_URL"] == "amqp://meanwhile//"


def test_a_workers_defaults_lose_to_whatever_the_app_says(monkeypatch):
    monkeypatch.setattr(defaults, "DEFAULTS", dict(defaults.DEFAULTS))
    monkeypatch.setattr(defaults, "_OLD_DEFAULTS", dict(defaults._OLD_DEFAULTS))
    import celery.app.utils

    monkeypatch.setattr(celery.app.utils, "DEFAULTS", defaults.DEFAULTS)
    info = celery.app.utils._settings_info
    monkeypatch.setattr(
        celery.app.utils, "_settings_info", info._replace(defaults=defaults.DEFAULTS)
    )
    binding.set_defaults()
    assert Celery("a").conf.task_acks_late is True
    by_constructor = Celery("b", task_acks_late=False)
    by_update = Celery("c")
    by_update.conf.update(task_acks_late=False)
    by_object = Celery("d")
    by_object.config_from_object({"task_acks_late": False, "worker_prefetch_multiplier": 7})
    for one_app in (by_constructor, by_update, by_object):
        assert one_app.conf.task_acks_late is False
        assert one_app.conf.task_reject_on_worker_lost is True
    assert by_object.conf.worker_prefetch_multiplier == 7
