"""The parts around a process: its command, its environment, its log, its display."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest

from cluster import interpreter, leaving
from cluster.logfile import last_lines
from cluster.progress import Display


def test_the_last_lines_of_a_log(tmp_path: Path):
    log = tmp_path / "log"
    assert last_lines(log, 5) == []
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(10_000)) + b"\xff")
    assert last_lines(log, 3) == ["line 9998", "line 9999", "\ufffd"]
    assert last_lines(log, 0) == []
    assert len(last_lines(log, 100_000)) == 10_001


def test_a_started_module_gets_our_search_path_and_gives_back_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    monkeypatch.setattr(sys, "path", ["", "/a"])
    given = interpreter.module_environment(interpreter.original_python_path())
    assert given["PYTHONPATH"] == f"{Path.cwd()}:/a"
    monkeypatch.setenv("PYTHONPATH", given["PYTHONPATH"])
    monkeypatch.setenv("CLUSTER_PYTHONPATH", given["CLUSTER_PYTHONPATH"])
    interpreter.restore_search_path('["/x", "/y:z"]')
    assert sys.path == ["/x", "/y:z"]
    assert os.environ["PYTHONPATH"] == "/users/own"
    assert "CLUSTER_PYTHONPATH" not in os.environ


def test_off_a_terminal_each_change_is_one_line(capsys):
    with Display(None) as display:
        for second in range(3):
            display.show("1 of 2", timing=f"{second} s")
        display.show("2 of 2 [not markup]")
        display.say("all ready")
    assert capsys.readouterr().err.splitlines() == ["1 of 2", "2 of 2 [not markup]", "all ready"]


def test_without_progress_nothing_is_shown(capsys):
    with Display(False) as display:
        display.show("1 of 2")
        display.say("all ready")
    assert capsys.readouterr() == ("", "")


def test_with_standard_error_closed_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with Display(None) as display:
        display.show("1 of 2")
    assert capsys.readouterr().out == ""


def test_interrupts_wait_until_they_do_no_harm():
    steps = []

    def interrupted() -> None:
        with leaving.interrupts_held() as hurry:
            assert not hurry.asked
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert hurry.asked
            steps.append("went on")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_interrupt_is_not_raised_twice():
    """A with block that Ctrl-C left is being closed when the second one comes."""

    def leave() -> None:
        try:
            raise KeyboardInterrupt("the first")
        finally:
            with leaving.interrupts_held():
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="the first"):
        leave()


def test_a_worker_ends_with_its_watchdog(monkeypatch):
    """A mistake in the thread isn't the end of the thread alone."""
    from cluster.model import Endpoint
    from cluster.worker import watchdog as module
    from cluster.worker.drain import Drain

    class Ended(BaseException):
        pass

    def end_now(code: int) -> None:
        raise Ended(code)

    def mistake() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "end_now", end_now)
    watchdog = module.Watchdog(
        Endpoint("127.0.0.1", 1, "00" * 32),
        node="n@h",
        parent=0,
        liveness_timeout=10,
        orphan_timeout=1,
        drain=Drain(),
    )
    monkeypatch.setattr(watchdog, "_check", mistake)
    with pytest.raises(Ended, match="1"):
        watchdog.run()


def test_what_is_left_at_exit_is_stopped_in_this_process_only(monkeypatch):
    stopped = []
    monkeypatch.setattr(leaving, "_stops", {})
    leaving.add(1, lambda: stopped.append(1))
    leaving.add(2, lambda: stopped.append(2))
    leaving.remove(2)
    leaving._stops[3] = (os.getpid() + 1, lambda: stopped.append(3))
    leaving._stop_all()
    assert stopped == [1]
    leaving.remove(1)
    leaving.remove(3)


def test_sigterm_becomes_an_exit_while_a_cluster_lives(monkeypatch):
    monkeypatch.setattr(leaving, "_stops", {})
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    leaving.add(1, lambda: None)
    with pytest.raises(SystemExit) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "a second one can't interrupt that"
    signal.signal(signal.SIGTERM, leaving._on_sigterm)
    leaving.remove(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_hands_back_after_what_has_ended_is_acknowledged(monkeypatch):
    """Celery puts the acknowledgement off to the loop's next turn, in no order among the others."""
    from celery.worker import state
    from kombu.asynchronous import Hub

    from cluster.worker import drain as drain_module

    done: list[str] = []
    monkeypatch.setattr(state, "should_stop", None)
    monkeypatch.setattr(drain_module, "stop_taking", lambda: None)
    monkeypatch.setattr(drain_module.Drain, "_hand_back", lambda _: not done.append("handed back"))
    hub = Hub()
    try:
        drain = drain_module.Drain()
        drain.attach(hub)
        drain.begin(0, 10)
        # One turn: the loop hears that it is over, and that a task has ended.
        drain._on_wake()
        hub.call_soon(done.append, "acknowledged")
        while state.should_stop is None:
            hub.run_once()
    finally:
        hub.close()
    assert done == ["acknowledged", "handed back"]


def test_a_fork_in_the_middle_of_showing_output_hangs_neither_side(monkeypatch):
    """It waits for the write, but not for ever; the child can write at once."""
    from cluster.launchers import echo

    writing, go = threading.Event(), threading.Event()

    class Slow:
        def write(self, text: str) -> None:
            writing.set()
            go.wait(30)

        def flush(self) -> None: ...

    monkeypatch.setattr(echo, "FORK_TIMEOUT", 0.1)
    monkeypatch.setattr(sys, "stderr", Slow())
    thread = threading.Thread(target=echo._write, args=("x",))
    thread.start()
    writing.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forks and threads
        child = os.fork()
    if child == 0:
        os._exit(3 if echo._writing.acquire(blocking=False) else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    go.set()
    thread.join(30)
    assert echo._writing.acquire(timeout=1)
    echo._writing.release()
