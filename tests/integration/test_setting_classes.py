"""Three classes of Celery's settings, from every place where an app can set them.

*Ours always*: where broker and results are. *The app's, with a warning*: what
may lose a task. *The app's*: all else. docs/apps.md says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator

import pytest

import cluster

SETTINGS = {
    "broker_url": "amqp://elsewhere//",
    "result_backend": "db+sqlite:///elsewhere",
    "broker_transport_options": {"global_keyprefix": "mine:", "priority_steps": [0, 5]},
    "task_acks_late": False,
    "worker_prefetch_multiplier": 7,
    "timezone": "Europe/Berlin",
}

#: How an app comes by its settings.
PLACES = {
    "the constructor": "app = Celery({name!r}, **SETTINGS)",
    "conf.update": "app = Celery({name!r}); app.conf.update(SETTINGS)",
    "an attribute of conf": """
app = Celery({name!r})
for name, value in SETTINGS.items():
    setattr(app.conf, name, value)
""",
    "config_from_object": """
app = Celery({name!r})
app.config_from_object(type('Settings', (), SETTINGS))
""",
    "config_from_object with a namespace": """
app = Celery({name!r})
Settings = type('Settings', (), {{'CELERY_' + k.upper(): v for k, v in SETTINGS.items()}})
app.config_from_object(Settings, namespace='CELERY')
""",
    "a module named by the environment": """
app = Celery({name!r})
app.config_from_envvar('PLACED_SETTINGS')
""",
    "add_defaults": "app = Celery({name!r}); app.add_defaults(SETTINGS)",
}

MODULE = """
from celery import Celery
SETTINGS = {settings!r}
{place}
@app.task
def look(names):
    return [app.conf[name] for name in names]
"""


@contextlib.contextmanager
def noted_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """They are noted rather than raised, and what is started meanwhile is stopped in any case."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        yield noted


@pytest.mark.parametrize("place", PLACES)
def test_settings_of_each_class(place: str, module, monkeypatch: pytest.MonkeyPatch):
    module("placed_settings", "\n".join(f"{key} = {value!r}" for key, value in SETTINGS.items()))
    monkeypatch.setenv("PLACED_SETTINGS", "placed_settings")
    # Beats whatever the app says, and is aside while a cluster runs.
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://somewhere//")
    name = "placed_" + re.sub(r"\W", "_", place)
    how = PLACES[place].format(name=name)
    __import__(module(name, MODULE.format(settings=SETTINGS, place=how)))
    app = sys.modules[name].app
    before, changes, environment = dict(app.conf), dict(app.conf.maps[0]), dict(os.environ)
    with noted_warnings() as warned, cluster.start(1, app=app) as c:
        names = list(SETTINGS)
        results = dict(zip(names, sys.modules[name].look.delay(names).get(timeout=30), strict=True))
        for conf in (app.conf, results):
            assert conf["broker_url"].startswith("redis://")
            assert conf["broker_url"].endswith(f"@{c.status().broker}/0")
            assert conf["result_backend"].endswith(conf["broker_url"])
            assert conf["broker_transport_options"]["global_keyprefix"] == ""
            assert conf["broker_transport_options"]["priority_steps"] == [0, 5]
            for setting in ("task_acks_late", "worker_prefetch_multiplier", "timezone"):
                assert conf[setting] == SETTINGS[setting]
    [warning] = warned
    assert warning.filename == __file__
    assert "task_acks_late=False is set. A task is" in str(warning.message)
    assert dict(app.conf) == before
    assert app.conf.maps[0] == changes
    assert dict(os.environ) == environment


TASKS = """
from celery import Celery, Task
app = Celery('early', task_annotations={'early.annotated': {'acks_late': False}})
class Early(Task):
    acks_late = False
@app.task
def late(): return late.acks_late, late.reject_on_worker_lost
@app.task(acks_late=False)
def decorated(): return decorated.acks_late
@app.task(base=Early)
def based(): return based.acks_late
@app.task
def annotated(): return annotated.acks_late
@app.task(reject_on_worker_lost=False)
def careless(): pass
"""


def test_settings_of_single_tasks(module):
    """Those that may be lost are named; the others aren't."""
    name = module("early", TASKS)
    with noted_warnings() as warned, cluster.start(1, app=f"{name}:app"):
        tasks = sys.modules[name]
        assert tasks.late.delay().get(timeout=30) == [True, True]
        assert [
            getattr(tasks, early).delay().get(timeout=30)
            for early in ("decorated", "based", "annotated")
        ] == [False] * 3
    said = [str(warning.message) for warning in warned]
    assert len(said) == 2
    assert "acks_late=False is set for early.annotated, early.based, early.decorated. " in said[0]
    assert "reject_on_worker_lost=False is set for early.careless. " in said[1]
    assert all(warning.filename == __file__ for warning in warned)


def test_defaults_are_not_warned_of_and_end_with_the_cluster(module):
    """What an app doesn't say is ours in a worker, and Celery's again in the manager."""
    name = module("silent", MODULE.format(settings={}, place="app = Celery('silent')"))
    with cluster.start(1, app=f"{name}:app"):
        names = ["task_acks_late", "task_reject_on_worker_lost", "worker_disable_prefetch"]
        assert sys.modules[name].look.delay(names).get(timeout=30) == [True] * 3
    assert sys.modules[name].app.conf.task_acks_late is False
    assert sys.modules[name].app.conf.redis_socket_timeout == 120.0
