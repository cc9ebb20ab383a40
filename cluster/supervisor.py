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
from typing import TYPE_CHECKING, cast

from celery.app.task import Context
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from cluster.attention import Attention
from cluster.binding import Binding
from cluster.broker.messages import Dead, Event, Full, Restarted, Room
from cluster.errors import ClusterError, LaunchError, WorkerLost
from cluster.launchers.base import Launcher
from cluster.mismatch import Mismatches, Side
from cluster.model import Phase, Registration, WorkerSpec, WorkerStatus
from cluster.readiness import Pinger
from cluster.replacement import Replacements
from cluster.roster import Roster, Seat
from cluster.wire import givenup, keys
from cluster.wire.ledger import CONNECTION_ERRORS, is_full, is_refusal
from cluster.wire.registration import decode
from cluster.wire.scripts import DELIVER, Scripts

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

#: Lines of a lost worker's log that go into an error, into that of a task and from each of its
#: workers, and the characters of a line there: it becomes the task's result.
LOG_TAIL = 30
TASK_LOG_TAIL = 15
LINE_AT_MOST = 300

#: The last workers that an error names where none is left.
LAST_SHOWN = 10

#: Seconds for a platform to say how a worker ended, before a task is failed without.
EXITS_KNOWN_WITHIN = 5.0

#: What a full broker means, and what to do.
SENDERS_REFUSED = (
    "New tasks are refused with BrokerFull until there is room: get results, or give it more "
    "memory by CLUSTER_BROKER_MEMORY."
)
RESULTS_REFUSED = (
    "Results are refused as well, and workers wait until there is room: get results that are "
    "there, set ignore_result=True where nobody asks for them, or give it more memory by "
    "CLUSTER_BROKER_MEMORY."
)


