"""A broker, publishers, workers, a guardian and a manager, without a process or a clock.

What decides is the product's own: the scripts, :class:`Ledger`, and the
guardian's :class:`Workers` with its :class:`Presence`. What is written anew
here is what surrounds them: when a worker takes, runs, dies; and what it does
with an error, as ``wire/transport.py``, ``worker/watchdog.py``,
``worker/drain.py`` and ``supervisor.py`` have it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from audit import LEFT, MOST, Audit, Execution, Violation
from miniredis import Client, Connection, Fate, Link, Server
from redis.exceptions import ResponseError

from cluster.broker import workers as guardian_module
from cluster.broker.presence import DOUBTED_FOR
from cluster.settings import BEATS, LIVENESS_TIMEOUT, ORPHAN_TIMEOUT
from cluster.wire import identity, keys, registration, scripts, transport
from cluster.wire.backend import Backend
from cluster.wire.ledger import CONNECTION_ERRORS, Ledger, guarded, raise_for
from cluster.wire.transport import LOOK_EVERY, REMEMBER_PUBLISHED
from cluster.worker.watchdog import TURN

QUEUES = ("celery", "other")
#: By priority, then by queue.
LISTS = ("celery", "other", "celery\x06\x169", "other\x06\x169")

#: Seconds of a turn of the world: longer than a guardian's, so that there are fewer.
TICK = 0.1

#: The same where nothing has happened for some seconds.
LONG_TICK = 0.5
CLOSELY = 1.0

#: Seconds for one of the guardian's commands.
COMMAND_TIMEOUT = 1.0

#: Tasks that a worker runs at once.
CAPACITY = 2

#: What the manager says of a worker whose platform told it.
ENDED = "its process ended"

#: Seconds in which who gives no sign of life must be declared dead: its own time-out, that of the
#: broker's absence before, and some looks.
NOTICED_WITHIN = 2 * LIVENESS_TIMEOUT + 2.0

#: Sleeps of the whole machine, one after the other with a look in between, that nobody may be
#: declared dead for: each counts for one beat, and a worker is doubted for some of them first.
PAUSES = math.ceil(DOUBTED_FOR * BEATS)

#: Seconds in which all must be done once nothing goes wrong any more.
DONE_WITHIN = 60.0


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass(frozen=True)
class Task:
    """What a publisher sends."""

    id: str
    waits_for: str = ""  # its "eta", or the "limit" of its kind, of which only a worker knows
    large: bool = False  # it and its result are: what is large goes by a transaction, not a script
    deadly: bool = False  # in the end, it kills every process that runs it

    def message(self, attempt: int) -> bytes:
        """kombu makes a new delivery tag for each attempt to send it."""
        eta = "2030-01-01T00:00:00" if self.waits_for == "eta" else None
        headers = {"id": self.id, "task": "t", "eta": eta}
        properties = {"delivery_tag": f"{self.id}-{attempt}", "delivery_info": {}}
        return json.dumps({"headers": headers, "properties": properties, "body": ""}).encode()


def result_key(task: str) -> str:
    return f"celery-task-meta-{task}"


def storing(node: str, task: str, value: str) -> dict[str, list[Any]]:
    """The keys and arguments of STORE."""
    return {
        "keys": [keys.FENCED, result_key(task), keys.FULL, keys.AWAITED],
        "args": [node, value, 3600, "", 0],
    }


# -- publishers ----------------------------------------------------------------------


class Publisher:
    """One channel: what isn't answered is sent again before anything else is."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.link = Link(world.server, name)
        self.client = Client(self.link)
        self.count = 0
        self.pending: tuple[Task, str, int, int] | None = None  # task, list, its queue, attempt

    def publish(self, task: Task, position: int) -> None:
        """Send a task to one of the lists."""
        assert self.pending is None
        self.count += 1
        self.pending = (task, LISTS[position], position % len(QUEUES), 0)
        self.world.audit.sent.add(task.id)
        self.send()

    def send(self) -> None:
        """Send what is pending; it stays so if there is no answer."""
        assert self.pending is not None
        task, name, queue, attempt = self.pending
        self.pending = (task, name, queue, attempt + 1)
        published = keys.published(self.name, QUEUES[queue])
        names = [published, keys.FULL, name, keys.wake(QUEUES[queue])]
        raw = task.message(attempt)
        rest = (len(names), *names, self.count, raw, 1, 0, REMEMBER_PUBLISHED)
        try:
            if task.large:
                transport._put_large(self.client, names, self.count, raw.decode(), 1)
            else:
                scripts.run(self.client, scripts.PUT, *rest)
        except CONNECTION_ERRORS:
            return
        self.pending = None

    def give_up(self) -> None:
        """The caller gets the error; the task may have arrived or not."""
        self.pending = None


