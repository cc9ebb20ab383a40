"""``cluster.start`` on this machine, as a user meets it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from sampleapp import add, app, wait_for, where

import cluster
from cluster.model import Phase, State


def test_the_five_lines_give_results_and_leave_the_app_as_it_was():
    """start → delay → get, with N distinct workers; afterwards the configuration is the same."""
    before = dict(app.conf)
    with cluster.start(2, app=app) as c:
        assert c.state is State.READY
        assert len(set(c.workers)) == 2
        assert c.app is app
        assert c.launcher.name == "local"
        results = [add.delay(i, i) for i in range(50)]
        assert sum(result.get(timeout=30) for result in results) == 2450
        assert {where.delay().get(timeout=30)[0] for _ in range(20)} <= set(c.workers)
    assert c.state is State.STOPPED
    assert c.workers == ()
    assert dict(app.conf) == before
    assert app.backend_cls is None


def test_what_a_cluster_says_of_itself_is_true_and_keeps_its_secret(capsys):
    """repr, status and logs name the workers and never the password."""
    with cluster.start(2, app=app) as c:
        status = c.status()
        assert status.state is State.READY
        assert [worker.node for worker in status.workers if worker.ready] == list(c.workers)
        assert all(worker.status.phase is Phase.RUNNING for worker in status.workers)
        assert str(status).count("ready") == 4  # the state, the count, two workers
        assert set(c.logs()) == {worker.id for worker in status.workers}
        assert set(c.logs(c.workers[0])) == {status.workers[0].id}
        with pytest.raises(cluster.ConfigurationError, match="no worker 'nobody'"):
            c.logs("nobody")
        password = app.conf.broker_url.split(":")[2].split("@")[0]
        secret = c._broker.endpoint.secret
        said = f"{c!r} {status} {status!r} {c._broker.endpoint!r} {capsys.readouterr()}"
        assert password not in said
        assert secret not in said
        arguments = [" ".join(process.cmdline()) for process in _family()]
        assert not any(password in line or secret in line for line in arguments)
    with pytest.raises(cluster.StateError, match="no logs any more"):
        c.logs()


def _family():
    import psutil

    return psutil.Process().children(recursive=True)


def test_no_workers_is_a_broker_alone():
    """start(0) is legal, and waiting for a worker says at once that none will come."""
    with cluster.start(0, app=app) as c:
        assert c.workers == ()
        result = add.delay(1, 2)
        assert result.state == "PENDING"
        with pytest.raises(cluster.WorkersNotReady) as caught:
            c.wait_for_workers(1, timeout=30)
        assert (caught.value.ready, caught.value.wanted) == (0, 1)
    with pytest.raises(cluster.ClusterError, match="has been stopped"):
        result.get(timeout=30)


def test_a_second_start_on_a_bound_app_is_refused_and_works_after_stop():
    with (
        cluster.start(0, app=app),
        pytest.raises(cluster.StateError, match="belongs to a cluster"),
    ):
        cluster.start(0, app=app)
    with cluster.start(1, app=app):
        assert add.delay(1, 2).get(timeout=30) == 3


def test_stop_is_idempotent_and_a_waiting_get_raises(tmp_path: Path):
    """Whoever waits for a result in another thread is told, too."""
    c = cluster.start(1, app=app)
    result = wait_for.delay(str(tmp_path / "never"), str(tmp_path / "log"))
    caught: list[BaseException] = []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            result.get(timeout=60)
        except cluster.ClusterError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    c.stop(timeout=0)
    c.stop()
    thread.join(10)
    assert [type(error) for error in caught] == [cluster.ClusterError]
    with pytest.raises(cluster.StateError):
        c.wait_for_workers(1)


def test_running_tasks_may_finish_within_the_grace(tmp_path: Path, eventually):
    """stop() takes nothing new but lets what runs come to its end."""
    log, go = tmp_path / "log", tmp_path / "go"
    c = cluster.start(1, app=app)
    wait_for.delay(str(go), str(log))
    eventually(log.exists, "the task runs")
    thread = threading.Thread(target=c.stop, args=(30,))
    thread.start()
    eventually(lambda: c.state is State.STOPPING, "the stop has begun")
    go.touch()
    thread.join(20)
    assert not thread.is_alive()
    assert log.read_text().splitlines()[-1] == "end"


def test_who_interrupts_a_stop_hastens_it(tmp_path: Path, eventually):
    """Ctrl-C in the middle of it: the grace is over, nothing is left, KeyboardInterrupt follows."""
    c = cluster.start(1, app=app)
    log = tmp_path / "log"
    wait_for.delay(str(tmp_path / "never"), str(log))
    eventually(log.exists, "the task runs")

    def interrupt() -> None:
        eventually(lambda: c.state is State.STOPPING, "the stop has begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        c.stop(timeout=600)
    thread.join()
    assert c.state is State.STOPPED


def test_a_handler_that_stops_in_the_middle_of_a_stop_does_no_harm(tmp_path: Path, eventually):
    c = cluster.start(1, app=app)
    log, go = tmp_path / "log", tmp_path / "go"
    wait_for.delay(str(go), str(log))
    eventually(log.exists, "the task runs")
    called = []

    def handle(*_: object) -> None:
        c.stop()
        called.append(c.state)
        go.touch()

    def send() -> None:
        eventually(lambda: c.state is State.STOPPING, "the stop has begun")
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        c.stop(timeout=30)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert called == [State.STOPPING]
    assert c.state is State.STOPPED


def test_concurrency_runs_tasks_side_by_side(tmp_path: Path, eventually):
    """One worker with two processes has two tasks running at once."""
    logs, go = [tmp_path / "1", tmp_path / "2"], tmp_path / "go"
    with cluster.start(1, app=app, concurrency=2):
        results = [wait_for.delay(str(go), str(log)) for log in logs]
        eventually(lambda: all(log.exists() for log in logs), "both run")
        go.touch()
        assert [result.get(timeout=30) for result in results] == ["done", "done"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


SCRIPT = """
import sys
import cluster
from celery import Celery

