"""What is around a worker's tasks: signals, environment, output, directory, descriptors.

One cluster for most of this module; its workers' own variables are in ``EXTRA``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import surroundapp
from surroundapp import (
    add,
    app,
    descriptors,
    die,
    dispositions,
    log,
    look,
    numbers,
    print_and_kill_the_worker,
    read_input,
    run,
    say,
    shell,
    start_a_cluster,
    start_a_process,
    write,
)
from tools import leaving_nothing, strip_environment

import cluster
from cluster.launchers.local import cpus

#: Seconds for a result. None of these tasks takes one.
SOON = 20


@pytest.fixture(autouse=True)
def traces() -> None:
    """Not around each test: the cluster is the module's, and so is the check."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def events(place: Path) -> Path:
    """What the signals' receivers write to."""
    return place / "events"


@pytest.fixture(scope="module", autouse=True)
def running(
    tmp_path_factory: pytest.TempPathFactory, place: Path, events: Path
) -> Iterator[cluster.Cluster]:
    """Two workers with one process each, of a manager with surroundings of its own."""
    (place / "added.py").write_text("value = 'found'\n")
    (place / "own").mkdir()
    before = Path.cwd(), os.umask(0o027)
    with pytest.MonkeyPatch.context() as monkeypatch, (place / "kept").open("w") as kept:
        strip_environment(monkeypatch)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONUNBUFFERED"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MKL_NUM_THREADS", "7")
        monkeypatch.setenv("PYTHONPATH", "own")
        monkeypatch.setenv("SURROUND_BEATEN", "manager")
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.chdir(place)
        os.set_inheritable(kept.fileno(), True)
        with (
            leaving_nothing(tmp_path_factory.mktemp("tmp"), monkeypatch),
            cluster.start(
                2,
                app=app,
                loglevel="INFO",
                environment={
                    "SURROUND_LOG": str(events),
                    "SURROUND_BEATEN": "worker",
                    "TZ": "Asia/Tokyo",
                    "NUMEXPR_NUM_THREADS": "5",
                },
            ) as c,
        ):
            yield c
        os.chdir(before[0])
        os.umask(before[1])


@pytest.fixture
def shown(eventually, monkeypatch) -> Callable[[], Callable[..., str]]:
    """Called in a test, takes over standard error; what that gives waits until all these have
    been shown there, and returns it. pytest's own capture loses what comes as it is read."""

    def begin() -> Callable[..., str]:
        said = io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)

        def wait(*expected: str) -> str:
            eventually(
                lambda: all(text in said.getvalue() for text in expected), f"{expected} are shown"
            )
            return said.getvalue()

        return wait

    return begin


@pytest.fixture(scope="module")
def twin(place: Path, running: cluster.Cluster) -> ModuleType:
    """The same app and tasks once more, for clusters of the tests' own."""
    (place / "surroundtwin.py").write_text(Path(surroundapp.__file__).read_text())
    return importlib.import_module("surroundtwin")


def ask(expression: str) -> object:
    return look.delay(expression).get(timeout=SOON)


# -- signals ----------------------------------------------------------------------------


def test_the_apps_signals_are_sent_once_for_each_worker_and_child(
    running: cluster.Cluster, events: Path, place: Path, eventually
):
    """Also those of a worker's start, although a receiver of each kind raises."""

    def seen(name: str) -> list[str]:
        lines = events.read_text().splitlines()
        return [line.split()[1] for line in lines if line.split()[0] == name]

    assert add.delay(1, 2).get(timeout=SOON) == 3
    for name in ("celeryd_after_setup", "worker_init", "worker_ready"):
        assert len(seen(name)) == len(set(seen(name))) == 2, name
    children = set(seen("worker_process_init"))
    assert len(seen("worker_process_init")) == len(children) == 2
    assert not children & set(seen("worker_ready"))
    eventually(lambda: len(seen("task_postrun")) == len(seen("task_prerun")) > 0, "both are sent")
    assert set(seen("task_prerun")) <= children
    replaced = die.delay(str(place / "died")).get(timeout=SOON)
    eventually(lambda: len(seen("worker_process_init")) == 3, "the replaced child has begun")
    assert max(Counter(seen("worker_process_init")).values()) == 1
    assert str(replaced) in seen("worker_process_init")
    assert any("on purpose" in line for lines in running.logs().values() for line in lines)