class Supervisor(threading.Thread):
    """Follows one cluster's workers until told to end.

    Args:
        launcher: runs the workers.
        spec: what they boot from.
        wanted: how many there should be.
        patience: seconds to wait for one to become ready where none is any more.
        max_deliveries: how often a task's process may die.
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
        patience: float,
        max_deliveries: int,
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
        self._scripts = Scripts(client, max_deliveries)
        self._binding = binding
        self._pinger = Pinger(binding.app)
        self._on_failure = on_failure
        self._replacements = Replacements(wanted)
        self._patience = patience
        self._attention = Attention(longest=1.0)
        self._ready_until: float | None = None  # when one was ready for the last time
        self._buried: list[tuple[Seat, str]] = []  # who is gone, and why, and not judged yet
        self._due: list[float] = []  # when to launch a replacement, one entry each
        self._given_up_since: tuple[object, float] | None = None
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
            return self.roster.coming + len(self._buried) + len(self._due)

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
            self._note_deliveries()  # first: in a full broker, all else waits for what this frees
            self._give_up()
            self._confirm()
            self._release()
            self._refused = False
        except ResponseError as error:
            if not (is_refusal(error) or is_full(error)):
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
            fenced = cast("dict[bytes, bytes]", self._client.hgetall(keys.FENCED))
            self._reread = False
            # A guardian that died may have buried a worker and not said so any more.
            for node, why in fenced.items():
                self._lose(node.decode(), why.decode())
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
            if not self._exits_are_known(entry, given_up):
                return
            why = self._explain(given_up)
            logger.error("%s", why)
            if given_up.request is not None:
                self._fail_task(given_up.request, why)
            # By its value: should this be carried out late, the last may be another one.
            self._client.lrem(keys.GIVEN_UP, -1, cast("str", entry))
            self._given_up_since = None

    def _exits_are_known(self, entry: object, given_up: givenup.GivenUp) -> bool:
        """Whether the platform has said how the workers ended that died of this task, or has had
        time to: the broker mostly hears first."""
        now = self._attention.look(time.monotonic())
        if self._given_up_since is None or self._given_up_since[0] != entry:
            self._given_up_since = (entry, now)
        if now - self._given_up_since[1] > EXITS_KNOWN_WITHIN:
            return True
        with self.changed:
            seats = [
                self.roster.of(node)
                for node, how in given_up.deaths
                if not how.startswith(givenup.POOL_PROCESS)
            ]
            return all(seat is None or seat.status.final for seat in seats)

    def _explain(self, given_up: givenup.GivenUp) -> WorkerLost:
        deaths, logs = [], {}
        for node, how in given_up.deaths:
            with self.changed:
                seat = self.roster.of(node)
            if seat is None:
                deaths.append((node, how))
                continue
            if seat.status.final and not how.startswith(givenup.POOL_PROCESS):
                how = seat.status.reason  # noqa: PLW2901 (the platform knows better)
            deaths.append((node, how))
            if seat.ref.id not in logs:
                lines = self._launcher.logs(seat.ref, tail=TASK_LOG_TAIL)
                logs[seat.ref.id] = [line[:LINE_AT_MOST] for line in lines]
        return WorkerLost(given_up.explain(deaths), deaths, logs)

    def _fail_task(self, request: Context, why: WorkerLost) -> None:
        try:
            self._binding.fail_task(request, why)
        except (*CONNECTION_ERRORS, ClusterError):
            raise  # it stays listed, for when the broker is back
        except ResponseError as error:
            if is_refusal(error) or is_full(error):
                raise  # the same
            logger.exception("What waits for %s couldn't be told.", request.id)
        except Exception:
            # A callback of the user's, for one: that is no reason to end the cluster.
            logger.exception("What waits for %s couldn't be told.", request.id)

    def _note_deliveries(self) -> None:
        """Tell the broker which results it may free."""
        while delivered := self._binding.deliveries.take(AT_ONCE):
            try:
                self._client.eval(DELIVER, 1, keys.DELIVERED, *delivered)
            except BaseException:
                self._binding.deliveries.put_back(delivered)
                raise

    def _confirm(self) -> None:
        with self.changed:
            nodes = self.roster.unanswered
        if not nodes:
            return
        answered = self._pinger.ping(nodes)
        now = self._attention.look(time.monotonic())
        with self.changed:
            self.roster.answered(answered, now)
            self.changed.notify_all()
        if answered:
            self._ready_until = now  # it may be gone again before this turn is over
            self._replacements.became_ready()
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
                case Dead(node=node, held=held, why=why):
                    self._lose(node, why, f"; tasks given back: {held}")
                case Restarted(reason=reason):
                    self._reread = True
                    logger.warning("The broker was restarted (%s); work goes on.", reason)
                case Full(used=used, memory=memory, results=results):
                    self._binding.deliveries.refused = results
                    logger.warning(
                        "The broker is full: %d of %d MiB are used. %s",
                        used // 2**20,
                        memory // 2**20,
                        RESULTS_REFUSED if results else SENDERS_REFUSED,
                    )
                case Room():
                    self._binding.deliveries.refused = False
                    logger.warning("There is room in the broker again.")

    def _lose(self, node: str, why: str, more: str = "") -> None:
        """A node counts as dead, which may be known."""
        # In one step: nobody may see a worker gone and none due for it.
        with self.changed:
            seat = self.roster.lost(node)
            if seat is not None:
                self._buried.append((seat, why + more))
        if seat is not None:
            # Fenced, it can do nothing more; it mustn't cost anything either.
            self._launcher.terminate([seat.ref], reason=why)

    def _describe(self) -> None:
        with self.changed:
            refs = self.roster.unfinished
        if not refs:
            return
        statuses = self._launcher.describe(refs)
        with self.changed:
            for seat in self.roster.described(statuses):
                self._buried.append((seat, seat.status.reason))
                if seat.node:
                    self._to_release[seat.node] = seat.status.reason

    def _judge_buried(self) -> None:
        """See whether others shall come in the place of workers that are gone."""
        with self.changed:
            buried = tuple(self._buried)
        for seat, why in buried:
            try:
                done = int(self._client.hget(keys.DONE, seat.node) or 0) if seat.node else 0
            except (*CONNECTION_ERRORS, ResponseError):
                return  # once the broker is back
            now = self._attention.look(time.monotonic())
            since = seat.ready_since
            pause = self._replacements.next(
                seat.status, ready_for=None if since is None else now - since, done=done, now=now
            )
            what = "It isn't replaced" if pause is None else "Another one starts"
            logger.warning("Worker %s ended (%s). %s.", seat.ref.id, why, what)
            with self.changed:
                self._buried.remove((seat, why))
                if pause is not None:
                    self._due.append(time.monotonic() + pause)

    def _replace(self) -> None:
        if self._ending.is_set():
            return
        self._judge_buried()
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
            now = self._attention.look(time.monotonic())
            pause = self._replacements.next(REFUSED, ready_for=None, done=0, now=now)
            if pause is not None:
                with self.changed:
                    self._due.append(time.monotonic() + max(pause, TURN))

    def _judge(self) -> None:
        """With no worker left and none to come, tasks would wait for ever."""
        now = self._attention.look(time.monotonic())
        with self.changed:
            gone, ready, coming = self.roster.gone, self.roster.ready, self.coming
        if ready:
            self._ready_until = now
        if ready or not gone or self.failure is not None:
            return
        last = gone[-1]
        if not coming:
            why = "too many ended" if last.status.retryable else "it would end alike"
            said = f"No worker is left, and none is started any more: {why}."
        elif self._ready_until is not None and now - self._ready_until > self._patience:
            said = f"No worker has been ready for {self._patience:.0f} s; {coming} are starting."
        else:
            return
        self.fail(
            WorkerLost(
                f"{said} The last that ended was {last.ref.id}: {last.status.reason}.",
                [(seat.node or seat.ref.id, seat.status.reason) for seat in gone[-LAST_SHOWN:]],
                {last.ref.id: self._launcher.logs(last.ref, tail=LOG_TAIL)},
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
