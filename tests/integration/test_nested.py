"""More than one cluster, one after the other and at once; and more than one process or thread."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import copy
import gc
import importlib
import io
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import canvasapp
import celery
import kombu.pools
import psutil
import pytest
import sampleapp
from sampleapp import add, app, where
from tools import descriptors_of, leaving_nothing, strip_environment

import cluster
from cluster.wire import backend

#: Seconds for a result. None of these tasks takes one.
SOON = 20

# From Python 3.12 on, every fork in a process with threads is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def traces() -> None:
    """Not around each test: a cluster is the module's, and so is the check."""


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A cluster that runs all the while, of ``sampleapp``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        strip_environment(monkeypatch)
        with (
            leaving_nothing(tmp_path_factory.mktemp("tmp"), monkeypatch),
            cluster.start(2, app=app, progress=False) as c,
        ):
            yield c


@pytest.fixture(autouse=True)
def goes_on(running: cluster.Cluster) -> Iterator[None]:
    """Whatever a test does, the module's cluster works after it."""
    workers = running.workers
    yield
    assert add.delay(20, 3).get(timeout=SOON) == 23
    assert running.workers == workers


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Another app, in a module of its own."""
    directory = tmp_path_factory.mktemp("second")
    # A name of its own each time: side by side with others, this may be made twice in a process.
    name = f"second_{secrets.token_hex(4)}"
    (directory / f"{name}.py").write_text(SECOND)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(directory))
        yield importlib.import_module(name)
    del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- more than one ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["last in, first out", "first in, first out"])
def test_two_clusters_at_once_have_their_own_tasks_and_workers(order: str, second: ModuleType):
    """Beside the module's: calls interleaved, ended in any order."""
    before = dict(canvasapp.app.conf), dict(second.app.conf)
    with (
        cluster.start(1, app=canvasapp.app, progress=False) as a,
        cluster.start(1, app=second.app, progress=False) as b,
    ):
        urls = {each.conf.broker_url for each in (app, canvasapp.app, second.app)}
        assert len(urls) == 3
        calls = [(canvasapp.add.delay(i, 1), second.name.delay(), where.delay()) for i in range(10)]
        for i, (added, named, _) in reversed(list(enumerate(calls))):
            assert (added.get(timeout=SOON), named.get(timeout=SOON)) == (i + 1, b.workers[0])
        waiting = {
            a: canvasapp.add.apply_async((1, 1), queue="nobodys"),
            b: second.name.apply_async(queue="nobodys"),
        }
        ends, stays = (b, a) if order.startswith("last") else (a, b)
        ends.stop()
        with pytest.raises(cluster.ClusterError, match="stopped"):
            waiting[ends].get(timeout=SOON)
        if stays is a:
            assert canvasapp.add.delay(1, 1).get(timeout=SOON) == 2
        else:
            assert second.name.delay().get(timeout=SOON) == b.workers[0]
        stays.stop()
    assert (dict(canvasapp.app.conf), dict(second.app.conf)) == before


SECOND = """
from celery import Celery

app = Celery("second")

@app.task(bind=True)
def name(self):
    return self.request.hostname
"""

LIBRARY = """
import cluster
from celery import Celery, shared_task

app = Celery("library", set_as_current={current})

@app.task(bind=True)
def inside(self, x):
    return [x, self.request.hostname]

@shared_task(bind=True)
def shared(self):
    return self.app.main

def compute(n):
    with cluster.start(1, app=app, progress=False) as c:
        found = [inside.delay(i).get(timeout=30) for i in range(n)]
        assert {{name for _, name in found}} == set(c.workers)
        return [x for x, _ in found]
"""

SCRIPT = """
import os
import cluster
import celery
from celery import Celery
{first}
app = Celery("script")
{second}

@app.task(bind=True)
def outside(self, x):
    return [x, self.request.hostname]

if __name__ == "__main__":
    with cluster.start(1, progress=False) as c:
        print(c.app.main)
        before = outside.delay(1)
        print(library.compute(3), outside.delay(2).get(timeout=30) == [2, c.workers[0]])
        print(before.get(timeout=30)[0])
        print(library.shared.delay().get(timeout=30), celery.current_app.main)
    print(os.environ["CELERY_BROKER_URL"], app.conf.broker_url)
"""


