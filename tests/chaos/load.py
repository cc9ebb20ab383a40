"""The tasks that are sent meanwhile, and the threads that send and collect them."""

from __future__ import annotations

import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import chain, chord, group
from celery.exceptions import TimeoutError as ResultTimeoutError

from chaos.app import app, child_id, echo, fail, flaky, more, short, slow, spread, total
from chaos.record import Expected, outcome

#: Jobs that a client sends before it collects their results.
BATCH = (4, 24)


@dataclass(slots=True)
class Job:
    """What is sent at once: how to send it, what must come of it.

    Args:
        send: returns the result that a user would ask.
        value: what that one gives.
        tasks: all tasks that it makes, by id: the value, and who publishes it.
    """

    send: Callable[[], Any]
    value: Any
    tasks: dict[str, tuple[Any, tuple[str, ...]]]


class Maker:
    """Makes jobs, by a seed: the ids of their tasks included."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)

    def jobs(self, kinds: dict[str, int]) -> list[Job]:
        """A batch of them. ``kinds``: the names of methods, and how often each."""
        names = self._rng.choices(
            tuple(kinds), weights=tuple(kinds.values()), k=self._rng.randint(*BATCH)
        )
        return [getattr(self, name)() for name in names]

    def _id(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))

    def _number(self) -> int:
        return self._rng.randrange(10**6)

    def _one(self, task: Any, *args: Any, value: Any, **options: Any) -> Job:
        id_ = self._id()
        return Job(
            lambda: task.apply_async(args, task_id=id_, **options), value, {id_: (value, ())}
        )

    # -- kinds ------------------------------------------------------------------------

    def short(self) -> Job:
        x = self._number()
        return self._one(short, x, value=2 * x + 1)

    def large(self) -> Job:
        """Large enough to be handled by itself, there and back."""
        text = str(self._number()) * self._rng.randrange(10_000, 40_000)
        return self._one(echo, text, value=text)

    def slow(self) -> Job:
        x, seconds = self._number(), self._rng.uniform(1, 4)
        return self._one(slow, x, seconds, value=2 * x + 1)

    def later(self) -> Job:
        """With an ETA: a worker holds it until then."""
        x, seconds = self._number(), self._rng.uniform(0.1, 4)
        return self._one(short, x, value=2 * x + 1, countdown=seconds)

    def urgent(self) -> Job:
        """With a priority."""
        x = self._number()
        return self._one(short, x, value=2 * x + 1, priority=self._rng.randrange(10))

    def flaky(self) -> Job:
        x, times = self._number(), self._rng.randint(1, 3)
        return self._one(flaky, x, times, value=2 * x + 1)

    def fail(self) -> Job:
        x = self._number()
        return self._one(fail, x, value=ValueError(f"on purpose {x}"))

    def spread(self) -> Job:
        x, n = self._number(), self._rng.randint(1, 6)
        job = self._one(spread, x, n, value=None)
        [parent] = job.tasks
        ids = [child_id(parent, i) for i in range(n)]
        job.value = ids
        job.tasks = {parent: (ids, ())}
        job.tasks.update({id_: (2 * (x + i) + 1, (parent,)) for i, id_ in enumerate(ids)})
        return job

    def _header(self) -> tuple[list[Any], dict[str, tuple[Any, tuple[str, ...]]], list[int]]:
        xs = [self._number() for _ in range(self._rng.randint(2, 8))]
        ids = [self._id() for _ in xs]
        values = [2 * x + 1 for x in xs]
        signatures = [short.s(x).set(task_id=id_) for x, id_ in zip(xs, ids, strict=True)]
        tasks = {id_: (value, ()) for id_, value in zip(ids, values, strict=True)}
        return signatures, tasks, values

    def group(self) -> Job:
        signatures, tasks, values = self._header()
        return Job(lambda: group(signatures).apply_async(), values, tasks)

    def chord(self) -> Job:
        signatures, tasks, values = self._header()
        body, value = self._id(), [sum(values), *values]
        header = tuple(tasks)
        return Job(
            lambda: chord(signatures)(total.s().set(task_id=body)),
            value,
            {**tasks, body: (value, header)},
        )

    def chord_in_chain(self) -> Job:
        """A group between two steps of a chain."""
        signatures, tasks, values = self._header()
        first, body, x = self._id(), self._id(), self._number()
        header = tuple(tasks)
        # What the first step gives is added to what each of the header is given.
        signatures = [more.s(y).set(task_id=id_) for id_, y in zip(header, values, strict=True)]
        values = [2 * x + 1 + y for y in values]
        value = [sum(values), *values]
        return Job(
            lambda: chain(
                short.s(x).set(task_id=first), group(signatures), total.s().set(task_id=body)
            ).apply_async(),
            value,
            {
                first: (2 * x + 1, ()),
                **{id_: (v, (first,)) for id_, v in zip(header, values, strict=True)},
                body: (value, header),
            },
        )

    def chain(self) -> Job:
        x, ys = self._number(), [self._number() for _ in range(self._rng.randint(1, 4))]
        last, value = self._id(), 2 * x + 1
        signatures = [short.s(x).set(task_id=last)]
        tasks: dict[str, tuple[Any, tuple[str, ...]]] = {last: (value, ())}
        for y in ys:
            id_, value = self._id(), value + y
            signatures.append(more.s(y).set(task_id=id_))
            tasks[id_] = (value, (last,))
            last = id_
        return Job(lambda: chain(*signatures).apply_async(), value, tasks)


#: What each client sends.
CLIENTS: tuple[dict[str, int], ...] = (
    {"short": 10, "urgent": 4, "fail": 1},
    {"short": 12, "later": 4, "flaky": 4, "spread": 4, "large": 1},
    {"group": 3, "chord": 4, "chord_in_chain": 2, "chain": 3},
    {"slow": 1, "short": 1, "later": 1},
)


@dataclass(slots=True)
class Tally:
    """What the clients sent and got."""

    expected: list[Expected] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    #: What went wrong besides: a send that raised, a chord's value.
    troubles: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Sends a batch, collects its results, and again, until told to stop.

    Args:
        seed: of the run.
        number: which client it is.
        patience: seconds for a batch's results, from when it was sent.
    """

    def __init__(self, seed: int, number: int, patience: float) -> None:
        super().__init__(name=f"chaos-client-{number}", daemon=True)
        self.tally = Tally()
        self.batches = 0
        self._maker = Maker(f"client {number} of {seed}")
        self._kinds = CLIENTS[number]
        self._patience = patience
        self._told = threading.Event()

    def stop(self) -> None:
        """Collect what was sent, and send no more."""
        self._told.set()

    def run(self) -> None:
        try:
            while not self._told.is_set() and len(self.tally.troubles) < 5:
                self._batch()
        except BaseException as error:  # noqa: BLE001 (whatever it is, the run must hear of it)
            trace = "".join(traceback.format_exception(error))
            self.tally.troubles.append(f"{self.name} ended: {trace}")

    def _batch(self) -> None:
        sent = [
            (job, result)
            for job in self._maker.jobs(self._kinds)
            if (result := self._send(job)) is not None
        ]
        deadline = time.monotonic() + self._patience
        for job, result in sent:
            self._collect(job, result, deadline)
        self.batches += 1

    def _send(self, job: Job) -> Any:
        began = time.monotonic()
        try:
            result = job.send()
        except Exception as error:  # noqa: BLE001 (all are failures of the run)
            trace = "".join(traceback.format_exception(error))
            self.tally.troubles.append(f"{list(job.tasks)} couldn't be sent: {trace}")
            return None
        sent = (began, time.monotonic())
        self.tally.expected += [
            Expected(id_, outcome(value), None if after else sent, after)
            for id_, (value, after) in job.tasks.items()
        ]
        return result

    def _collect(self, job: Job, result: Any, deadline: float) -> None:
        """First as a user would, then task by task."""
        try:
            got = outcome(self._get(result, deadline))
        except ResultTimeoutError:
            got = "nothing"
        if got != outcome(job.value):
            self.tally.troubles.append(f"{result!r} gave {got} instead of {outcome(job.value)}")
        for id_ in job.tasks:
            try:
                got = outcome(self._get(app.AsyncResult(id_), deadline))
            except ResultTimeoutError:
                continue
            self.tally.outcomes[id_] = got

    @staticmethod
    def _get(result: Any, deadline: float) -> Any:
        left = max(0.5, deadline - time.monotonic())
        return result.get(timeout=left, propagate=False)
