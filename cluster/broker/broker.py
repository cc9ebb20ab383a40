"""The broker as the manager holds it: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.broker.messages import (
    EVENTS,
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
from cluster.model import Endpoint

#: Seconds for the guardian to report; it gives up by itself before that.
HANDSHAKE_TIMEOUT = START_TIMEOUT + 10

#: Seconds that the guardian gets to say farewell and remove what is there.
STOP_TIMEOUT = 3.0


class Broker:
    """A broker and its guardian process; made, it starts, and is up after :meth:`wait`.

    Args:
        server: the program.
        host: the address to listen on.
        secret: the run's secret.
        directory: the run's own directory; it goes when the guardian does.
        workers: how many to make room for.
        on_event: called, in a thread of the broker's, with what the guardian
            reports after the start. A guardian that died is reported as
            :class:`Failed`.
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
        self._watching = False
        self._guardian_log = directory / "guardian.log"
        self._server_process: psutil.Process | None = None
        self._started = threading.Event()
        self._first: Event | None = None
        self._guardian = Companion(
            "cluster.broker.guardian",
            log=self._guardian_log,
            environment={},
            on_line=self._on_line,
            on_end=self._on_end,
        )
        order = Order(
            server=server.path,
            host=host,
            secret=secret,
            directory=str(directory),
            workers=workers,
        )
        self._order = order
        self.endpoint: Endpoint | None = None
        self._guardian.send(encode(order), HANDSHAKE_TIMEOUT)  # if it is gone, wait() says why

    def wait(self) -> Endpoint:
        """Wait until it is up.

        Raises:
            BrokerStartError: it isn't, with the end of the server's log.
        """
        self._started.wait(HANDSHAKE_TIMEOUT)
        match self._first:
            case Started(port=port):
                self.endpoint = Endpoint(self._order.host, port, self._order.secret)
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
        if not self._watching:
            self._watching = True
            self._guardian.send(encode(Watch()), HANDSHAKE_TIMEOUT)

    def _on_line(self, line: bytes) -> None:
        event: Event = decode(line, *EVENTS)
        if isinstance(event, Started | Restarted):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have died again
                self._server_process = psutil.Process(event.pid)
        if self._first is None:
            self._first = event
            self._started.set()
        else:
            self._on_event(event)

    def _on_end(self) -> None:
        if self._first is None:
            log = tuple(last_lines(self._guardian_log, 20))
            self._first = Failed("its guardian process ended", log)
            self._started.set()
        elif not self._stopping:
            self._guardian.wait()
            self._kill_server()
            self._on_event(Failed("its guardian process is gone"))

    def stop(self) -> None:
        """End the broker and its guardian, within a few seconds. Idempotent."""
        self._stopping = True
        if self._guardian.end(STOP_TIMEOUT) != 0:
            self._kill_server()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _kill_server(self) -> None:
        """The guardian is gone and couldn't do it."""
        if self._server_process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._server_process.kill()
