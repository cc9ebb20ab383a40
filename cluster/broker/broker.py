"""The broker as the manager holds it: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.broker.guardian import START_TIMEOUT
from cluster.broker.messages import (
    Event,
    Failed,
    Order,
    Restarted,
    Started,
    decode_event,
    encode,
)
from cluster.broker.server import Server
from cluster.errors import BrokerStartError
from cluster.interpreter import module_command, module_environment, original_python_path
from cluster.logfile import last_lines
from cluster.model import Endpoint

#: Seconds for the guardian to report; it gives up by itself before that.
HANDSHAKE_TIMEOUT = START_TIMEOUT + 10

#: Seconds that the guardian gets to say farewell and remove what is there.
STOP_TIMEOUT = 3.0


class Broker:
    """A running broker and its guardian process.

    Args:
        server: the program.
        host: the address to listen on.
        secret: the run's secret.
        directory: the run's own directory; it goes when the guardian does.
        workers: how many to make room for.
        on_event: called, in a thread of the broker's, with what the guardian
            reports after the start. A guardian that died is reported as
            :class:`Failed`.

    Raises:
        BrokerStartError: with the end of the server's log.
    """

    def __init__(
        self,
        server: Server,
        *,
        host: str,
        secret: str,
        directory: Path,
        workers: int,
        on_event: Callable[[Event], None],
    ) -> None:
        self._directory = directory
        self._on_event = on_event
        self._stopping = False
        self._guardian_log = directory / "guardian.log"
        with self._guardian_log.open("wb") as log:
            self._process = subprocess.Popen(
                module_command("cluster.broker.guardian"),
                env=module_environment(original_python_path()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        _pipes_to_close.add(self)
        self._server_process: psutil.Process | None = None
        self._started = threading.Event()
        self._first: Event | None = None
        self._reader = threading.Thread(
            target=self._read_events, name="cluster-broker-events", daemon=True
        )
        self._reader.start()
        order = Order(
            server=server.path,
            host=host,
            secret=secret,
            directory=str(directory),
            workers=workers,
        )
        try:
            self._send(order)
            port = self._handshake()
        except BaseException:
            self.stop()
            raise
        self.endpoint = Endpoint(host, port, secret)

    def _send(self, order: Order) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the handshake says why
            self._process.stdin.write(encode(order))
            self._process.stdin.flush()

    def _handshake(self) -> int:
        self._started.wait(HANDSHAKE_TIMEOUT)
        match self._first:
            case Started(port=port):
                return port
            case Failed(reason=reason, log=log):
                raise BrokerStartError(f"The broker didn't start: {reason}.", log=log)
            case _:
                raise BrokerStartError(
                    "The broker's guardian process didn't report.",
                    log=last_lines(self._guardian_log, 20),
                )

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = decode_event(line)
            if isinstance(event, Started | Restarted):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have died again
                    self._server_process = psutil.Process(event.pid)
            if self._first is None:
                self._first = event
                self._started.set()
            else:
                self._on_event(event)
        if self._first is None:
            log = tuple(last_lines(self._guardian_log, 20))
            self._first = Failed("its guardian process ended", log)
            self._started.set()
        elif not self._stopping:
            self._process.wait()
            self._kill_server()
            self._on_event(Failed("its guardian process is gone"))

    def stop(self) -> None:
        """End the broker and its guardian, within a few seconds. Idempotent."""
        self._stopping = True
        _pipes_to_close.discard(self)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode != 0:
            self._kill_server()
        if threading.current_thread() is not self._reader:
            self._reader.join()
            self._process.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _kill_server(self) -> None:
        """The guardian is gone and couldn't do it."""
        if self._server_process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._server_process.kill()

    def close_in_child(self) -> None:
        """In a process that the manager forked: hold no copy of the pipe's end."""
        assert self._process.stdin is not None
        self._process.stdin.close()


_pipes_to_close: set[Broker] = set()


def _after_fork_in_child() -> None:
    for broker in _pipes_to_close:
        broker.close_in_child()
    _pipes_to_close.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