# -- workers -------------------------------------------------------------------------


class Worker:
    """A worker's processes: its event loop, its ledger, its watchdog and its pool."""

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node
        server = world.server
        self.poll, self.settle = Link(server, node, node), Link(server, node, node)
        self.child, self.watch = Link(server, node), Link(server, node, keys.presence(node))
        self.fates: deque[Fate] = deque()
        # What the watchdog does is of no consequence: it needs no fates of its own.
        for link in (self.poll, self.settle, self.child):
            link.fates = self.fates
        self.ledger = Ledger(node, scripts.Scripts(Client(self.settle), MOST))
        self._takes = scripts.Scripts(Client(self.poll), MOST)
        self._watches = Client(Link(server, node))
        self._results = Client(self.child)
        self._store = self._results.register_script(scripts.STORE)
        self.there = True  # its main process
        self.frozen = False
        self.cut = False
        self._last_cut = -math.inf
        self.taking = True
        self.leaving = False
        self.away = False
        self.blocked: Connection | None = None
        self.executions: list[Execution] = []
        self.ill_for = 0.0  # while the guardian could see it
        self._reached = self._beat = self._beat_awake = world.clock.now
        self._retry_at = 0.0
        self.slept_through = 0  # the machine's sleeps since it gave a sign of life
        self.boot()

    def __repr__(self) -> str:
        return f"<{self.node}>"

    # -- what may happen to it

    @property
    def acts(self) -> bool:
        return self.there and not self.frozen

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def cut_off(self) -> None:
        """Without a word: whatever it sends is lost, and the broker sees its connections stand."""
        self._set_cut(True)

    def heal(self) -> None:
        self._set_cut(False)

    def _set_cut(self, cut: bool) -> None:
        self.cut = cut
        self._last_cut = self.world.clock.now
        for link in self.links:
            link.cut = cut
            if not cut and not (self.there and link.connection):
                link.close()

    @property
    def links(self) -> tuple[Link, ...]:
        return (self.poll, self.settle, self.child, self.watch)

    def break_connections(self) -> None:
        """They end as if the other side had closed them."""
        for link in self.links:
            link.close()

    def die(self) -> None:
        """SIGKILL, or its own end. Its children may live on for a moment."""
        self.there = False
        self.blocked = None
        for link in self.links:
            link.close()

    # -- its watchdog

    @property
    def is_well(self) -> bool:
        """Whether it gives its sign of life as it should, or has time left to do so again."""
        since = self.world.server_since
        spared = self._beat <= since and self.world.clock.now - since < LIVENESS_TIMEOUT - LONG_TICK
        # But who was cut off since may lose its old connections before it has new ones.
        if spared and self._last_cut <= since:
            return self.acts and not self.cut
        watching = self.watch.connection in self.world.server.connections
        silence = self.world.clock.now - self.world.slept - self._beat_awake
        late = silence > LIVENESS_TIMEOUT / BEATS + 2 * LONG_TICK or self.slept_through > PAUSES
        return self.acts and not self.cut and watching and not late

    def boot(self) -> None:
        """Subscribe, then register: from then on it is missed."""
        try:
            self._subscribe()
            if self.there:
                self._takes.register(self.node, f"registration of {self.node}")
        except (*CONNECTION_ERRORS, ResponseError):
            self.die()

    def look_after(self) -> None:
        """A turn of the watchdog."""
        if not self.acts:
            return
        now = self.world.clock.now
        if now - self._reached > ORPHAN_TIMEOUT:
            self.die()
        if not self.there or now < self._retry_at:
            return
        try:
            if self.watch.connection not in self.world.server.connections:
                self._subscribe()
            elif now - self._beat >= LIVENESS_TIMEOUT / BEATS:
                self._subscribe_again()
            self._listen()
        except CONNECTION_ERRORS:
            if self.watch.connection is None:
                self._retry_at = now + TURN
            self.watch.close()

    def _subscribe(self) -> None:
        self._subscribe_again()
        if self._watches.hexists(keys.FENCED, self.node):
            self.die()

    def _subscribe_again(self) -> None:
        self.watch.subscribe(keys.PRESENCE, keys.presence(self.node))
        self._reached = self._beat = self.world.clock.now
        self._beat_awake = self._beat - self.world.slept
        self.slept_through = 0

    def _listen(self) -> None:
        if self.watch.connection is None or self.cut:
            return
        inbox, self.watch.connection.inbox = self.watch.connection.inbox, []
        if any(registration.is_fenced(message) for message in inbox):
            self.die()

    # -- its event loop

    @property
    def waits(self) -> bool:
        """Blocked, and not woken yet."""
        return (
            self.blocked is not None
            and self.blocked in self.world.server.connections
            and self.blocked.popped is None
            and self.world.clock.now < self.blocked.waits_until
        )

    @property
    def has_room(self) -> bool:
        busy = sum(execution.runs for execution in self.executions)
        return self.taking and busy < CAPACITY

    @property
    def is_about_to_take(self) -> bool:
        """Whether it takes what it was woken for."""
        return self.acts and not self.cut and self.has_room and not self.waits

    def turn(self) -> None:
        """A turn of the event loop: catch up, take, or wait (``Poller``, ``Channel``)."""
        if not self.acts or self.waits:
            return
        if self.leaving:
            self.leave()
            return
        if self.blocked is not None and self.blocked not in self.world.server.connections:
            self.away = True
        self.blocked = None
        try:
            if self.away:
                self.ledger.reconcile()
                self.away = False
            if self.has_room:
                self._take()
        except CONNECTION_ERRORS:
            self.away = True
            self.poll.close()
        except identity.Fenced:
            self.die()

    def _take(self) -> None:
        try:
            reply = self._takes.take(self.node, QUEUES, LISTS)
        except ResponseError as error:
            raise_for(error, self.node)
        if isinstance(reply, int):
            self.ledger.compare(reply)
            self.blocked = self.poll.block(LOOK_EVERY, *map(keys.wake, QUEUES))
            return
        _, number, _, raw = reply
        message = json.loads(raw)
        task, tag = message["headers"]["id"], message["properties"]["delivery_tag"]
        self.ledger.hold(tag, number)
        waits_for = self.world.tasks[task].waits_for
        execution = Execution(self.node, number, task, tag, waits_for, runs=not waits_for)
        self.executions.append(execution)
        self.world.audit.begin(execution)
        if waits_for == "limit":
            self.ledger.wait(tag)

    # -- its pool

    def start(self, execution: Execution) -> None:
        """The time of one that waits has come."""
        try:
            self.ledger.start(execution.tag)
            execution.runs = True
        except identity.Fenced:
            self.die()

    def store(self, execution: Execution) -> None:
        """A child stores the result, unless there is one; it tries until it can."""
        try:
            key = result_key(execution.task)
            stored = self._results.get(key)
            if stored is None:
                stored = guarded(self.node, lambda: self._put(execution.task))
            execution.stored = bool(stored)
        except CONNECTION_ERRORS:
            pass
        except identity.Fenced:
            self.die()

    def _put(self, task: str) -> bool:
        if not self.world.tasks[task].large:
            return bool(self._store(**storing(self.node, task, "done")))
        # Of a backend it uses the client alone.
        backend = cast("Backend", SimpleNamespace(client=self._results))
        names, rest = storing(self.node, task, "done").values()
        return Backend._store_large(backend, names, *rest)

    def end(self, execution: Execution, outcome: str) -> None:
        """The event loop hears how an execution ended, and settles it."""
        execution.outcome = outcome
        self.executions.remove(execution)
        try:
            if outcome == "done":
                self.ledger.ack(execution.tag)
            else:
                if outcome == "died":
                    self.ledger.note_death(execution.tag, "killed by SIGKILL")
                self.ledger.reject(execution.tag)
        except identity.Fenced:
            self.die()

    def leave(self) -> None:
        """The way of ``Drain``: hand back; where that doesn't work try again, as long as there is
        time. While tasks run there is none left: else they would be waited for."""
        if self.frozen:
            return
        self.taking = False
        self.leaving = True
        running = any(execution.runs for execution in self.executions)
        try:
            self.ledger.release(LEFT)
        except CONNECTION_ERRORS:
            if not running:
                return
        except identity.Fenced:
            pass
        self.die()


