"""The guardian: a small process that owns the broker, so that the user's process needn't.

A user's process may hold the GIL for seconds on end, or end without a word.
The guardian starts the server, starts it again on its port when it dies, gives
a dead worker's messages back, and when the manager's pipe closes it ends the
server, removes the run's directory and ends.

It runs as ``python -m cluster.broker.guardian``, in a session of its own; see
:mod:`cluster.broker.messages` for what goes in and out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.attention import Attention
from cluster.broker.messages import Alive, Event, Failed, Order, Restarted, Started
from cluster.broker.server import (
    START_TIMEOUT,
    answers,
    configuration,
    write_certificate,
    write_configuration,
)
from cluster.companion import Leash
from cluster.jsonlines import decode, encode
from cluster.logfile import last_lines
from cluster.model import Endpoint
from cluster.parent import end_with_parent
from cluster.restarts import Restarts

if TYPE_CHECKING:
    from cluster.broker.room import Memory
    from cluster.broker.workers import Workers

#: Seconds between looks at the pipe, the server and the workers' connections.
#: Two looks make a death: half of the 0.1 s in which a lost task should run again.
TICK = 0.02

#: Seconds between looks at whether the server is up, at first.
FIRST_TICK = 0.005

#: As START_TIMEOUT, for one that has the data of a large queue to load.
RESTART_TIMEOUT = 30.0

#: Seconds within which one that says that it loads must say so again, or answer.
LOADING_ALLOWANCE = 10.0

#: Seconds for one command to the server: the loop must come round to its other duties.
COMMAND_TIMEOUT = 1.0

#: Seconds between looks at whether the server answers, while nothing else asks it.
PROBE_EVERY = 1.0

#: Seconds for a turn while the server doesn't answer: some commands' time-outs.
LONGEST_TURN = 5.0

#: Seconds between words to the manager that we are at work.
ALIVE_EVERY = 1.0

#: Seconds for the kernel to end the server after SIGKILL.
KILL_TIMEOUT = 10.0

#: Ports to try when another process was faster in taking the one just found free.
PORT_ATTEMPTS = 5

#: Seconds that workers get at the end to hear of it before the server goes.
FAREWELL = 1.5

#: Lines of the server's log that go into an error.
LOG_TAIL = 20


class ServerFailed(Exception):
    """The server ended or didn't answer."""


