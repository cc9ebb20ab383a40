"""However a manager leaves, what it started is gone within five seconds."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tools import Traces

MANAGER = """
import os, sys, time
import cluster
from celery import Celery

app = Celery("leaver")

@app.task
def forever():
    time.sleep(600)

if __name__ == "__main__":
    c = cluster.start(2)
    running = [forever.delay() for _ in range(3)]
    print(c._broker.endpoint.port, flush=True)
    sys.stdin.readline()  # the test has seen that all is up
    {way}
"""

#: By the way of leaving: what the script does then, the signal that the test sends
#: (``None``: none), and the exit code.
WAYS = {
    "stop": ("c.stop()", None, 0),
    "end of the with block": ("with c: pass", None, 0),
    "exception": ("with c: raise RuntimeError('mine')", None, 1),
    "exception without with": ("raise RuntimeError('mine')", None, 1),
    "end of the script": ("pass", None, 0),
    "sys.exit": ("sys.exit(5)", None, 5),
    "os._exit": ("os._exit(6)", None, 6),
    "Ctrl-C": ("with c: running[0].get()", signal.SIGINT, -signal.SIGINT),
    "Ctrl-C without with": ("running[0].get()", signal.SIGINT, -signal.SIGINT),
    "SIGTERM": ("with c: running[0].get()", signal.SIGTERM, 143),
    "SIGTERM without with": ("running[0].get()", signal.SIGTERM, 143),
    "SIGHUP": ("running[0].get()", signal.SIGHUP, -signal.SIGHUP),
    "SIGKILL": ("running[0].get()", signal.SIGKILL, -signal.SIGKILL),
    "abort": ("os.abort()", None, -signal.SIGABRT),
}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str, tmp_path: Path, traces: Traces, eventually):
    """No worker, guardian, broker, temporary directory or port."""
    does, sent, code = WAYS[way]
    script = tmp_path / "leaver.py"
    script.write_text(MANAGER.replace("{way}", does))
    with subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as manager:
        assert manager.stdin is not None and manager.stdout is not None
        port = int(manager.stdout.readline())
        # Manager, guardian, server, fork server, two workers with a child each.
        assert len(traces.processes()) == 8
        assert listens(port)
        manager.stdin.write("go\n")
        manager.stdin.flush()
        if sent is not None:
            eventually(lambda: waits_for_a_result(manager.pid), "it waits in get()")
            manager.send_signal(sent)
        assert manager.wait(10) == code, manager.stderr.read()
        traces.check_gone()
        assert not listens(port)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell the server")
def test_no_process_outlives_manager_and_guardian(tmp_path: Path, traces: Traces, eventually):
    """kill -9 of every Python process at once; only the directory stays."""
    script = tmp_path / "leaver.py"
    script.write_text(MANAGER.replace("{way}", "running[0].get()"))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as manager:
        assert manager.stdout is not None
        manager.stdout.readline()
        for process in traces.processes():
            if "server" not in process.name():
                process.kill()
        manager.wait(10)
    eventually(lambda: not traces.processes(), "the server has ended, too", timeout=5)
    for left in traces.directory.iterdir():
        shutil.rmtree(left)


def waits_for_a_result(pid: int) -> bool:
    """It has taken the line that it waited for, and is past it."""
    return psutil.Process(pid).status() == psutil.STATUS_SLEEPING


def test_a_process_that_the_manager_forked_keeps_nothing_alive(
    tmp_path: Path, traces: Traces, eventually
):
    """A child by os.fork outlives the manager; broker and workers don't."""
    script = tmp_path / "forker.py"
    way = """
    child = os.fork()
    if child == 0:
        time.sleep(600)
    print(child, flush=True)
    os._exit(0)"""
    script.write_text(MANAGER.replace("\n    {way}", way))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as manager:
        assert manager.stdin is not None and manager.stdout is not None
        manager.stdout.readline()
        manager.stdin.write("go\n")
        manager.stdin.flush()
        child = int(manager.stdout.readline())
        manager.wait(10)
        eventually(
            lambda: [process.pid for process in traces.processes()] == [child],
            "only the child is left",
            timeout=5,
        )
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_normally_stops_nothing(tmp_path: Path, run_script):
    """Its interpreter's exit isn't the manager's."""
    script = tmp_path / "forker.py"
    script.write_text(
        """
import os, sys
import cluster
from celery import Celery
app = Celery("forker")
@app.task
def one(): return 1
if __name__ == "__main__":
    with cluster.start(1):
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        print(one.delay().get(timeout=20))
"""
    )
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_is_interrupted_leaves_nothing(
    tmp_path: Path, traces: Traces, eventually, sent: signal.Signals
):
    """While workers still import the app, which may never end."""
    script = tmp_path / "slow.py"
    script.write_text(
        """
import os, threading
from pathlib import Path
import cluster
from celery import Celery
app = Celery("slow")
@app.task
def one(): return 1
if __name__ == "__main__":
    cluster.start(2)
else:
    Path(__file__).with_name(f"importing-{os.getpid()}").touch()
    threading.Event().wait()
"""
    )
    with subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True) as manager:
        eventually(lambda: list(tmp_path.glob("importing-*")), "a worker imports the script")
        manager.send_signal(sent)
        assert manager.wait(10) == -sent
        traces.check_gone()