# -- the manager ---------------------------------------------------------------------


class Manager:
    """Fails what was given up, and hears from guardian and platform who is gone."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.link = Link(world.server, "manager")
        self.client = Client(self.link)
        self.scripts = scripts.Scripts(self.client, MOST)
        self.store = self.client.register_script(scripts.STORE)
        self.told_dead: set[str] = set()  # by the guardian
        self.to_release: list[str] = []

    def turn(self) -> None:
        """One of the supervisor's."""
        try:
            self._give_up()
            while self.to_release:
                self.scripts.release(self.to_release[0], ENDED, died=True)
                self.to_release.pop(0)
        except CONNECTION_ERRORS:
            return

    def _give_up(self) -> None:
        while (entry := self.client.lindex(keys.GIVEN_UP, -1)) is not None:
            fields = json.loads(entry)
            if len(fields["deaths"]) != MOST:
                raise Violation(f"given up after {fields['deaths']}")
            task = json.loads(fields["message"])["headers"]["id"]
            self.store(**storing("", task, "lost"))
            self.world.audit.failed.add(task)
            self.client.lrem(keys.GIVEN_UP, -1, entry)


# -- all of them ---------------------------------------------------------------------


class World:
    """What there is, and time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        clock.now = 1000.0
        self.slept = 0.0  # of the clock's time, what nobody was awake in
        self.server = Server(lambda: clock.now)
        self.audit = Audit(self.server, LISTS, self._is_well)
        self.publishers = [Publisher(self, f"publisher{number}") for number in range(2)]
        self.workers: list[Worker] = []
        self.manager = Manager(self)
        self.guardian: guardian_module.Workers | None = None
        self.guardian_link = Link(self.server, "guardian")
        self.tasks: dict[str, Task] = {}
        self._undisturbed_from = 0.0
        self.news_are_complete = True
        self.server_since = -math.inf  # when it was last started again
        self.start_guardian()

    def _is_well(self, node: str) -> bool:
        """Whether nobody may take it for dead. What the guardian has once decided it carries out,
        however long that takes."""
        if self.guardian_link.failed:
            return False
        return any(worker.node == node and worker.is_well for worker in self.workers)

    def disturb(self) -> None:
        """Who is woken for a message from now on may never take it, for as long as it has said
        that it waits; then the others look for themselves."""
        self._undisturbed_from = self.clock.now + 2 * LOOK_EVERY + 2 * TICK

    # -- the guardian and its server

    def start_guardian(self) -> None:
        self.guardian_link = Link(self.server, "guardian")
        self.guardian = guardian_module.Workers(
            Client(self.guardian_link),
            patience=LIVENESS_TIMEOUT,
            max_deliveries=MOST,
            timeout=COMMAND_TIMEOUT,
        )

    def end_guardian(self) -> None:
        """It takes its server along, and what it was about to tell."""
        self.news_are_complete = False
        self.guardian = None
        self.stop_server()

    def stop_server(self) -> None:
        self.server.stop()

    def start_server(self) -> None:
        """The guardian's doing; if it is a new one, it knows that it has missed something."""
        self._forget_who_is_ill()
        self.server.start()
        self.server_since = self.clock.now
        if self.guardian is None:
            self.start_guardian()
        assert self.guardian is not None
        self.guardian.broker_was_away()

    # -- time

    def pass_time(self, seconds: float) -> None:
        """Guardian and watchdogs have their turns; the rest is for others to say."""
        until = self.clock.now + seconds
        closely = self.clock.now + CLOSELY
        while self.clock.now < until:
            self.tick(TICK if self.clock.now < closely else LONG_TICK)

    def tick(self, seconds: float = TICK) -> None:
        self.clock.now = round(self.clock.now + seconds, 3)
        self.look()
        for worker in self.workers:
            worker.look_after()
        self._check_that_the_ill_are_noticed(seconds)

    def look(self) -> None:
        """The guardian looks."""
        if self.guardian is not None and self.server.up:
            answered, dead = self.guardian.look()
            if not answered:
                self._forget_who_is_ill()
            self.manager.told_dead.update(each.node for each in dead)

    def sleep(self, seconds: float) -> None:
        """The whole machine sleeps: nobody does anything, and time has passed."""
        self.clock.now += seconds
        self.slept += seconds
        for worker in self.workers:
            worker.slept_through += 1

    # -- what holds after each step

    def check(self) -> None:
        """Everything that must be true at any time."""
        self.audit.check_running({worker.node for worker in self.workers if worker.there})
        self._check_that_nobody_waits()

    def _check_that_nobody_waits(self) -> None:
        if self.clock.now < self._undisturbed_from or not self.server.up:
            return
        fenced = self.audit.fenced
        if any(worker.is_about_to_take for worker in self.workers if worker.node not in fenced):
            return
        waiting = [worker.node for worker in self.workers if worker.acts and worker.waits]
        if not waiting:
            return
        for position, name in enumerate(LISTS):
            wake = keys.wake(QUEUES[position % len(QUEUES)])
            if self.server.data.get(name.encode()) and wake.encode() not in self.server.data:
                raise Violation(f"{waiting} wait, and nobody is woken for what is in {name!r}")

    def _forget_who_is_ill(self) -> None:
        for worker in self.workers:
            worker.ill_for = 0.0

    def _check_that_the_ill_are_noticed(self, seconds: float) -> None:
        members = self.server.data.get(keys.WORKERS.encode(), {})
        for worker in self.workers:
            ill = self.server.up and not worker.is_well and worker.node.encode() in members
            worker.ill_for = worker.ill_for + seconds if ill else 0.0
            if worker.ill_for > NOTICED_WITHIN:
                raise Violation(f"{worker} gives no sign of life, and nobody notices")

    # -- the end

    def settle_down(self) -> None:
        """Nothing goes wrong any more. All must be done, and nothing may be left."""
        for worker in self.workers:
            worker.fates.clear()
            worker.thaw()
            worker.heal()
        for link in (self.manager.link, self.guardian_link, *(p.link for p in self.publishers)):
            link.fates.clear()
        if not self.server.up:
            self.start_server()
        while self.server.late:
            self.server.arrive(0)
        self.boot()  # at least this one stays
        self.pass_time(3 * TICK)  # the guardian says what it has found
        until = self.clock.now + DONE_WITHIN
        while not self._is_quiet():
            if self.clock.now > until:
                raise Violation(f"not done after {DONE_WITHIN} s: {self.audit.unsettled}, {self}")
            self._go_on()
        self._check_results()

    def _go_on(self) -> None:
        self.tick()
        for publisher in self.publishers:
            if publisher.pending is not None:
                publisher.send()
        for worker in list(self.workers):
            worker.turn()
            for execution in list(worker.executions):
                self._finish(worker, execution)
            self.check()
        self.manager.turn()

    def _finish(self, worker: Worker, execution: Execution) -> None:
        if worker.acts and not execution.runs:
            worker.start(execution)
        if worker.acts and self.tasks[execution.task].deadly:
            worker.end(execution, "died")
        elif worker.acts:
            worker.store(execution)
            if worker.acts:
                worker.end(execution, "done")

    def _is_quiet(self) -> bool:
        data = self.server.data
        fenced = self.audit.fenced
        return not (
            any(publisher.pending for publisher in self.publishers)
            or self.manager.to_release
            or any(name.encode() in data for name in (*LISTS, keys.GIVEN_UP))
            or any(key.startswith(keys.unacked("").encode()) for key in data)
            or any(worker.there and worker.node in fenced for worker in self.workers)
            or {node.decode() for node in data.get(keys.WORKERS.encode(), {})}
            != {worker.node for worker in self.workers if worker.there}
        )

    def _check_results(self) -> None:
        if self.audit.unsettled:
            raise Violation(f"lost: {self.audit.unsettled}")
        data, audit = self.server.data, self.audit
        fenced = {node for node, why in audit.fenced.items() if why not in (LEFT, ENDED)}
        if self.news_are_complete and fenced - self.manager.told_dead:
            raise Violation(f"the manager never heard of {fenced - self.manager.told_dead}")
        for task in audit.published:
            if result_key(task).encode() not in data:
                raise Violation(f"{task} has no result")
        left = [key for key in data if key == keys.RETURNS.encode()]
        marks = (keys.started("").encode(), keys.waiting("").encode())
        left += [key for key in data if key.startswith(marks)]
        if left:
            raise Violation(f"left behind: {left}")
        done = sum(map(int, data.get(keys.DONE.encode(), {}).values()))
        if done != len(audit.settled):
            raise Violation(f"{done} acknowledgements counted, {len(audit.settled)} took effect")

    def boot(self) -> Worker:
        """Another worker."""
        worker = Worker(self, f"w{len(self.workers)}@h")
        self.workers.append(worker)
        return worker

    def __repr__(self) -> str:
        return f"{self.server.data}"


def doom(fates: Iterable[Fate], *queues: deque[Fate]) -> None:
    """What becomes of the next requests of these."""
    for queue in queues:
        queue.clear()
        queue.extend(fates)


def those(workers: Sequence[Worker], **wanted: bool) -> list[Worker]:
    """The workers of which all this is true."""
    return [
        worker
        for worker in workers
        if all(getattr(worker, name) == value for name, value in wanted.items())
    ]