def test_workers_and_children_say_when_they_end(tmp_path: Path, twin, capsys):
    """``worker_process_shutdown`` and ``worker_shutdown``; what a child prints last is shown, and
    so is what a task printed without a newline."""
    events = tmp_path / "events"
    with cluster.start(
        2, app=twin.app, concurrency=2, environment={"SURROUND_LOG": str(events)}, progress=False
    ):
        twin.say.delay("unfinished", end=" ").get(timeout=SOON)
    count = Counter(line.split()[0] for line in events.read_text().splitlines())
    assert count["worker_process_init"] == count["worker_process_shutdown"] == 4
    assert count["worker_init"] == count["worker_shutdown"] == 2
    said = capsys.readouterr().err
    assert said.count("without a newline in worker_process_shutdown") == 4
    assert "unfinished without a newline" in said


LOGGING = """
import logging, sys
from celery import Celery, signals

app = Celery("own")

@signals.setup_logging.connect
def set_up(loglevel=None, **_):
    logging.basicConfig(stream=sys.stdout, level="DEBUG", format="MINE %(name)s %(message)s")

@app.task
def log_it():
    logging.getLogger("mine").debug("from a task")
    return [type(handler).__name__ for handler in logging.getLogger().handlers]
"""


def test_a_logging_set_up_of_the_users_own_is_the_only_one(module, capsys):
    module("own_logging", LOGGING)
    own = importlib.import_module("own_logging")
    with cluster.start(1, app=own.app, progress=False) as c:
        assert own.log_it.delay().get(timeout=SOON) == ["StreamHandler"]
        assert any("MINE mine from a task" in line for line in c.logs(tail=1000).popitem()[1])
    said = capsys.readouterr().err
    assert "| MINE mine from a task\n" in said


EXITS = """
import os, sys
from celery import Celery, signals

app = Celery("exits")

@signals.worker_init.connect
def leave(**_):
    sys.exit("there is no licence")
"""


def test_a_receiver_that_ends_its_worker_fails_the_start(module):
    """And soon, with what it said."""
    module("exits", EXITS)
    with pytest.raises(cluster.WorkersNotReady) as caught:
        cluster.start(1, app=importlib.import_module("exits").app, progress=False, timeout=30)
    assert caught.value.elapsed < 30
    assert "there is no licence" in str(caught.value)


# -- environment ------------------------------------------------------------------------


def test_what_is_given_to_workers_reaches_tasks_and_the_import_and_nobody_else(events: Path):
    assert ask("os.environ['SURROUND_LOG']") == str(events)
    assert ask("AT_IMPORT['SURROUND_LOG']") == str(events)
    assert ask("os.environ['SURROUND_BEATEN']") == "worker"
    assert os.environ["SURROUND_BEATEN"] == "manager"
    assert "SURROUND_LOG" not in os.environ
    assert surroundapp.LOG == ""