@pytest.mark.parametrize(
    "first", [True, False], ids=["library imported first", "library keeps out of the way"]
)
def test_a_library_may_use_a_cluster_inside_anothers(
    first: bool, tmp_path: Path, run_script, monkeypatch
):
    """Each app's tasks go to its own workers, and ``shared_task`` to those of the current app:
    of the script's, if it was made last or the library's isn't made current. What the
    environment says of brokers is back at the end."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://elsewhere")
    write(tmp_path / "library.py", LIBRARY.format(current=first))
    places = {"first": "import library", "second": ""}
    if not first:
        places = {"first": "", "second": "import library"}
    script = write(tmp_path / "script.py", SCRIPT.format(**places))
    done = run_script(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "script",
        "[0, 1, 2] True",
        "1",
        "script script",
        "amqp://elsewhere amqp://elsewhere",
    ]


def test_a_start_without_an_app_means_celerys_current_one(tmp_path: Path, run_script):
    """The one made last, as with Celery: of a library that was imported after, if it makes one.
    What starts is said, and ``app=`` says another."""
    write(tmp_path / "library.py", LIBRARY.format(current=True))
    script = write(
        tmp_path / "script.py",
        "import cluster\nfrom celery import Celery\napp = Celery('script')\nimport library\n"
        "if __name__ == '__main__':\n"
        "    with cluster.start(0) as c, cluster.start(0, app=app) as d:\n"
        "        print(c.app.main, d.app.main)\n",
    )
    done = run_script(script, cwd=tmp_path)
    assert done.stdout == "library script\n", done.stderr
    assert "the app library" in done.stderr
    assert "the app script" in done.stderr


def test_ten_clusters_of_one_app_leave_no_more_than_one():
    """Threads, descriptors, objects, handlers of the end, and pools that kombu keeps."""
    alive = []

    def measure() -> dict[str, object]:
        gc.collect()
        return {
            "threads": threading.active_count(),
            # The cluster that runs all the while opens its workers' logs for a moment to show them.
            "descriptors": min(len(descriptors_of(psutil.Process())) for _ in range(20)),
            "connections": len(kombu.pools.connections),
            "producers": len(kombu.pools.producers),
            "at exit": atexit._ncallbacks(),
            "clusters": sum(reference() is not None for reference in alive),
        }

    counts = []
    for i in range(10):
        with cluster.start(int(i in {0, 9}), app=canvasapp.app, progress=False) as c:
            if c.workers:
                assert canvasapp.add.delay(i, 1).get(timeout=SOON) == i + 1
            alive.append(weakref.ref(c))
        del c
        counts.append(measure())
    assert counts[1] == counts[-1]
    assert counts[-1]["clusters"] <= 1


# -- everything is as it was -------------------------------------------------------------


def test_nothing_of_the_process_differs_afterwards(tmp_path: Path, module, monkeypatch):
    """Whatever way the apps got their configuration."""
    module("nestedconfig", "broker_url = 'amqp://of-the-module'\ntask_acks_late = False\n")
    monkeypatch.setenv("NESTED_CONFIG", "nestedconfig")
    apps = [
        celery.Celery("by_constructor", broker="amqp://a", backend="rpc://", set_as_current=False),
        celery.Celery("by_update", set_as_current=False),
        celery.Celery("by_object", set_as_current=False),
        celery.Celery("by_variable", set_as_current=False),
        celery.Celery("unread", set_as_current=False),
    ]
    apps[1].conf.update(broker_url="amqp://b", broker_transport_options={"x": [1]})
    apps[2].config_from_object("nestedconfig")
    apps[3].config_from_envvar("NESTED_CONFIG")
    names = _importable(module, apps)
    before = _process(apps[:-1])
    with contextlib.ExitStack() as stack:
        for each, name in zip(apps, names, strict=True):
            c = stack.enter_context(cluster.start(0, app=each, progress=False))
            assert c.app is each, name
            assert each.conf.broker_url.startswith("redis://:")
    after = _process(apps[:-1])
    for what, value in before.items():
        assert after[what] == value, what
    twin = celery.Celery("unread", set_as_current=False)
    assert dict(apps[-1].conf) == dict(twin.conf)


def _importable(module: Callable[[str, str], str], apps: list[celery.Celery]) -> list[str]:
    """Put them into a module, where workers would find them."""
    module("nestedapps", "")
    made = importlib.import_module("nestedapps")
    for each in apps:
        setattr(made, each.main, each)
    return [each.main for each in apps]


def _process(apps: list[celery.Celery]) -> dict[str, object]:
    root = logging.getLogger()
    return {
        "configurations": [_settings(each.conf) for each in apps],
        "changes": [_settings(each.conf.changes) for each in apps],
        "backends": [each.backend_cls for each in apps],
        "environment": dict(os.environ),
        "search path": list(sys.path),
        "directory": Path.cwd(),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "root logger": (root.level, list(root.handlers), logging.root.manager.disable),
        "our logger": (logging.getLogger("cluster").level, logging.getLogger("cluster").handlers),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "main": sys.modules["__main__"],
        "threads": set(threading.enumerate()),
        "connections": dict(kombu.pools.connections),
        "producers": dict(kombu.pools.producers),
        "current app": celery.current_app._get_current_object(),
        "time-out": socket.getdefaulttimeout(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "umask": _umask(),
    }


def _settings(found: Mapping[str, object]) -> dict[str, object]:
    """Without what else a module has that settings came from."""
    return copy.deepcopy({key: found[key] for key in found if not key.startswith("__")})


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- threads ----------------------------------------------------------------------------


def test_two_threads_start_at_once_and_another_stops(second: ModuleType):
    """While the main thread goes on working with a third."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        a = pool.submit(cluster.start, 1, app=canvasapp.app, progress=False)
        b = pool.submit(cluster.start, 1, app=second.app, progress=False)
        while not (a.done() and b.done()):
            assert add.delay(1, 2).get(timeout=SOON) == 3
        a.result()
        assert canvasapp.add.delay(1, 2).get(timeout=SOON) == 3
        assert second.name.delay().get(timeout=SOON) == b.result().workers[0]
        stops = [pool.submit(each.result().stop) for each in (a, b)]
        for stop in stops:
            stop.result(SOON)
        # At once for one app: one gets it, the other is told.
        starts = [
            pool.submit(cluster.start, 0, app=canvasapp.app, progress=False) for _ in range(2)
        ]
        errors = [error for start in starts if (error := start.exception(SOON)) is not None]
        assert [type(error) for error in errors] == [cluster.StateError]
        [started] = [start.result() for start in starts if start.exception() is None]
        started.stop()
    assert canvasapp.app.backend_cls is None