app = Celery("demo")

@app.task
def square(x):
    return x * x

if __name__ == "__main__":
    with cluster.start(2) as c:
        results = [square.delay(i) for i in range(100)]
        print(sum(r.get(timeout=30) for r in results), square.name, *sys.argv[1:])
"""


def test_tasks_in_the_script_itself(tmp_path: Path, run_script):
    """python script.py, with arguments; nothing is left beside the script."""
    script = write(tmp_path / "demo.py", SCRIPT)
    done = run_script(script, "--and", "more", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "328350 demo.square --and more\n"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.py"]


def test_tasks_in_a_module_run_with_m(tmp_path: Path, run_script):
    """python -m package.module, which imports from its package."""
    package = tmp_path / "pkg"
    package.mkdir()
    write(package / "__init__.py", "")
    write(package / "helper.py", "from celery import Celery\napp = Celery('demo')\n")
    text = SCRIPT.replace("from celery import Celery\n", "from .helper import app\n")
    write(package / "mod.py", text.replace('app = Celery("demo")\n', ""))
    done = run_script("-m", "pkg.mod", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "328350 demo.square\n"


def test_tasks_in_a_module_beside_the_script(tmp_path: Path, run_script):
    write(
        tmp_path / "tasks.py",
        "from celery import Celery\napp = Celery('t')\n@app.task\ndef one(): return 1\n",
    )
    script = write(
        tmp_path / "main.py",
        "import cluster, tasks\n"
        "if __name__ == '__main__':\n"
        "    with cluster.start(1): print(tasks.one.delay().get(timeout=30))\n",
    )
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


ARGUMENTS = """
import argparse
import cluster
from celery import Celery
app = Celery("arguments")
parser = argparse.ArgumentParser()
parser.add_argument("--factor", type=int, required=True)
options = parser.parse_args()
@app.task
def times(x): return x * options.factor
if __name__ == "__main__":
    with cluster.start(1): print(times.delay(3).get(timeout=30))
"""


def test_a_script_that_reads_its_arguments_reads_the_same_in_a_worker(tmp_path: Path, run_script):
    done = run_script(write(tmp_path / "arguments.py", ARGUMENTS), "--factor", "5")
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr


IN_A_THREAD = """
import threading
import cluster
from celery import Celery
app = Celery("threaded")
@app.task
def one(): return 1
def main():
    with cluster.start(1): print(one.delay().get(timeout=30))
