"""The broker as the manager holds it: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.broker.messages import (
    EVENTS,
    Alive,
    Event,
    Failed,
    Order,
    Restarted,
    Started,
    Watch,
)
from cluster.broker.server import START_TIMEOUT, Server
from cluster.companion import Companion
from cluster.errors import BrokerStartError
from cluster.jsonlines import decode, encode
from cluster.logfile import last_lines
from cluster.model import Endpoint, Limits
from cluster.restarts import Restarts
from cluster.wire.exitcodes import explain

#: Seconds for the guardian to report; it gives up by itself before that.
HANDSHAKE_TIMEOUT = START_TIMEOUT + 10

#: Seconds that the guardian gets to say farewell and remove what is there.
STOP_TIMEOUT = 3.0

#: Seconds of silence, beyond a liveness time-out, after which a guardian counts as hanging:
#: a server that doesn't answer holds it up for some commands' time-outs.
GUARDIAN_ALLOWANCE = 5.0

#: Seconds for the kernel to end the server after SIGKILL.
KILL_TIMEOUT = 10.0

#: Seconds for the kernel to tell how a guardian ended whose pipe has closed.
REAP_TIMEOUT = 1.0

#: Guardians that are started in place of one that died, within seconds.
GUARDIANS, WITHIN = 5, 60.0


class Broker:
    """A broker and its guardian process; made, it starts, and is up after :meth:`wait`.

    Args:
        server: the program.
        host: the address to listen on.
        secret: the run's secret.
        directory: the run's own directory; it goes when the guardian does.
        cluster_id: whose it is, for who has to clear up after a crash.
        workers: how many to make room for.
        limits: of its memory and of its patience.
        on_event: called, in a thread of the broker's, with what the guardian
            reports after the start. A guardian that died is started again, and
            with it the server: that is reported as :class:`Restarted`, or as
            :class:`Failed` if it happens again and again.
    """

    def __init__(
        self,
        server: Server,
        *,
        host: str,
        secret: str,
        directory: Path,
        cluster_id: str,
        workers: int,
        limits: Limits,
        on_event: Callable[[Event], None],
    ) -> None:
        self._directory = directory
        self._cluster_id = cluster_id
        self._on_event = on_event
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watching = False
        self._failed = False
        self._guardian_log = directory / "guardian.log"
        self._server_process: psutil.Process | None = None
        self._started = threading.Event()
        self._first: Event | None = None
        # It takes some time to see that one hangs.
        hanging = limits.liveness_timeout + GUARDIAN_ALLOWANCE
        self._again = Restarts(limit=GUARDIANS, window=WITHIN + GUARDIANS * hanging)
        self._why_again = ""  # what to say when the server is up again
        self._order = Order(
            server=server.path,
            host=host,
            secret=secret,
            directory=str(directory),
            workers=workers,
            memory=limits.broker_memory,
            liveness_timeout=limits.liveness_timeout,
            max_deliveries=limits.max_deliveries,
        )
        self.endpoint: Endpoint | None = None
        self._guardian = self._start_guardian()

    def _start_guardian(self) -> Companion:
        guardian = Companion(
            "cluster.broker.guardian",
            log=self._guardian_log,
            environment={"CLUSTER_ID": self._cluster_id},
            on_line=self._on_line,
            on_end=self._on_end,
            patience=self._order.liveness_timeout + GUARDIAN_ALLOWANCE,
        )
        # If it is gone, that is heard of as well.
        guardian.send(encode(self._order), HANDSHAKE_TIMEOUT)
        return guardian

    def wait(self) -> Endpoint:
        """Wait until it is up.

        Raises:
            BrokerStartError: it isn't, with the end of the server's log.
        """
        self._started.wait(HANDSHAKE_TIMEOUT)
        match self._first:
            case Started():
                assert self.endpoint is not None
                return self.endpoint
            case Failed(reason=reason, log=log):
                raise BrokerStartError(f"The broker didn't start: {reason}.", log=log)
            case _:
                raise BrokerStartError(
                    "The broker's guardian process didn't report.",
                    log=last_lines(self._guardian_log, 20),
                )

    def watch(self) -> None:
        """Workers take part from now on: have the guardian look after them. Idempotent."""
        with self._lock:
            if self._watching or self._stopping.is_set():
                return
            self._watching = True
            self._guardian.send(encode(Watch()), HANDSHAKE_TIMEOUT)

    def _on_line(self, line: bytes) -> None:
        event: Event = decode(line, *EVENTS)
        match event:
            case Alive():
                return
            case Started(pid=pid) | Restarted(pid=pid):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have died again
                    self._server_process = psutil.Process(pid)
        if isinstance(event, Started):
            self.endpoint = Endpoint(self._order.host, event.port, self._order.secret)
            if self._why_again:
                event = Restarted(event.pid, self._why_again)
        if self._first is None:
            self._first = event
            self._started.set()
        else:
            self._failed = isinstance(event, Failed)
            self._on_event(event)

    def _on_end(self) -> None:
        if self._first is None:
            log = tuple(last_lines(self._guardian_log, 20))
            self._first = Failed("its guardian process ended", log)
            self._started.set()
        elif (
            not self._stopping.is_set() and not self._failed and not isinstance(self._first, Failed)
        ):
            self._replace_guardian()

    def _replace_guardian(self) -> None:
        """In the thread of the one that died. Its server has died with it, or is killed; all that
        was in it is in its file."""
        code = self._guardian.end(REAP_TIMEOUT)
        how = "hung" if self._guardian.hung else f"ended: {explain(code)}"
        self._why_again = f"its guardian process {how}"
        pause = self._again.next(time.monotonic())
        if pause is None:
            self._kill_server()
            self._fail(f"{self._why_again}, again and again")
            return
        if self._stopping.wait(pause):
            return
        with self._lock:
            if self._stopping.is_set():
                return
            self._kill_server()
            assert self.endpoint is not None
            self._order = dataclasses.replace(self._order, port=self.endpoint.port)
            try:
                self._guardian = self._start_guardian()
            except OSError as error:
                self._fail(f"{self._why_again}, and another can't be started: {error}")
                return
            if self._watching:
                self._guardian.send(encode(Watch()), HANDSHAKE_TIMEOUT)

    def _fail(self, why: str) -> None:
        self._failed = True
        self._on_event(Failed(why, tuple(last_lines(self._guardian_log, 20))))

    def stop(self) -> None:
        """End the broker and its guardian, within a few seconds. Idempotent."""
        self._stopping.set()
        with self._lock:  # another may just have been started
            guardian = self._guardian
        if guardian.end(STOP_TIMEOUT) != 0:
            self._kill_server()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _kill_server(self) -> None:
        """The guardian is gone and couldn't do it."""
        if self._server_process is not None:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                self._server_process.kill()
                self._server_process.wait(KILL_TIMEOUT)