def test_a_start_inside_an_event_loop():
    """It blocks the loop, and leaves its signal handling as it was."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        try:
            with cluster.start(1, app=canvasapp.app, progress=False):
                value = canvasapp.add.delay(1, 2).get(timeout=SOON)
                value += await asyncio.to_thread(canvasapp.add.delay(3, 4).get, timeout=SOON)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait_for(called.wait(), SOON)
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)
        return value

    assert asyncio.run(main()) == 10


def test_a_users_own_signal_handling_survives():
    """Handlers, one that reaps all children included, and the wake-up descriptor."""
    called = []

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                called.append("child")

    def note(number: int, _frame: object) -> None:
        called.append(signal.Signals(number).name)

    handlers = {signal.SIGCHLD: reap, signal.SIGTERM: note, signal.SIGINT: note}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    read, wake = os.pipe()
    os.set_blocking(wake, False)
    wake_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        with cluster.start(1, app=canvasapp.app, progress=False):
            assert canvasapp.add.delay(1, 2).get(timeout=SOON) == 3
            assert {number: signal.getsignal(number) for number in handlers} == handlers
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        assert {"SIGTERM", "SIGINT", "child"} <= set(called)
    finally:
        assert signal.set_wakeup_fd(wake_before) == wake
        os.close(read)
        os.close(wake)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ignored_child_signals_do_no_harm(eventually):
    """SIGCHLD ignored, which programs inherit."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with cluster.start(1, app=canvasapp.app, progress=False) as c:
            os.kill(canvasapp.app.control.inspect().stats()[c.workers[0]]["pid"], 9)
            eventually(lambda: canvasapp.add.delay(1, 2).get(timeout=SOON) == 3, "it goes on")
    finally:
        signal.signal(signal.SIGCHLD, before)


# -- processes --------------------------------------------------------------------------


def work(number: int) -> list[int]:
    """In a child: many tasks, some waited for out of order."""
    results = [add.delay(number * 1000, i) for i in range(20)]
    return [result.get(timeout=SOON) for result in reversed(results)]


def right(number: int) -> list[int]:
    return [number * 1000 + i for i in reversed(range(20))]


def by_fork(numbers: range) -> list[list[int]]:
    """Bare os.fork; the children answer through pipes."""
    ends = []
    for number in numbers:
        read, write_end = os.pipe()
        if os.fork() == 0:
            code = 1
            try:
                os.write(write_end, repr(work(number)).encode())
                code = 0
            except BaseException as error:  # noqa: BLE001
                os.write(write_end, repr(repr(error)).encode())
            finally:
                os._exit(code)
        os.close(write_end)
        ends.append(read)
    found = []
    for read in ends:
        with os.fdopen(read) as file:
            found.append(eval(file.read()))
        os.wait()
    return found