if __name__ == "__main__":
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
"""


def test_in_a_thread_the_only_app_is_meant(tmp_path: Path, run_script):
    """Celery's current app is each thread's own."""
    done = run_script(write(tmp_path / "threaded.py", IN_A_THREAD))
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


SHARED_ONLY = """
import cluster
from celery import shared_task
@shared_task
def one(): return 1
if __name__ == "__main__":
    with cluster.start(1): print(one.delay().get(timeout=30))
"""


def test_shared_tasks_need_no_app(tmp_path: Path, run_script):
    done = run_script(write(tmp_path / "shared.py", SHARED_ONLY))
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


GUARDED_APP = """
import cluster
from celery import Celery
if __name__ == "__main__":
    app = Celery("guarded")
    @app.task
    def one(): return 1
    cluster.start(1)
"""


def test_an_app_that_only_the_script_makes_is_explained(tmp_path: Path, run_script):
    done = run_script(write(tmp_path / "guarded.py", GUARDED_APP))
    assert done.returncode == 1
    assert "Make the app at the top level" in done.stderr


def test_tasks_on_standard_input_are_refused(run_script):
    """No worker can import them; said before anything is launched."""
    done = run_script("-c", SCRIPT)
    assert done.returncode == 1
    assert "Put them into a file" in done.stderr
    assert "Starting a broker" not in done.stderr


def test_a_script_without_a_guard_starts_no_cluster_in_its_workers(tmp_path: Path, run_script):
    script = write(tmp_path / "bare.py", SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    done = run_script(script)
    assert done.returncode == 1
    assert "called inside a worker" in done.stderr
    assert "WorkersNotReady" in done.stderr


FAILS_IN_A_WORKER = """
import sys
from celery import Celery
app = Celery("fails")
@app.task
def one(): return 1
if "cluster.worker.forkserver" in sys.orig_argv:
    raise RuntimeError("no licence for the workers")
"""


def test_an_app_that_a_worker_cannot_import_ends_the_start_early(module):
    """With the worker's traceback, long before the time-out, and without a replacement."""
    name = module("fails", FAILS_IN_A_WORKER)
    with pytest.raises(cluster.WorkersNotReady) as caught:
        cluster.start(2, app=f"{name}:app", timeout=600)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert "RuntimeError: no licence for the workers" in str(error)
    assert (error.ready, error.wanted, error.minimum) == (0, 2, 2)
    # One failed for good is enough to know; the other may not have got that far.
    assert 1 <= sum(status.exit_code == 84 for status in error.statuses.values()) <= 2
    assert len(error.statuses) == 2


ONE_FAILS = """
import os, sys
from celery import Celery
app = Celery("onefails")
@app.task
def one(): return 1
if "cluster.worker.forkserver" in sys.orig_argv:
    os.mkdir({path!r})  # the second one can't
"""


def test_the_minimum_is_enough_and_said(module, tmp_path: Path):
    """With one of two workers lost for good, the start goes on with the other and warns."""
    name = module("onefails", ONE_FAILS.format(path=str(tmp_path / "first")))
    with pytest.warns(RuntimeWarning, match="Only 1 of 2 workers") as warned:
        c = cluster.start(2, minimum=1, app=f"{name}:app")
    with c:
        assert warned[0].filename == __file__, "it points at the caller"
        assert len(c.workers) == 1
        assert sys.modules[name].one.delay().get(timeout=30) == 1


HANGS = """
import sys, threading
from celery import Celery
app = Celery("hangs")
if "cluster.worker.forkserver" in sys.orig_argv:
    print("waiting for godot", flush=True)
    threading.Event().wait()
"""


def test_a_worker_that_never_gets_ready_ends_at_the_deadline(module):
    """The error shows how the workers are and what they wrote."""
    name = module("hangs", HANGS)
    with pytest.raises(cluster.WorkersNotReady, match="waiting for godot") as caught:
        cluster.start(1, app=f"{name}:app", timeout=2)
    assert caught.value.elapsed >= 2
    [status] = caught.value.statuses.values()
    assert status.phase is Phase.RUNNING


