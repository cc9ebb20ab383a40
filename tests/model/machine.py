"""What may happen to the hand-out, in any order, and what must hold then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit import Execution
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from miniredis import Fate
from world import LISTS, TICK, Clock, Task, Worker, World, doom, those

#: The guardian's as well: see conftest.py.
CLOCK = Clock()

#: With fewer workers than that, another one may come.
FEW = 2

#: What a worker may do by itself; what is done more often is here more often.
STEPS = (
    *("turn", "finish", "turn", "store", "acknowledge", "turn"),
    *("start", "put back", "die of it", "leave"),
)

#: What may happen to a worker.
BLOWS = ("freeze", "thaw", "cut_off", "heal", "break_connections", "die")

#: What may happen to all.
DISASTERS = ("server", "guardian", "sleep")

#: Which of its executions a step is for.
ABLE: dict[str, Callable[[Execution], bool]] = {
    "start": lambda execution: not execution.runs,
    "store": lambda execution: execution.runs and not execution.stored,
    "finish": lambda execution: execution.runs,
    "acknowledge": lambda execution: execution.stored,
    "put back": lambda execution: execution.runs,
    "die of it": lambda execution: execution.runs,
}

#: How an execution has ended after a step.
OUTCOMES = {"acknowledge": "done", "put back": "put back", "die of it": "died"}

#: For how long nothing else happens.
SECONDS = (0.0, 2 * TICK, 12.0, 3.0, 24.0)


@dataclass(frozen=True)
class Focus:
    """What there is to choose from. With less, what is left is met sooner."""

    steps: Sequence[str] = STEPS
    fates: Sequence[Fate] = tuple(Fate)
    blows: Sequence[str] = BLOWS
    disasters: Sequence[str] = DISASTERS
    seconds: Sequence[float] = SECONDS
    waits_for: Sequence[str] = ("", "", "", "eta", "limit")
    large: Sequence[bool] = (False, False, True)
    usual: int = 3  # steps in which nothing unusual comes of a request, for one in which it does


class Protocol(RuleBasedStateMachine):
    """Anything that may happen, in any order."""

    focus = Focus()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(CLOCK)
        self.world.audit.note = note

    # -- choices --------------------------------------------------------------

    def one_of(self, data: st.DataObject, choices: Sequence[Any], what: str | None = None) -> Any:
        return data.draw(st.sampled_from(choices), what)

    def some_worker(self, data: st.DataObject) -> Worker:
        """One that is there; rather one that has something to lose."""
        there = those(self.world.workers, there=True)
        busy = [worker for worker in there if worker.executions or worker.ledger._unsent]
        return self.one_of(data, there + 3 * busy)

    def fates(self, data: st.DataObject) -> list[Fate]:
        """What becomes of the first requests of a step; mostly, nothing unusual."""
        if not self.focus.fates or data.draw(st.integers(0, self.focus.usual), "as usual"):
            return []
        return data.draw(
            st.lists(st.sampled_from(self.focus.fates), min_size=1, max_size=2), "fates"
        )

    @initialize(data=st.data(), workers=st.integers(1, 3), tasks=st.integers(0, 4))
    def begin(self, data: st.DataObject, workers: int, tasks: int) -> None:
        for _ in range(workers):
            self.world.boot()
        for _ in range(tasks):
            self.publish(data)

    # -- what is wanted -------------------------------------------------------

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """One publisher sends another task, or the one that it has no answer for."""
        publisher = self.one_of(data, self.world.publishers, "by")
        doom(self.fates(data), publisher.link.fates)
        if publisher.pending is None:
            task = Task(
                f"t{len(self.world.tasks)}",
                waits_for=self.one_of(data, self.focus.waits_for, "waits for"),
                large=self.one_of(data, self.focus.large, "large"),
                deadly=self.one_of(data, (False, False, True), "deadly"),
            )
            self.world.tasks[task.id] = task
            publisher.publish(task, data.draw(st.integers(0, len(LISTS) - 1), "to"))
        elif self.one_of(data, (True, True, True, False), "again"):
            publisher.send()
        else:
            publisher.give_up()

    @precondition(lambda self: len(those(self.world.workers, acts=True)) < FEW)
    @rule()
    def boot(self) -> None:
        self.world.boot()

    def work(self, data: st.DataObject) -> None:
        """A worker does what it can of some steps."""
        self.go_on(data, self.some_worker(data))

    def go_on(self, data: st.DataObject, worker: Worker) -> None:
        """One that was frozen goes on where it was."""
        worker.thaw()
        steps = st.lists(st.sampled_from(self.focus.steps), min_size=3, max_size=10)
        for step in data.draw(steps):
            if worker.acts:
                fates = self.fates(data)
                if set(fates) - {Fate.DONE} or step == "leave":
                    self.world.disturb()
                doom(fates, worker.fates)
                self.step(data, worker, step)

    # Three times, so that it is chosen more often.
    work_first, work_on, work_more = (
        precondition(lambda self: those(self.world.workers, there=True))(rule(data=st.data())(act))
        for act in 3 * (work,)
    )

    def step(self, data: st.DataObject, worker: Worker, step: str) -> None:
        if step in {"turn", "leave"}:
            getattr(worker, step)()
            return
        able = [execution for execution in worker.executions if ABLE[step](execution)]
        if not able:
            return
        one = self.one_of(data, able)
        match step:
            case "start":
                worker.start(one)
            case "store":
                worker.store(one)
            case "finish":
                self.finish(worker, one)
            case _:
                worker.end(one, OUTCOMES[step])

    def finish(self, worker: Worker, execution: Execution) -> None:
        """The result arrives; what becomes of requests holds for the acknowledgement."""
        fates = list(worker.fates)
        worker.fates.clear()
        worker.store(execution)
        if worker.there and execution.stored:
            doom(fates, worker.fates)
            worker.end(execution, "done")

    # -- what goes wrong ------------------------------------------------------

    @precondition(lambda self: self.focus.blows and those(self.world.workers, there=True))
    @rule(data=st.data())
    def befall(self, data: st.DataObject) -> None:
        self.world.disturb()
        worker = self.some_worker(data)
        getattr(worker, self.one_of(data, self.focus.blows))()
        self.world.pass_time(self.one_of(data, self.focus.seconds))
        if worker.there and data.draw(st.booleans(), "goes on"):
            self.go_on(data, worker)

    @precondition(lambda self: self.world.server.late)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """What was held back comes in."""
        self.world.server.arrive(data.draw(st.integers(0, len(self.world.server.late) - 1)))

    @precondition(lambda self: self.focus.disasters or not self.world.server.up)
    @rule(data=st.data())
    def break_all(self, data: st.DataObject) -> None:
        """For all at once: the server is killed, or the guardian, which takes it along; or the
        machine sleeps. What is broken is mended."""
        if not self.world.server.up:
            self.world.start_server()
            return
        match self.one_of(data, self.focus.disasters):
            case "guardian":
                self.world.end_guardian()
            case "server":
                self.world.stop_server()
            case "sleep":
                self.world.sleep(30.0)

    # -- the guardian, the manager and time -----------------------------------

    @rule(data=st.data())
    def pass_time(self, data: st.DataObject) -> None:
        self.world.pass_time(self.one_of(data, self.focus.seconds))

    @rule(data=st.data())
    def manage(self, data: st.DataObject) -> None:
        """The guardian looks, or the manager does what is due; it may have heard from the platform
        that a worker's process has ended."""
        fates = self.fates(data)
        if data.draw(st.booleans(), "guardian"):
            # When next it has something to say. It sends nothing again by itself.
            once = [Fate.UNANSWERED if fate is Fate.TWICE else fate for fate in fates]
            doom(once, self.world.guardian_link.fates)
            self.world.look()
            return
        ended = those(self.world.workers, there=False)
        if ended and data.draw(st.booleans(), "platform"):
            self.world.manager.to_release.append(self.one_of(data, ended).node)
        doom(fates, self.world.manager.link.fates)
        self.world.manager.turn()

    # -- what must hold

    @invariant()
    def all_is_as_promised(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if not self.world.audit.violated:
            note("nothing goes wrong from here on")
            self.world.settle_down()


def run(focus: Focus, steps: int, **given: object) -> None:
    """Try histories of this many steps; raise what was found, with the steps that led there."""

    class Focused(Protocol):
        pass

    Focused.focus = focus
    run_state_machine_as_test(
        Focused,
        settings=settings(
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **given,
        ),
    )