def by_context(numbers: range) -> list[list[int]]:
    with multiprocessing.get_context("fork").Pool(len(numbers)) as pool:
        return pool.map(work, numbers)


def by_executor(numbers: range) -> list[list[int]]:
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(len(numbers), mp_context=context) as pool:
        return list(pool.map(work, numbers))


@pytest.mark.parametrize("way", [by_fork, by_context, by_executor])
def test_forked_children_use_the_app_and_results_are_not_mixed_up(way):
    """Nor with those of the manager, which waits for some meanwhile, and before, and after."""
    pending = [add.delay(500_000, i) for i in range(10)]
    assert pending[0].get(timeout=SOON) == 500_000
    over = threading.Event()
    mine: list[int] = []

    def go_on() -> None:
        while not over.is_set():
            mine.append(add.delay(-1, -len(mine)).get(timeout=SOON))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        assert way(range(1, 4)) == [right(number) for number in range(1, 4)]
    finally:
        over.set()
        thread.join()
    assert mine == [-1 - i for i in range(len(mine))]
    assert [result.get(timeout=SOON) for result in pending] == [500_000 + i for i in range(10)]


def test_a_forked_child_waits_for_no_lock_of_its_parents(eventually):
    """One that another thread holds at that moment is held in the child for ever."""
    assert add.delay(1, 2).get(timeout=SOON) == 3
    client = app.backend.client
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with client.connection_pool._lock, client._subscriptions._lock:
            held.set()
            over.wait(SOON)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(SOON)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(work(1) != right(1))
            finally:
                os._exit(code)
    finally:
        over.set()
        thread.join()
    process = psutil.Process(child)
    try:
        eventually(lambda: process.status() == psutil.STATUS_ZOMBIE, "it is done")
    finally:
        process.kill()
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_forked_child_that_waits_is_told_when_the_cluster_is_gone():
    """Not at once: it takes the broker for one that is restarted, for a while."""
    read_end, write_end = os.pipe()
    with cluster.start(0, app=canvasapp.app, progress=False):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                backend.ORPHAN_TIMEOUT = 0.3
                result = canvasapp.add.delay(1, 2)
                os.write(write_end, b"sent")
                result.get(timeout=SOON)
            except cluster.BrokerLost:
                code = 7
            finally:
                os._exit(code)
        os.close(write_end)
        assert os.read(read_end, 4) == b"sent"
    os.close(read_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def with_url(url: str) -> int:
    """In a child that begins anew: it knows nothing of the cluster but what it is given."""
    sampleapp.app.conf.update(broker_url=url, result_backend=url)
    return sampleapp.add.delay(1, 2).get(timeout=SOON)


def test_children_that_begin_anew_need_the_brokers_url(tmp_path: Path, run_script, monkeypatch):
    """They are as any other Celery client."""
    script = write(
        tmp_path / "script.py",
        "import multiprocessing, cluster\n"
        "from sampleapp import app\n"
        "from test_nested import with_url\n"
        "if __name__ == '__main__':\n"
        "    with cluster.start(1, app=app):\n"
        "        for method in ('spawn', 'forkserver'):\n"
        "            with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "                print(pool.apply(with_url, (app.conf.broker_url,)))\n",
    )
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    done = run_script(script)
    assert done.stdout == "3\n3\n", done.stderr


ENDS = """
import os, signal, sys
import cluster
from celery import Celery

app = Celery("ends")

@app.task
def add(x, y):
    return x + y

def child(way):
    pid = os.fork()
    if pid:
        return pid
    if way == "exit":
        sys.exit(5)
    if way == "error":
        raise ValueError("of a child")
    if way == "stop":
        c.stop()
        sys.exit(6)
    if way == "leave":
        with c:
            sys.exit(7)
    if way == "look":
        print(c, c.status().state, len(c.workers), c.state, flush=True)
        sys.exit(8)
    if way == "same app":
        try:
            cluster.start(1, app=app, progress=False)
        except cluster.StateError as error:
            print(error, flush=True)
        sys.exit(9)
    if way == "other app":
        other = Celery("other")
        with cluster.start(1, app=other, progress=False) as d:
            print(other.control.ping(timeout=10, limit=1, destination=d.workers) != [])
        sys.exit(10)
    signal.pause()

if __name__ == "__main__":
    with cluster.start(1, progress=False) as c:
        add.delay(1, 2).get(timeout=30)
        for way in ("exit", "error", "stop", "leave", "look", "same app", "other app",
                    "kill", "terminate"):
            pid = child(way)
            if way in ("kill", "terminate"):
                os.kill(pid, signal.SIGKILL if way == "kill" else signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(way, code, add.delay(1, 2).get(timeout=30), c.state, flush=True)
    print(c.state)
"""


def test_no_way_a_forked_child_ends_stops_the_cluster(tmp_path: Path, run_script):
    """And a child ends as it would without one. It may have a cluster of its own; the app that
    the manager's uses isn't free for it."""
    done = run_script(write(tmp_path / "script.py", ENDS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for way, code in {
        "exit": 5,
        "error": 1,
        "stop": 6,
        "leave": 7,
        "look": 8,
        "same app": 9,
        "other app": 10,
        "kill": -9,
        "terminate": -15,
    }.items():
        assert f"{way} {code} 3 ready" in lines, (way, done.stdout, done.stderr)
    assert lines[-1] == "stopped"
    assert any("belongs to a cluster that still runs" in line for line in lines)
    assert "True" in lines


# -- the wrong place, the wrong time -----------------------------------------------------

ATEXIT = """
import atexit, threading

app = None

def last():
    import cluster
    try:
        with cluster.start(1, app=app, progress=False):
            print("started", add.delay(1, 2).get(timeout=10), flush=True)
    except (cluster.ClusterError, RuntimeError) as error:
        print("refused", error, flush=True)

if __name__ == "__main__":
    atexit.register(last)

from celery import Celery

app = Celery("last")

@app.task
def add(x, y):
    return x + y

def wait():
    try:
        print(add.apply_async((1, 2), queue="nobodys").get(timeout=60), flush=True)
    except BaseException as error:
        print("told", type(error).__name__, flush=True)

if __name__ == "__main__":
    import cluster
    c = cluster.start(1, progress=False)
    add.delay(1, 2).get(timeout=10)
    threading.Thread(target=wait, daemon=True).start()
    while not c._client.llen("nobodys"):
        pass
"""


def test_the_interpreters_end(tmp_path: Path, run_script):
    """A daemon thread that waits for a result holds nothing up, and a start in a handler of the
    end works or is refused, but doesn't hang."""
    done = run_script(write(tmp_path / "script.py", ATEXIT), cwd=tmp_path, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "started 3" in done.stdout or "refused" in done.stdout, done.stderr
    assert "Fatal" not in done.stderr


def test_a_start_as_a_worker_imports_a_module_is_refused(module):
    """With the reason, in the error of the manager's start."""
    module(
        "starts",
        "import os, cluster\nfrom celery import Celery\napp = Celery('starts')\n"
        "if 'START_IT' in os.environ:\n    cluster.start(1, app=app)\n",
    )
    with pytest.raises(cluster.WorkersNotReady) as caught:
        cluster.start(
            1,
            app=importlib.import_module("starts").app,
            environment={"START_IT": "yes"},
            progress=False,
        )
    assert "cluster.start was called inside a worker" in str(caught.value)


def test_a_thread_that_outlives_a_cluster_uses_the_next_one():
    """Celery keeps a backend for each thread; the one of a cluster that is gone is of no use."""

    def use() -> int:
        return canvasapp.add.delay(1, 2).get(timeout=SOON)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            with cluster.start(1, app=canvasapp.app, progress=False):
                assert pool.submit(use).result() == 3
                assert use() == 3
        c = cluster.start(1, app=canvasapp.app, progress=False)
        assert use() == 3
        pool.submit(c.stop).result()
        with cluster.start(1, app=canvasapp.app, progress=False):
            assert use() == 3


def test_what_the_environment_says_is_set_aside_for_each_start(monkeypatch):
    """Also if it came when another cluster ran already."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://elsewhere")
    with cluster.start(0, app=canvasapp.app, progress=False):
        assert canvasapp.app.conf.broker_url.startswith("redis://:")
        assert app.conf.broker_url.startswith("redis://:")


@pytest.mark.parametrize("stream", ["closed", "ascii", "write alone"])
def test_a_start_shows_what_it_can_where_standard_error_is_odd(stream: str):
    made: Any = io.StringIO()
    if stream == "closed":
        made.close()
    elif stream == "ascii":
        made = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    else:
        made = type("WriteAlone", (), {"write": lambda _self, _text: None})()
    with contextlib.redirect_stderr(made), cluster.start(0, app=canvasapp.app):
        pass
