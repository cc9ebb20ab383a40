"""Was each task done as it should be, and why was each run again that was? Pure.

It knows what a fault may do, and nothing of how it is done. A message is run again if the process
that ran it ended, or its node was given up; a message is there twice if the task that publishes it
was run twice, or if the broker went as it was published. Whatever else is run again has no
explanation, and is a failure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chaos.record import Effect, Execution, Expected, Fault

#: Seconds after its body that a task may still be publishing what follows it.
CALLBACKS = 5.0

#: Seconds within which a broker that was away explains that a worker was taken for dead.
AFTERMATH = 15.0

#: The explanations that are no fault's name.
PUBLISHER = "the task that sends it was run again"
RESENT = "sent again, for the broker went in between"
LATE = "its worker wasn't back in time after the broker was away"

#: What :attr:`Verdict.fenced` says of a node that wasn't told to leave.
_LEFT = "it left"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was written down in a run.

    Args:
        expected: every task that was sent.
        outcomes: what the driver got, by task; one that is missing isn't in it.
        executions: all of them.
        faults: all of them.
        later: what was stored at the end, by task; a result may be gone by then.
        fenced: why, by node, as the broker has it at the end.
        idempotent: whether a publish that is repeated must leave one message.
    """

    expected: Sequence[Expected]
    outcomes: Mapping[str, str]
    executions: Sequence[Execution]
    faults: Sequence[Fault]
    later: Mapping[str, str] = field(default_factory=dict)
    fenced: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = False


@dataclass(slots=True)
class Verdict:
    """What the referee found."""

    tasks: int = 0
    right: int = 0
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    never_ran: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    executions: int = 0
    again: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    #: Each execution beyond one that has an explanation: which, and the executions of its task.
    explained: list[tuple[str, str]] = field(default_factory=list)
    #: By explanation: seconds from the fault to the next run, the longest.
    longest_wait: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """All that must not be."""
        return [
            *(f"missing: {what}" for what in self.missing),
            *(f"wrong: {what}" for what in self.wrong),
            *(f"changed later: {what}" for what in self.changed),
            *(f"has a result and never ran: {what}" for what in self.never_ran),
            *(f"ran and was never sent: {what}" for what in self.unknown),
            *(f"run again without a reason: {what}" for what in self.unexplained),
        ]


def judge(evidence: Evidence) -> Verdict:
    """Look at everything."""
    return _Referee(evidence).judge()


