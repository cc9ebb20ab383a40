"""A thread of the manager's that follows the workers: who joined, who is ready, who
is gone, who is to be replaced. It decides nothing itself: see :mod:`cluster.roster`,
:mod:`cluster.readiness` and :mod:`cluster.replacement`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery.app.task import Context
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from cluster.binding import Binding
from cluster.broker.messages import Dead, Event, Restarted
from cluster.errors import ClusterError, LaunchError, WorkerLost
from cluster.launchers.base import Launcher
from cluster.mismatch import Mismatches, Side
from cluster.model import Phase, Registration, WorkerRef, WorkerSpec, WorkerStatus
from cluster.readiness import Pinger
from cluster.replacement import Replacements
from cluster.roster import Roster, Seat
from cluster.wire import givenup, keys
from cluster.wire.ledger import CONNECTION_ERRORS, is_refusal
from cluster.wire.registration import decode
from cluster.wire.scripts import Scripts

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger("cluster")

#: Seconds that a turn waits for a registration. It ends at once when one comes.
TURN = 0.1

#: What stands for a worker that couldn't even be launched.
REFUSED = WorkerStatus(Phase.MISSING)

#: Seconds for the turn that is under way to end.
END_TIMEOUT = 10.0

#: Registrations taken in one turn.
AT_ONCE = 1000

#: Lines of a lost worker's log that go into an error.
LOG_TAIL = 30


class Supervisor(threading.Thread):
    """Follows one cluster's workers until told to end.

    Args:
        launcher: runs the workers.
        spec: what they boot from.
        wanted: how many there should be.
        client: of the broker; this thread's own.
        binding: the app, bound.
        side: what the manager runs, and workers must, too.
        on_ready: called whenever workers have become ready.
        on_remark: called with what the user should hear of a worker, once for all alike.
        on_failure: called once, with what went wrong, when the cluster can't go on.
    """

    def __init__(
        self,
        *,
        launcher: Launcher,
        spec: WorkerSpec,
        wanted: int,
        client: Redis,
        binding: Binding,
        side: Side,
        on_ready: Callable[[], None],
        on_remark: Callable[[str], None],
        on_failure: Callable[[ClusterError], None],
    ) -> None:
        super().__init__(name="cluster-supervisor", daemon=True)
        self.roster = Roster()
        #: Guards the roster; notified when something may have changed.
        self.changed = threading.Condition()
        self.failure: ClusterError | None = None
        self.mismatches = Mismatches(side)
        self._on_ready = on_ready
        self._on_remark = on_remark
        self._remarks: set[str] = set()
        self._launcher = launcher
        self._spec = spec
        self._client = client
        self._scripts = Scripts(client)
        self._binding = binding
        self._pinger = Pinger(binding.app)
        self._on_failure = on_failure
        self._replacements = Replacements(wanted)
        self._due: list[float] = []  # when to launch a replacement, one entry each
        self._to_release: dict[str, str] = {}  # node → why
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._reread = False
        self._refused = False

    # -- from other threads -------------------------------------------------------

    def launch(self, count: int) -> None:
        """Launch workers. Raises :class:`LaunchError`; those accepted are on the roster."""
        if count == 0:
            return
        try:
            refs = self._launcher.launch(self._spec, count)
        except LaunchError as error:
            with self.changed:
                self.roster.launched(error.accepted)
            raise
        with self.changed:
            self.roster.launched(refs)

    def tell(self, event: Event) -> None:
        """Something the guardian reported."""
        self._events.put(event)

    @property
    def coming(self) -> int:
        """Workers that may yet become ready, replacements that are due included."""
        with self.changed:
            return self.roster.coming + len(self._due)

    def stop_replacing(self) -> None:
        """From now on, workers that end have been told to."""
        self._ending.set()

    def end(self) -> None:
        """No more turns. Returns when the thread is done, or hangs."""
        self._ending.set()
        if self.is_alive():
            self.join(END_TIMEOUT)
        if self.is_alive():
            logger.warning("The supervisor hangs in its launcher %s.", self._launcher.name)
            return
        self._pinger.close()

    # -- the thread ------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                self._turn()
        except Exception as error:
            logger.exception("The cluster's supervisor failed.")
            self.fail(ClusterError(f"The cluster's supervisor failed: {error!r}"))

    def _turn(self) -> None:
        try:
            self._listen()
            self._give_up()
            self._confirm()
            self._release()
            self._refused = False
        except ResponseError as error:
            if not is_refusal(error):
                raise
            if not self._refused:
                logger.warning("The broker can't write (%s); trying again until it can.", error)
            self._refused = True
            self._ending.wait(TURN)
        except (*CONNECTION_ERRORS, OperationalError, ClusterError):
            # The broker is away; the guardian brings it back or says that it
            # can't. What was popped as it went may be lost.
            self._reread = True
            self._ending.wait(TURN)
        self._hear_guardian()
        self._describe()
        self._replace()
        with self.changed:
            self.changed.notify_all()

    def _listen(self) -> None:
        """Wait a moment for a registration; take in all there are, so that one ping does."""
        if self._reread:
            entries = self._client.hvals(keys.WORKERS)
            self._reread = False
        else:
            found = self._client.blpop([keys.JOINED], timeout=TURN)
            if found is None:
                return
            entries = [found[1], *(self._client.lpop(keys.JOINED, AT_ONCE) or ())]
        for entry in entries:
            self._join(decode(entry))

    def _join(self, registration: Registration) -> None:
        side = Side(registration.versions, registration.tasks)
        with self.changed:
            fatal, news = self.mismatches.join(registration.worker, side)
            if not fatal:  # else it has seen so itself, and ends
                self.roster.joined(registration)
        if news:
            self._on_remark(f"Workers differ from the manager:\n{self.mismatches}")
        for remark in registration.remarks:
            if remark not in self._remarks:
                self._remarks.add(remark)
                self._on_remark(remark)

    def _give_up(self) -> None:
        """Fail the tasks that were handed out too often; each stays listed until that is done."""
        while (entry := self._client.lindex(keys.GIVEN_UP, -1)) is not None:
            given_up = givenup.read(entry, self._binding.app.conf.accept_content)
            logger.error("%s", given_up)
            if given_up.request is not None:
                self._fail_task(given_up.request, str(given_up))
            self._client.rpop(keys.GIVEN_UP)

    def _fail_task(self, request: Context, why: str) -> None:
        try:
            self._binding.fail_task(request, WorkerLost(why))
        except (*CONNECTION_ERRORS, ClusterError):
            raise  # it stays listed, for when the broker is back
        except Exception:
            # A callback of the user's, for one: that is no reason to end the cluster.
            logger.exception("What waits for %s couldn't be told.", request.id)

    def _confirm(self) -> None:
        with self.changed:
            nodes = self.roster.unanswered
        if not nodes:
            return
        answered = self._pinger.ping(nodes)
        with self.changed:
            self.roster.answered(answered)
            self.changed.notify_all()
        if answered:
            self._on_ready()

    def _release(self) -> None:
        """Give back what workers held that their platform says are gone.

        The guardian has mostly done it already; where a connection outlives
        its worker, only the platform knows.
        """
        for node, why in tuple(self._to_release.items()):
            self._scripts.release(node, why, died=True)
            del self._to_release[node]

    def _hear_guardian(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            match event:
                case Dead(node=node, held=held):
                    # In one step: nobody may see a worker gone and none due for it.
                    with self.changed:
                        seat = self.roster.lost(node)
                        if seat is not None:
                            self._bury(seat, f"its connection is gone; tasks given back: {held}")
                    if seat is not None:
                        self._terminate(seat.ref)
                case Restarted(reason=reason):
                    logger.warning("The broker was restarted (%s); work goes on.", reason)

    def _describe(self) -> None:
        with self.changed:
            refs = self.roster.unfinished
        if not refs:
            return
        statuses = self._launcher.describe(refs)
        with self.changed:
            for seat in self.roster.described(statuses):
                self._bury(seat, seat.status.reason)
                if seat.node:
                    self._to_release[seat.node] = seat.status.reason

    def _bury(self, seat: Seat, why: str) -> None:
        """A worker is gone: see whether another shall come in its place."""
        if self._ending.is_set():
            return
        pause = self._replacements.next(seat.status, was_ready=seat.ready, now=time.monotonic())
        if pause is None:
            logger.warning("Worker %s ended (%s). It isn't replaced.", seat.ref.id, why)
        else:
            logger.warning("Worker %s ended (%s). Another one starts.", seat.ref.id, why)
            with self.changed:
                self._due.append(time.monotonic() + pause)

    def _terminate(self, ref: WorkerRef) -> None:
        """Fenced, it can do nothing more; it mustn't cost anything either."""
        self._launcher.terminate([ref], reason="its connection to the broker is gone")

    def _replace(self) -> None:
        if self._ending.is_set():
            return
        now = time.monotonic()
        due = [at for at in self._due if at <= now]
        if not due:
            self._judge()
            return
        try:
            self.launch(len(due))
        except LaunchError as error:
            logger.warning("A replacement couldn't be launched: %s", error)
            self._try_again(len(due) - len(error.accepted))
        with self.changed:
            for at in due:
                self._due.remove(at)

    def _try_again(self, missing: int) -> None:
        for _ in range(missing):
            pause = self._replacements.next(REFUSED, was_ready=False, now=time.monotonic())
            if pause is not None:
                with self.changed:
                    self._due.append(time.monotonic() + max(pause, TURN))

    def _judge(self) -> None:
        """With no worker left and none to come, tasks would wait for ever."""
        with self.changed:
            seats = self.roster.gone
            over = bool(seats) and not self.roster.ready and not self.coming
        if over and self.failure is None:
            seat = seats[-1]
            lines = self._launcher.logs(seat.ref, tail=LOG_TAIL)
            self.fail(
                WorkerLost(
                    "No worker is left, and none is started any more: "
                    + ("too many ended. " if seat.status.retryable else "it would end alike. ")
                    + f"The last was {seat.ref.id}: {seat.status.reason}.\n"
                    + "\n".join(lines)
                )
            )

    def fail(self, why: ClusterError) -> None:
        """The cluster can't go on; the first reason counts. From any thread."""
        with self.changed:
            first = self.failure is None
            self.failure = self.failure or why
            self.changed.notify_all()
        if first:
            self._on_failure(why)
