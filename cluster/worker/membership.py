"""How a worker takes part: in this order, since each step rests on the one before."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger
from redis.exceptions import ResponseError

from cluster.jsonlines import decode
from cluster.mismatch import Mismatches, Side
from cluster.model import Registration
from cluster.settings import DRAIN_GRACE
from cluster.versions import versions
from cluster.wire import keys
from cluster.wire.exitcodes import ExitCode
from cluster.wire.ledger import CONNECTION_ERRORS
from cluster.wire.registration import encode
from cluster.wire.scripts import Scripts
from cluster.wire.transport import after_absence, wait_with_taking
from cluster.worker import revokes
from cluster.worker.drain import Drain
from cluster.worker.processes import end_now, reset_in_children
from cluster.worker.remarks import remarks
from cluster.worker.wake import Wake

if TYPE_CHECKING:
    from redis import Redis

logger = get_logger(__name__)


class Membership:
    """Begins when Celery says that the worker is ready, before it takes its first task.

    Args:
        worker: the Celery worker.
        id: the platform's name for it.
        drain: its way out.
    """

    def __init__(self, worker: Any, id: str, drain: Drain) -> None:  # noqa: A002
        self._worker = worker
        self._id = id
        self._drain = drain
        self._begun = False

    def begin(self, **_: Any) -> None:
        """Receives Celery's ``worker_ready``, which comes again with each new consumer."""
        if self._begun:
            return
        self._begun = True
        try:
            registration = self._describe()
            self._listen_for_orders()
            self._register(registration)
        except Exception:  # noqa: BLE001 (whatever it is, this worker is of no use)
            # Celery would log what a signal's receiver raises, and go on.
            traceback.print_exc()
            end_now(ExitCode.ORPHANED)
        # Two turns of the event loop later: in the first it subscribes to
        # what a ping and a revoke come in on. Then it has heard of all that
        # it must not run, and takes its first task.
        hub = self._worker.hub
        wait_with_taking(True)
        hub.call_soon(hub.call_soon, self._announce, registration)

    def _listen_for_orders(self) -> None:
        hub = self._worker.hub
        self._drain.attach(hub)
        # Celery looks when the child's end of a pipe closes, which is a moment
        # before it can be told dead, and then again after five seconds
        # (celery/concurrency/asynpool.py, _event_process_exit).
        look_after_children = Wake()
        look_after_children.attach(hub, self._look_after_children)
        reset_in_children(signal.SIGCHLD)
        signal.signal(signal.SIGCHLD, look_after_children)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _look_after_children(self) -> None:
        pool = self._worker.pool._pool
        if pool is not None:  # it is being shut down
            pool.maintain_pool()

    def _on_signal(self, *_: Any) -> None:
        self._drain.begin(ExitCode.PLATFORM_NOTICE, DRAIN_GRACE)

    def _describe(self) -> Registration:
        app = self._worker.app
        return Registration(
            node=self._worker.hostname,
            worker=self._id,
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=versions(),
            tasks=tuple(app.tasks),
            remarks=remarks(app, self._worker.concurrency),
        )

    def _register(self, registration: Registration) -> None:
        with self._worker.app.connection_for_write() as connection:
            client = connection.default_channel.client
            self._compare(client, registration)
            revokes.learn(client)
            after_absence(revokes.learn)
            Scripts(client).register(registration.node, encode(registration))

    def _compare(self, client: Redis, registration: Registration) -> None:
        """End here if this can't work with the manager: before it takes a task, which it would
        fail, and in words of its own."""
        manager = client.get(keys.MANAGER)
        if manager is None:
            return
        found = Mismatches(decode(manager, Side))
        fatal, _ = found.join(self._id, Side(registration.versions, registration.tasks))
        if fatal:
            print(f"This worker can't work with its manager:\n{found}", file=sys.stderr)
            Scripts(client).announce(encode(registration))
            end_now(ExitCode.VERSION_MISMATCH)

    def _announce(self, registration: Registration) -> None:
        try:
            with self._worker.app.connection_for_write() as connection:
                client = connection.default_channel.client
                revokes.learn(client)  # what came before it listened to orders
                Scripts(client).announce(encode(registration))
        except (*CONNECTION_ERRORS, ResponseError) as error:
            # The manager has lost its connection as well, and looks at the
            # registrations once it has another.
            logger.warning("The broker was away, or full, as this worker joined (%s).", error)
        finally:
            wait_with_taking(False)