class _Referee:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.verdict = Verdict(executions=len(evidence.executions))
        #: By task, then by how often it had asked to be tried again.
        self.runs: dict[str, dict[int, list[Execution]]] = defaultdict(lambda: defaultdict(list))
        for execution in sorted(evidence.executions, key=lambda one: one.start):
            self.runs[execution.task][execution.retries].append(execution)
        self.by_pid: dict[int, list[Execution]] = defaultdict(list)
        for execution in evidence.executions:
            self.by_pid[execution.pid].append(execution)
        self.broker_faults = [f for f in evidence.faults if f.effect is Effect.BROKER]

    def judge(self) -> Verdict:
        known = {expected.task for expected in self.evidence.expected}
        self.verdict.tasks = len(known)
        self.verdict.unknown = sorted(self.runs.keys() - known)
        for expected in self.evidence.expected:
            self._look_at_result(expected)
            for retries, runs in sorted(self.runs.get(expected.task, {}).items()):
                self._look_at_runs(expected, retries, runs)
        return self.verdict

    # -- results ------------------------------------------------------------------

    def _look_at_result(self, expected: Expected) -> None:
        task, verdict = expected.task, self.verdict
        if task not in self.evidence.outcomes:
            verdict.missing.append(task)
            return
        got = self.evidence.outcomes[task]
        later = self.evidence.later.get(task, got)
        if got != expected.outcome:
            verdict.wrong.append(f"{task}: {got} instead of {expected.outcome}")
        elif later != got:
            verdict.changed.append(f"{task}: {got}, and {later} at the end")
        else:
            verdict.right += 1
        if all(run.end is None for runs in self.runs.get(task, {}).values() for run in runs):
            verdict.never_ran.append(task)

    # -- executions beyond one ------------------------------------------------------

    def _look_at_runs(self, expected: Expected, retries: int, runs: Sequence[Execution]) -> None:
        by_message: dict[str, list[Execution]] = defaultdict(list)
        for run in runs:
            by_message[run.message].append(run)
        firsts = sorted(runs[0].start for runs in by_message.values())
        self._look_at_messages(expected, retries, firsts[1:])
        for same in by_message.values():
            self._look_at_deliveries(same)

    def _look_at_deliveries(self, runs: Sequence[Execution]) -> None:
        """One message: all runs but one need a reason that it was handed out anew."""
        unexplained = len(runs) - 1
        for run in runs:
            if unexplained == 0:
                return
            others = [other.start for other in runs if other is not run]
            fault = self._fault_that_ended(run, before=max(others))
            if fault is not None:
                wait = min(at for at in others if at >= fault.at) - fault.at
                self._explain(fault.kind, runs, wait)
                unexplained -= 1
        for run in runs:
            if unexplained == 0:
                return
            others = [other.start for other in runs if other is not run]
            why = self._why_taken_for_dead(run, before=max(others))
            if why:
                self._explain(why, runs)
                unexplained -= 1
        if unexplained:
            self.verdict.unexplained.append(f"{unexplained} of {runs[0].task}: {_told(runs)}")

    def _fault_that_ended(self, run: Execution, before: float) -> Fault | None:
        """The first fault for which this run's message was given to another, who had it at the
        latest at ``before``."""
        for fault in self.evidence.faults:
            if fault.at > before or run.worker not in fault.workers:
                continue
            if fault.effect in {Effect.NODE_ENDED, Effect.NODE_FENCED} or (
                fault.effect is Effect.CHILD_ENDED
                and run.pid in fault.pids
                and run is self._last_run_in(run)
            ):
                return fault
        return None

    def _last_run_in(self, run: Execution) -> Execution:
        """What this run's child ran last: one task at a time, and none once it is killed."""
        return max(
            (one for one in self.by_pid[run.pid] if one.worker == run.worker),
            key=lambda one: one.start,
        )

    def _why_taken_for_dead(self, run: Execution, before: float) -> str:
        """A worker that nobody ended or froze is given up only if the broker was away."""
        if self.evidence.fenced.get(run.node, _LEFT) == _LEFT:
            return ""
        if not any(before - AFTERMATH <= fault.at <= before for fault in self.broker_faults):
            return ""
        hit = {fault.effect for fault in self.evidence.faults if run.worker in fault.workers}
        return LATE if hit <= {Effect.CHILD_ENDED, Effect.NONE} else ""

    def _look_at_messages(self, expected: Expected, retries: int, firsts: Sequence[float]) -> None:
        """Several messages of one task: all but the first need a reason that they were published.

        Args:
            firsts: when each but the first was run for the first time.
        """
        again = self._publisher_ran_again(expected, retries)
        runs = self.runs[expected.task][retries]
        for at in firsts:
            if again:
                again -= 1
                self._explain(PUBLISHER, runs)
            elif not self.evidence.idempotent and self._broker_went(expected, retries, at):
                self._explain(RESENT, runs)
            else:
                self.verdict.unexplained.append(
                    f"{expected.task} was published again: {_told(runs)}"
                )

    def _publishers(self, expected: Expected, retries: int) -> Iterable[Sequence[Execution]]:
        """The runs that publish this task, each publisher's."""
        if retries:
            return [self.runs[expected.task][retries - 1]]
        found = []
        for task in expected.after:
            tries = self.runs.get(task, {})
            found.append(tries[max(tries)] if tries else [])
        return found

    def _publisher_ran_again(self, expected: Expected, retries: int) -> int:
        return sum(max(0, len(runs) - 1) for runs in self._publishers(expected, retries))

    def _broker_went(self, expected: Expected, retries: int, before: float) -> bool:
        """Whether it did while this task was being published."""
        windows = [
            (run.start, before if run.end is None else run.end + CALLBACKS)
            for runs in self._publishers(expected, retries)
            for run in runs
        ]
        if expected.sent is not None and not retries:
            windows.append(expected.sent)
        return any(
            start <= fault.at <= min(end, before)
            for fault in self.broker_faults
            for start, end in windows
        )

    def _explain(self, why: str, runs: Sequence[Execution], wait: float | None = None) -> None:
        self.verdict.again[why] += 1
        self.verdict.explained.append((why, f"{runs[0].task}: {_told(runs)}"))
        if wait is not None:
            longest = self.verdict.longest_wait.get(why, 0.0)
            self.verdict.longest_wait[why] = max(longest, wait)


def _told(runs: Iterable[Execution]) -> str:
    """In words, each run with what tells it from the others."""
    return "; ".join(
        f"message {run.message[:8]} on {run.node} in {run.pid} from {run.start:.3f} to "
        + ("never" if run.end is None else f"{run.end:.3f}")
        for run in runs
    )