def test_no_task_sees_the_clusters_own_variables(running: cluster.Cluster):
    """Neither itself nor in a program it starts, and not in what the system shows of it."""
    secret = running._broker.endpoint.secret
    password = app.conf.broker_url.split(":")[2].split("@")[0]
    environment = ask("dict(os.environ)")
    printed = run.delay("env").get(timeout=SOON)
    shown = ask("Path('/proc/self/environ').read_bytes().decode(errors='replace')")
    above = ask("Path(f'/proc/{os.getppid()}/environ').read_bytes().decode(errors='replace')")
    for text in (str(environment), printed, str(shown), str(above)):
        assert secret not in text
        assert password not in text
    own = [name for name in environment if name.startswith("CLUSTER_")]
    assert set(own) <= {"CLUSTER_TEST_MARK", "CLUSTER_BROKER_SERVER"}
    lines = [line for line in printed.splitlines() if line.startswith("CLUSTER_")]
    assert len(lines) == len(own)
    assert not {"CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "C_FORCE_ROOT"} & set(environment)


def test_a_time_zone_in_the_environment_holds():
    """The process was there before the variable."""
    assert ask("time.strftime('%z')") == "+0900"
    assert run.delay("date", "+%z").get(timeout=SOON) == "+0900\n"


def test_numerical_libraries_get_their_share_of_the_cpus():
    """The workers' tasks at once share them; what the user says counts."""
    share = str(max(1, cpus() // 2))
    assert ask("os.environ['OMP_NUM_THREADS']") == share
    assert ask("AT_IMPORT['OPENBLAS_NUM_THREADS']") == share
    assert ask("os.environ['MKL_NUM_THREADS']") == "7"
    assert ask("os.environ['NUMEXPR_NUM_THREADS']") == "5"
    assert os.environ.get("OMP_NUM_THREADS") is None


# -- directory, search path, what a process inherits ------------------------------------


def test_directory_and_search_path_are_the_managers(place: Path):
    assert ask("os.getcwd()") == str(place)
    assert ask("os.path.exists('added.py')") is True
    assert ask("__import__('added').value") == "found"
    assert ask("sys.path") == [os.path.abspath(entry) for entry in sys.path]
    assert ask("sys.argv") == sys.argv


def test_programs_of_a_task_have_the_users_search_path():
    assert ask("os.environ['PYTHONPATH']") == "own"
    code = "import os, sys; print(os.getcwd() + '/own' in sys.path)"
    assert run.delay(sys.executable, "-c", code).get(timeout=SOON) == "True\n"


def test_umask_niceness_and_locale_are_the_managers(place: Path):
    made = place / "made"
    assert ask(f"Path({str(made)!r}).touch()") is None
    assert made.stat().st_mode & 0o777 == 0o640
    assert ask("os.nice(0)") == os.nice(0)
    assert ask("sys.getfilesystemencoding()") == sys.getfilesystemencoding()
    assert ask("sys.flags.utf8_mode") == sys.flags.utf8_mode


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows them")
def test_no_descriptor_of_the_managers_or_the_fork_servers_is_open_in_a_task(
    running: cluster.Cluster, place: Path
):
    """Nor of the other workers: each pipe and socket belongs to the worker alone."""
    [run] = running.launcher._runs.values()
    mine = descriptors.delay().get(timeout=SOON)
    others = {*_descriptors(os.getpid()), *_descriptors(run.server.pid)}
    others |= set(_descriptors(running._broker._guardian.pid))
    shared = {entry for entry in mine if entry in others}
    assert not [entry for entry in shared if not entry.startswith(("/dev/", "anon_inode:"))]
    assert str(place / "kept") not in mine
    assert not [entry for entry in mine if "forkserver.log" in entry or "guardian" in entry]


def _descriptors(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def test_signals_in_a_task_are_as_in_a_plain_worker():
    """None blocked, none of the fork server's or the main process's handlers."""
    found = dispositions.delay().get(timeout=SOON)
    assert found["SIGCHLD"] == str(signal.SIG_DFL)
    assert found["SIGPIPE"] == str(signal.SIG_IGN)
    assert found["SIGINT"] == str(signal.SIG_IGN)  # as Celery sets it in its pool
    assert found["SIGUSR2"] == str(signal.SIG_DFL)
    assert found["blocked"] == "[]"
    assert found["wake-up"] == "-1"
    assert "Membership" not in found["SIGTERM"] + found["SIGHUP"]


def test_programs_that_tasks_run_are_waited_for():
    assert shell.delay("exit 3").get(timeout=SOON) == 3
    assert shell.delay("yes | head -1 >/dev/null; kill -TERM $$").get(timeout=SOON) == -15


def test_random_numbers_differ_between_workers():
    found = [numbers.delay().get(timeout=SOON) for _ in range(30)]
    firsts = {process: (number, text) for process, number, text in reversed(found)}
    assert len({number for number, _ in firsts.values()}) == len(firsts)
    assert len({text for *_, text in found}) == len(found)


def test_standard_input_is_empty_and_pool_processes_are_daemons():
    assert read_input.delay().get(timeout=SOON) == ""
    assert "daemonic" in start_a_process.delay().get(timeout=SOON)


def test_a_cluster_in_a_task_is_refused():
    """As the task's own error, which says where it was."""
    with pytest.raises(cluster.StateError, match="in the task surroundapp.start_a_cluster"):
        start_a_cluster.delay().get(timeout=SOON)


# -- output -----------------------------------------------------------------------------


def test_what_tasks_print_is_shown_with_the_worker_before_it(running: cluster.Cluster, shown):
    wait = shown()
    ids = {worker.id for worker in running.status().workers}
    for task in (
        say.s("first\nsecond"),
        say.s("to stderr", "stderr"),
        shell.s("echo from a program; echo and its errors >&2"),
        log.s(logging.INFO, "logged at INFO"),
        write.s(b"not \xff UTF-8\n".hex()),
    ):
        task.delay().get(timeout=SOON)
    log.delay(logging.DEBUG, "logged at DEBUG").get(timeout=SOON)
    said = wait(
        "| first\n",
        "| second\n",
        "| to stderr\n",
        "| from a program\n",
        "| and its errors\n",
        "logged at INFO\n",
        "| not � UTF-8\n",
    )
    assert "logged at DEBUG" not in said
    assert {line.split(" | ")[0] for line in said.splitlines()} <= ids
    written = "\n".join(line for lines in running.logs(tail=1000).values() for line in lines)
    assert "said at import" in written
    assert "second" in written


def test_what_a_killed_worker_printed_is_shown(running: cluster.Cluster, place: Path, shown):
    wait = shown()
    once = place / "killed"
    result = print_and_kill_the_worker.delay("last words", str(once))
    assert result.get(timeout=SOON) == "again"
    wait("| last words\n")
    running.wait_for_workers(2, timeout=SOON)


def test_much_output_holds_nothing_up(running: cluster.Cluster, shown, eventually):
    """10 MB, of one line each kilobyte, and a line of a megabyte; all of it comes, whichever of
    the workers is the first."""
    wait = shown()
    write.delay((b"x" * 1023 + b"\n").hex(), 10 * 1024).get(timeout=SOON)
    write.delay((b"y" * 1024 * 1024).hex()).get(timeout=SOON)
    write.delay(b"\nall said\n".hex()).get(timeout=SOON)
    wait("| all said\n")
    eventually(lambda: wait().count("x" * 1023 + "\n") == 10 * 1024, "all lines are shown")
    assert any("all said" in lines[-5:] for lines in running.logs().values())


def test_output_goes_to_what_standard_error_is_now(eventually):
    """Replaced, closed, None, or such that it can't be written to for a while."""
    with contextlib.redirect_stderr(io.StringIO()) as replaced:
        say.delay("redirected").get(timeout=SOON)
        eventually(lambda: "| redirected\n" in replaced.getvalue(), "it is shown there")
    closed = io.StringIO()
    closed.close()
    written: list[str] = []

    class NoFlush:
        """What print() can do with."""

        def write(self, text: str) -> None:
            written.append(text)

    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (closed, None, narrow, NoFlush()):
        with contextlib.redirect_stderr(stream):  # type: ignore[type-var]
            say.delay("naïve").get(timeout=SOON)
            if isinstance(stream, NoFlush):
                eventually(lambda: "| naïve\n" in "".join(written), "it is shown there, too")
    with contextlib.redirect_stderr(io.StringIO()) as replaced:
        say.delay("at last").get(timeout=SOON)
        eventually(lambda: "| at last\n" in replaced.getvalue(), "it is shown as before")


def test_output_can_be_switched_off_and_logs_still_have_it(twin, capsys, eventually):
    """Meanwhile numerical libraries get at least one thread."""
    with cluster.start(
        1,
        app=twin.app,
        output=False,
        progress=False,
        concurrency=2 * cpus(),
        environment={"PYTHONPATH": "given", "SURROUND_LOG": os.devnull},
    ) as c:
        twin.say.delay("unseen").get(timeout=SOON)
        eventually(
            lambda: any("unseen" in lines for lines in c.logs(tail=1000).values()), "it is logged"
        )
        assert twin.look.delay("os.environ['OMP_NUM_THREADS']").get(timeout=SOON) == "1"
        assert twin.look.delay("os.environ['PYTHONPATH']").get(timeout=SOON) == "given"
    assert "unseen" not in capsys.readouterr().err