class Guardian:
    """The loop around one server process."""

    def __init__(self, order: Order, leash: Leash) -> None:
        self.order = order
        self.directory = Path(order.directory)
        self.log = self.directory / "broker.log"
        self.port = 0
        self.server: subprocess.Popen[bytes] | None = None
        self._leash = leash
        # It takes a liveness time-out to see that one hangs.
        self._restarts = Restarts(limit=5, window=30.0 + 5 * order.liveness_timeout)
        self._workers: Workers | None = None
        self._memory: Memory | None = None
        self._attention = Attention(longest=LONGEST_TURN)
        self._answered = 0.0  # when the server last did
        self._next_probe = 0.0
        self._next_word = 0.0

    # -- life -----------------------------------------------------------------

    def run(self) -> None:
        """Until the manager is gone or the server can't be kept."""
        try:
            if self._start_first():
                self._watch()
                self._say_farewell()
        finally:
            self._end_server()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start_first(self) -> bool:
        for attempt in range(PORT_ATTEMPTS):
            self.port = self.order.port or free_port(self.order.host)
            try:
                self._start_server(RESTART_TIMEOUT if self.order.port else START_TIMEOUT)
            except ServerFailed as error:
                log = last_lines(self.log, LOG_TAIL)
                self._end_server()
                taken = any("already in use" in line for line in log)
                if taken and attempt + 1 < PORT_ATTEMPTS and not self._leash.gone:
                    continue
                self._emit(Failed(str(error), tuple(log)))
                return False
            assert self.server is not None
            self._emit(Started(self.port, self.server.pid))
            return True
        return False

    def _start_server(self, timeout: float) -> None:
        """Start the server on ``self.port`` and wait until it answers."""
        settings = configuration(
            endpoint=self._endpoint,
            directory=self.order.directory,
            workers=self.order.workers,
            memory=self.order.memory,
        )
        if self._endpoint.tls:
            write_certificate(self._endpoint, self.directory)
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [self.order.server, "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # When somebody kills the guardian as well as the manager.
                preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 (no threads here)
            )
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.server.stdin as stdin:
            stdin.write(os.fsencode(write_configuration(settings)))
        self._wait_for_answer(time.monotonic() + timeout)

    def _wait_for_answer(self, deadline: float) -> None:
        assert self.server is not None
        while True:
            code = self.server.poll()
            if code is not None:
                raise ServerFailed(f"{self.order.server} ended with code {code} as it started")
            try:
                answers(self._endpoint, COMMAND_TIMEOUT)
                return
            except OSError as error:
                last = error
                if "-LOADING" in str(error):  # it lives, and has much to read
                    deadline = max(deadline, time.monotonic() + LOADING_ALLOWANCE)
            if time.monotonic() >= deadline:
                raise ServerFailed(f"{self.order.server} doesn't answer ({last})")
            if self._leash.wait(seconds=FIRST_TICK):
                raise ServerFailed("the manager is gone")
            self._say_alive()

    def _watch(self) -> None:
        self._answered = self._attention.look(time.monotonic())
        while not self._leash.wait(seconds=TICK):
            assert self.server is not None
            self._say_alive()
            if self._workers is None and self._leash.line() is not None:
                self._begin_to_look_after_workers()
            now = self._attention.look(time.monotonic())
            if self._server_answers(now):
                self._answered = now
            code = self.server.poll()
            if code is not None:
                reason = f"it ended with code {code}"
            elif now - self._answered >= self.order.liveness_timeout:
                reason = f"it hadn't answered for {self.order.liveness_timeout:g} s"
            else:
                continue
            if not self._restart(reason):
                return
            self._answered = self._attention.look(time.monotonic())

    def _begin_to_look_after_workers(self) -> None:
        # What these import takes as long as a worker to start, so not before.
        from cluster.broker.room import Memory
        from cluster.broker.workers import Workers
        from cluster.wire.client import connect

        client = connect(self._endpoint, COMMAND_TIMEOUT)
        self._memory = Memory(client, self.order.memory)
        self._workers = Workers(
            client,
            patience=self.order.liveness_timeout,
            max_deliveries=self.order.max_deliveries,
            timeout=COMMAND_TIMEOUT,
        )
        if self.order.port:
            self._workers.broker_was_away()

    def _server_answers(self, now: float) -> bool:
        """Do what there is to do with the server, and tell whether it answered."""
        if self._workers is not None and self._memory is not None:
            answered, dead = self._workers.look()
            for event in [*dead, *(self._memory.look(now) if answered else ())]:
                self._emit(event)
            return answered
        if now < self._next_probe:
            return False
        self._next_probe = now + PROBE_EVERY
        try:
            answers(self._endpoint, COMMAND_TIMEOUT)
        except OSError:
            return False
        return True

    def _say_alive(self) -> None:
        now = time.monotonic()
        if now >= self._next_word:
            self._next_word = now + ALIVE_EVERY
            self._emit(Alive())

    def _restart(self, reason: str) -> bool:
        """Start the server again; false if the manager went or the budget is spent."""
        while True:
            self._end_server()
            pause = self._restarts.next(time.monotonic())
            if pause is None:
                self._emit(
                    Failed(f"{reason}, again and again", tuple(last_lines(self.log, LOG_TAIL)))
                )
                return False
            if self._leash.wait(seconds=pause):
                return False
            try:
                self._start_server(RESTART_TIMEOUT)
            except ServerFailed as error:
                reason = str(error)
                if self._leash.gone:
                    return False
                continue
            break
        assert self.server is not None
        if self._workers is not None and self._memory is not None:
            self._workers.broker_was_away()
            self._memory.broker_was_away()
        self._emit(Restarted(self.server.pid, reason))
        return True

    @property
    def _endpoint(self) -> Endpoint:
        return Endpoint(self.order.host, self.port, self.order.secret)

    def _say_farewell(self) -> None:
        """Tell the workers that it is over, and wait a moment until they have heard."""
        if self._workers is not None:
            self._workers.say_farewell(FAREWELL)

    def _end_server(self) -> None:
        # Nothing in it is worth a clean shutdown: its directory goes as well.
        if self.server is not None and self.server.poll() is None:
            self.server.kill()
            self.server.wait(KILL_TIMEOUT)

    def _emit(self, event: Event) -> None:
        self._leash.say(encode(event))


def free_port(host: str) -> int:
    """A port that the kernel says is free at ``host``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Read the order, guard the server."""
    # A signal to the whole group of processes asks the manager to leave; the
    # broker must last until it has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leash = Leash()
    line = leash.wait_for_line()
    if line is not None:
        Guardian(decode(line, Order), leash).run()


if __name__ == "__main__":
    main()
