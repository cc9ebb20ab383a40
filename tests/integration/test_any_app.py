"""Wherever an app lives, and however the script runs.

docs/apps.md is the table of these cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster

Module = Callable[[str, str], str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

#: Seconds for a result. None of these tasks takes one.
SOON = 20

TASKS = """
from celery import Celery
app = Celery("t")
@app.task
def one(): return 1
"""

USES_TASKS = (
    "c = cluster.start(1, app=tasks.app); print(tasks.one.delay().get(timeout=20)); c.stop()"
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def ok(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(said), done.stderr


# -- how the program runs -------------------------------------------------------------


def test_an_installed_package(tmp_path: Path, run_script: Run, monkeypatch):
    """The app in one module of it, the tasks in another, the script elsewhere."""
    package = tmp_path / "site" / "shop"
    write(package / "__init__.py", "")
    write(package / "app.py", "from celery import Celery\napp = Celery('shop', include=['shop.t'])")
    write(package / "t.py", "from shop.app import app\n@app.task\ndef one(): return 1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    script = write(
        tmp_path / "main.py",
        """
        import cluster
        from shop.t import one
        if __name__ == "__main__":
            with cluster.start(1): print(one.delay().get(timeout=20))
        """,
    )
    ok(run_script(script, cwd=tmp_path), "1")


def test_code_on_standard_input_with_tasks_in_a_module(tmp_path: Path):
    """python - and python -c; what isn't in a file may use an app that is."""
    write(tmp_path / "tasks.py", TASKS)
    done = subprocess.run(
        [sys.executable, "-"],
        input=f"import cluster, tasks\n{USES_TASKS}\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    ok(done, "1")


def test_code_on_the_command_line_with_tasks_in_a_module(tmp_path: Path, run_script: Run):
    write(tmp_path / "tasks.py", TASKS)
    ok(run_script("-c", f"import cluster, tasks\n{USES_TASKS}", cwd=tmp_path), "1")


def test_tasks_typed_in_are_refused(tmp_path: Path):
    """python -: no worker could import them; said before anything is started."""
    done = subprocess.run(
        [sys.executable, "-"],
        input=f"import cluster\n{TASKS}\ncluster.start(1)\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "ConfigurationError: The tasks are defined in an interactive session" in done.stderr
    assert "Starting" not in done.stderr


def ipython(typed: str, *arguments: str, cwd: Path) -> str:
    """What an interactive IPython says that reads this."""
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--colors=NoColor", *arguments],
        input=typed,
        cwd=cwd,
        env={**os.environ, "IPYTHONDIR": str(cwd / "ipython")},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    return done.stdout + done.stderr


def test_ipython_with_tasks_in_a_module(tmp_path: Path):
    """Line by line, as a notebook would."""
    write(tmp_path / "tasks.py", TASKS)
    said = ipython(
        "import cluster, tasks\n"
        "c = cluster.start(1, app=tasks.app)\n"
        "tasks.one.delay().get(timeout=20) + 41\n"
        "c.stop()\n",
        cwd=tmp_path,
    )
    assert "Out[3]: 42" in said


def test_ipython_with_tasks_typed_in_is_refused(tmp_path: Path):
    """As in a notebook: ``__main__`` has no file there."""
    said = ipython(
        "import cluster; from celery import Celery; app = Celery('typed')\n"
        "exec('@app.task\\ndef one(): return 1')\n"
        "c = cluster.start(1)\n",
        cwd=tmp_path,
    )
    assert "The tasks are defined in an interactive session" in said
    assert "Starting" not in said


def test_ipython_runs_a_script_with_tasks(tmp_path: Path):
    """``ipython script.py`` and ``%run script.py``."""
    script = write(
        tmp_path / "script.py",
        TASKS + "import cluster\nif __name__ == '__main__':\n"
        "    with cluster.start(1): print('got', one.delay().get(timeout=20), one.name)\n",
    )
    assert "got 1 t.one" in ipython("", str(script), cwd=tmp_path)


PYTEST_CASE = """
import pytest
import cluster
{app}

@pytest.fixture(scope="module")
def running():
    with cluster.start(1, app=app) as c:
        yield c

def test_one(running):
    assert one.delay().get(timeout=20) == 1
"""


@pytest.mark.parametrize("where", ["test module", "conftest"])
def test_pytest_is_the_program(where: str, tmp_path: Path, run_script: Run):
    """The app in the test module itself, or in conftest.py."""
    source = TASKS
    if where == "conftest":
        write(tmp_path / "conftest.py", TASKS)
        source = "from conftest import app, one"
    write(tmp_path / "test_it.py", PYTEST_CASE.format(app=source))
    done = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# -- where the app is -----------------------------------------------------------------


def test_an_app_that_is_an_attribute_of_an_object(module: Module):
    """As its path says, "module:holder.celery"; the app alone doesn't say where it is."""
    name = module(
        "attribute_app",
        "from celery import Celery\n"
        "class Holder:\n"
        "    def __init__(self): self.celery = Celery('h', set_as_current=False)\n"
        "holder = Holder()\n"
        "holder.celery.conf.task_default_queue = 'held'\n"
        "@holder.celery.task\ndef one(): return one.app.main\n",
    )
    with cluster.start(1, app=f"{name}:holder.celery", timeout=15):
        assert sys.modules[name].one.delay().get(timeout=SOON) == "h"
    with pytest.raises(cluster.ConfigurationError, match="task_default_queue"):
        cluster.start(1, app=sys.modules[name].holder.celery)


def test_two_apps_in_one_module(module: Module):
    """Each is its own; the one that is given runs."""
    name = module(
        "two_apps",
        "from celery import Celery\n"
        "first = Celery('first'); second = Celery('second', set_as_current=False)\n"
        "@first.task(shared=False)\ndef one(): return 'first'\n"
        "@second.task(shared=False)\ndef two(): return two.app.main\n",
    )
    with cluster.start(1, app=f"{name}:second", timeout=15):
        assert sys.modules[name].two.delay().get(timeout=SOON) == "second"


FACTORY = """
from celery import Celery, Task, shared_task
FACTORS = []
class InContext(Task):
    def __call__(self, *args):
        FACTORS.append(3)
        try: return self.run(*args)
        finally: FACTORS.pop()
class Site:
    def __init__(self): self.extensions = {}
def create_app():
    site = Site()
    app = Celery("site", task_cls=InContext)
    app.config_from_object({"task_ignore_result": False, "broker_url": "redis://elsewhere"})
    app.set_default()
    site.extensions["celery"] = app
    return site
@shared_task
def times(x): return x * FACTORS[-1]
"""


def test_what_a_factory_made_is_kept_in_a_module(module: Module):
    """As Flask's documentation has it: the app from the factory, its tasks shared, each run in
    the site's context."""
    factory = module("site_factory", FACTORY)
    made = module("site_made", f"from {factory} import create_app\nsite = create_app()\n"
                  "app = site.extensions['celery']\n")  # fmt: skip
    with cluster.start(1, app=f"{made}:app", timeout=15):
        assert sys.modules[factory].times.delay(2).get(timeout=SOON) == 6


def test_a_factory_that_is_called_where_no_worker_sees_it_is_refused(module: Module):
    """A worker would make another app, without the settings and the class of its tasks."""
    name = module("unseen_factory", FACTORY)
    __import__(name)
    app = sys.modules[name].create_app().extensions["celery"]
    with pytest.raises(cluster.ConfigurationError, match="task_cls") as caught:
        cluster.start(1, app=app)
    assert "app = create_app()" in str(caught.value)


@pytest.mark.parametrize("path", ["unseen:create_app()", "unseen:create_app().extensions"])
def test_a_path_with_a_call_is_refused(path: str, module: Module):
    module("unseen", FACTORY)
    with pytest.raises(cluster.ConfigurationError, match="a call is no import path"):
        cluster.start(1, app=path)


def test_an_app_made_in_a_function_with_its_tasks_is_refused():
    from celery import Celery

    app = Celery("inner", set_as_current=False)

    @app.task(shared=False)
    def inner() -> None: ...

    with pytest.raises(cluster.ConfigurationError, match="defined inside a function"):
        cluster.start(1, app=app)


def test_a_configuration_by_name_and_tasks_that_are_discovered(module: Module):
    """As Django's documentation has it: settings in a module named by a variable, with a
    namespace, and the tasks of each part of the site found by themselves."""
    module(
        "site_settings",
        "CELERY_BROKER_URL = 'amqp://elsewhere//'\nCELERY_RESULT_BACKEND = 'db+sqlite:///x'\n"
        "CELERY_TASK_DEFAULT_QUEUE = 'site'\nFACTOR = 3\n",
    )
    module("part_tasks", "from celery import shared_task\nimport site_settings\n"
           "@shared_task\ndef times(x): return x * site_settings.FACTOR\n")  # fmt: skip
    name = module(
        "site_celery",
        "from celery import Celery\napp = Celery('site')\n"
        "app.config_from_object('site_settings', namespace='CELERY')\n"
        "app.autodiscover_tasks(['part_tasks'], related_name=None)\n",
    )
    with cluster.start(1, app=f"{name}:app", timeout=15) as c:
        assert c.app.send_task("part_tasks.times", (2,)).get(timeout=SOON) == 6
        [queues] = c.app.control.inspect(limit=1, timeout=5).active_queues().values()
        assert [queue["name"] for queue in queues] == ["site"]


def test_an_app_without_tasks(module: Module):
    """It starts; so do Celery's own tasks, and a task of another name is refused by name."""
    from celery.exceptions import NotRegistered

    name = module("taskless", "from celery import Celery\napp = Celery('taskless')\n")
    with cluster.start(1, app=f"{name}:app", timeout=15) as c:
        accumulate = c.app.tasks["celery.accumulate"]
        assert accumulate.delay(1, 2).get(timeout=SOON) == [1, 2]
        with pytest.raises(NotRegistered, match=r"some\.task"):
            c.app.send_task("some.task").get(timeout=SOON)