NO_CONTROL = """
from celery import Celery
app = Celery("deaf")
app.conf.worker_enable_remote_control = False
@app.task
def one(): return 1
"""


def test_an_app_that_switched_remote_control_off_gets_ready_all_the_same(module):
    name = module("deaf", NO_CONTROL)
    with cluster.start(1, app=f"{name}:app"):
        assert sys.modules[name].one.delay().get(timeout=30) == 1


PREFIXED = """
from celery import Celery
app = Celery("prefixed")
app.conf.broker_transport_options = {"global_keyprefix": "mine:", "ack_emulation": False}
@app.task
def one(): return 1
"""


def test_transport_options_that_would_part_manager_and_workers_are_ours(module):
    name = module("prefixed", PREFIXED)
    with cluster.start(1, app=f"{name}:app", timeout=20):
        assert sys.modules[name].one.delay().get(timeout=30) == 1


def test_a_temporary_directory_may_have_any_name(tmp_path: Path, monkeypatch):
    directory = tmp_path / 'a "b" \\ c'
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with cluster.start(1, app=app):
        assert add.delay(1, 1).get(timeout=30) == 2
    assert not list(directory.iterdir())


SLOW_DISK = """
import time
from importlib.machinery import SourceFileLoader
get_code = SourceFileLoader.get_code
def slowly(self, name):
    if name == "encodings.idna":
        time.sleep(0.3)
    return get_code(self, name)
SourceFileLoader.get_code = slowly
"""


def test_a_slow_disk_hangs_no_task(tmp_path: Path, run_script, monkeypatch):
    """What the watchdog's first connection imports takes long. A child forked meanwhile had the
    lock of that module for ever, and hung as it stored its first result."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = write(tmp_path / "slow.py", SCRIPT)
    assert run_script(script, timeout=40).returncode == 0


def test_what_is_dropped_at_the_end_is_said(caplog, tmp_path: Path, eventually):
    """One task that runs and is cut off, and those that wait."""
    log = tmp_path / "log"
    with cluster.start(1, app=app) as c:
        wait_for.delay(str(tmp_path / "never"), str(log))
        eventually(log.exists, "the task runs")
        for number in range(4):
            add.apply_async((number, 1), priority=number)
        c.stop(timeout=0)
    assert "stopped with 5 tasks not done: dropped" in caplog.text
    with pytest.raises(cluster.StateError, match="can't be used again"), c:
        pass


FORKS = """
import threading
from celery import Celery
from celery.signals import worker_before_create_process
app = Celery("forks")
@app.task
def one(): return 1
@worker_before_create_process.connect
def look(**_):
    [watchdog] = [thread for thread in threading.enumerate() if thread.name == "cluster-watchdog"]
    print("subscribed:", watchdog._subscribed.is_set())
"""


def test_a_worker_forks_only_once_its_watchdog_is_connected(module):
    """Else a child may have a copy of a lock that the thread held, and hang in its first task."""
    name = module("forks", FORKS)
    with cluster.start(8, app=f"{name}:app", output=False) as c:
        assert str(c.logs()).count("subscribed: True") == 8


DIES = """
import os, sys
from celery import Celery
from celery.signals import worker_init
app = Celery("dies")
@worker_init.connect
def die(**_):
    os._exit(7)
"""


def test_workers_that_die_as_they_start_are_replaced_a_few_times_only(module):
    name = module("dies", DIES)
    with pytest.raises(cluster.WorkersNotReady) as caught:
        cluster.start(1, app=f"{name}:app", timeout=600)
    assert [status.exit_code for status in caught.value.statuses.values()] == [7, 7, 7, 7]


def test_environment_overrides_are_set_aside_and_come_back(monkeypatch):
    """CELERY_BROKER_URL beats an app's configuration; not while a cluster runs."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://nowhere:1//")
    with cluster.start(1, app=app):
        assert add.delay(2, 2).get(timeout=30) == 4
    assert os.environ["CELERY_BROKER_URL"] == "amqp://nowhere:1//"
