"""The chaos suite's referee, on records made by hand; and its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chaos import record
from chaos.faults import KINDS, chosen
from chaos.plan import Kind, make_plan
from chaos.record import Effect, Execution, Expected, Fault
from chaos.referee import LATE, PUBLISHER, RESENT, Evidence, Verdict, judge

A, B = "local-aaaaaa-11111111@h", "local-bbbbbb-22222222@h"

ONE = Expected("t", "1", sent=(0.0, 0.5))
RUN = Execution("t", 0, "m", A, 100, 1.0, 2.0)
AGAIN = Execution("t", 0, "m", B, 200, 5.0, 6.0)
OTHER_MESSAGE = replace(AGAIN, message="n")


def verdict(
    *executions: Execution,
    faults: tuple[Fault, ...] = (),
    expected: tuple[Expected, ...] = (ONE,),
    outcomes: dict[str, str] | None = None,
    **more: object,
) -> Verdict:
    found = {one.task: one.outcome for one in expected} if outcomes is None else outcomes
    return judge(Evidence(expected, found, executions, faults, **more))


def fault(effect: Effect, at: float, worker: str = "local-aaaaaa", pid: int = 0) -> Fault:
    return Fault("a-fault", effect, at, (worker,), (pid,))


# -- results -------------------------------------------------------------------------------


def test_a_task_that_ran_once_and_has_its_result_is_right():
    found = verdict(RUN)
    assert (found.tasks, found.right, found.executions) == (1, 1, 1)
    assert not found.failures


def test_a_result_that_never_came_is_missing():
    assert verdict(RUN, outcomes={}).missing == ["t"]


def test_another_result_is_wrong():
    found = verdict(RUN, outcomes={"t": "2"})
    assert found.wrong == ["t: 2 instead of 1"]
    assert found.right == 0


def test_a_result_that_is_another_at_the_end_has_changed():
    assert verdict(RUN, later={"t": "null"}).changed == ["t: 1, and null at the end"]


def test_a_result_of_a_task_that_never_got_to_its_end_is_a_failure():
    assert verdict(replace(RUN, end=None)).never_ran == ["t"]
    assert verdict().never_ran == ["t"]


def test_a_task_that_nobody_sent_is_a_failure():
    assert verdict(RUN, replace(RUN, task="u", pid=7)).unknown == ["u"]


# -- one message, several runs ---------------------------------------------------------------


@pytest.mark.parametrize("effect", [Effect.NODE_ENDED, Effect.NODE_FENCED])
def test_a_worker_that_ended_explains_that_its_task_is_run_again(effect: Effect):
    found = verdict(RUN, AGAIN, faults=(fault(effect, 1.5),))
    assert found.again == {"a-fault": 1}
    assert found.longest_wait == {"a-fault": 3.5}
    assert not found.failures


@pytest.mark.parametrize(
    "faults",
    [
        (),
        (fault(Effect.NODE_ENDED, 5.5),),  # after the second run had begun
        (fault(Effect.NODE_ENDED, 1.5, worker="local-cccccc"),),
        (fault(Effect.NONE, 1.5),),
        (fault(Effect.TOLD_TO_LEAVE, 1.5),),
        (fault(Effect.BROKER, 1.5),),
    ],
    ids=["nothing", "later", "another worker", "a delay", "a request to leave", "the broker"],
)
def test_what_explains_no_second_run(faults: tuple[Fault, ...]):
    found = verdict(RUN, AGAIN, faults=faults)
    assert len(found.unexplained) == 1
    assert not found.again


def test_a_task_that_died_twice_needs_two_reasons():
    third = replace(AGAIN, node="local-cccccc-33333333@h", start=9.0, end=9.5)
    first = fault(Effect.NODE_ENDED, 1.5)
    assert len(verdict(RUN, AGAIN, third, faults=(first,)).unexplained) == 1
    both = (first, fault(Effect.NODE_ENDED, 5.5, worker="local-bbbbbb"))
    found = verdict(RUN, AGAIN, third, faults=both)
    assert found.again == {"a-fault": 2}
    assert not found.failures


def test_a_zombie_may_run_later_than_who_replaced_it():
    """Frozen with the message in hand, it starts once it goes on."""
    thawed = replace(RUN, start=7.0, end=7.5)
    assert not verdict(AGAIN, thawed, faults=(fault(Effect.NODE_FENCED, 1.5),)).failures


def test_a_child_explains_what_it_ran_last_and_nothing_else():
    killed = fault(Effect.CHILD_ENDED, 3.0, pid=100)
    assert not verdict(RUN, AGAIN, faults=(killed,)).failures
    between = replace(RUN, task="u", message="v", start=2.5, end=None)
    expected = (ONE, Expected("u", "1", sent=(0.0, 0.5)))
    found = verdict(RUN, AGAIN, between, faults=(killed,), expected=expected)
    assert len(found.unexplained) == 1
    # By when it is killed, it may be at something newer than when that was aimed at it.
    assert not verdict(RUN, AGAIN, faults=(replace(killed, at=0.9),)).failures
    other = fault(Effect.CHILD_ENDED, 1.5, pid=101)
    assert len(verdict(RUN, AGAIN, faults=(other,)).unexplained) == 1


def test_a_worker_given_up_after_the_broker_was_away():
    away = Fault("broker-kill", Effect.BROKER, 3.0)
    fenced = {A: "its connection is gone"}
    found = verdict(RUN, AGAIN, faults=(away,), fenced=fenced)
    assert found.again == {LATE: 1}
    assert verdict(RUN, AGAIN, faults=(away,), fenced={A: "it left"}).unexplained
    assert verdict(RUN, AGAIN, faults=(), fenced=fenced).unexplained
    # Told to leave, it says what it has done before it goes.
    told = fault(Effect.TOLD_TO_LEAVE, 3.0)
    assert verdict(RUN, AGAIN, faults=(away, told), fenced=fenced).unexplained
    # Killed afterwards, it would be fenced for that.
    killed = fault(Effect.NODE_ENDED, 9.0)
    assert verdict(RUN, AGAIN, faults=(away, killed), fenced=fenced).unexplained
    long_ago = Fault("broker-kill", Effect.BROKER, -60.0)
    assert verdict(RUN, AGAIN, faults=(long_ago,), fenced=fenced).unexplained


# -- several messages -----------------------------------------------------------------------


def test_a_second_message_needs_a_reason():
    assert verdict(RUN, OTHER_MESSAGE).unexplained
    # That its worker ended is none: the message would be the same.
    assert verdict(RUN, OTHER_MESSAGE, faults=(fault(Effect.NODE_ENDED, 1.5),)).unexplained


def test_the_broker_went_as_it_was_sent():
    during = Fault("broker-kill", Effect.BROKER, 0.2)
    assert verdict(RUN, OTHER_MESSAGE, faults=(during,)).again == {RESENT: 1}
    assert verdict(RUN, OTHER_MESSAGE, faults=(replace(during, at=0.7),)).unexplained
    assert verdict(RUN, OTHER_MESSAGE, faults=(during,), idempotent=True).unexplained


PARENT = Expected("p", "2", sent=(0.0, 0.1))
CHILD = Expected("t", "1", after=("p",))
PARENT_RUN = Execution("p", 0, "pm", A, 100, 0.5, 0.6)
PARENT_AGAIN = replace(PARENT_RUN, node=B, pid=200, start=3.0, end=3.1)
KILLED = fault(Effect.NODE_ENDED, 0.7)


def test_a_task_is_sent_as_often_as_the_one_that_sends_it_is_run():
    runs = (PARENT_RUN, PARENT_AGAIN, RUN, OTHER_MESSAGE)
    found = verdict(*runs, faults=(KILLED,), expected=(PARENT, CHILD))
    assert found.again == {"a-fault": 1, PUBLISHER: 1}
    third = replace(OTHER_MESSAGE, message="o", start=8.0, end=8.5)
    found = verdict(*runs, third, faults=(KILLED,), expected=(PARENT, CHILD))
    assert len(found.unexplained) == 1


def test_a_body_is_sent_once_by_all_of_its_header():
    """Two tasks that ran once each are no reason for two messages."""
    header = (PARENT, Expected("q", "2", sent=(0.0, 0.1)))
    body = Expected("t", "1", after=("p", "q"))
    runs = (PARENT_RUN, replace(PARENT_RUN, task="q", pid=101), RUN, OTHER_MESSAGE)
    assert verdict(*runs, expected=(*header, body)).unexplained
    found = verdict(*runs, PARENT_AGAIN, faults=(KILLED,), expected=(*header, body))
    assert not found.failures


def test_a_try_is_sent_by_the_one_before():
    """Each try is a message of its own; a second one needs a second run of the try before."""
    tried = replace(RUN, retries=1, message="r", start=3.0, end=3.5)
    assert not verdict(RUN, tried).failures
    twice = replace(tried, message="s", start=7.0, end=7.5)
    assert verdict(RUN, tried, twice).unexplained
    found = verdict(RUN, AGAIN, tried, twice, faults=(fault(Effect.NODE_ENDED, 1.5),))
    assert not found.failures


def test_the_broker_went_as_a_task_sent_another():
    during = Fault("broker-kill", Effect.BROKER, 0.55)
    expected = (PARENT, CHILD)
    runs = (PARENT_RUN, RUN, OTHER_MESSAGE)
    assert verdict(*runs, faults=(during,), expected=expected).again == {RESENT: 1}
    before = replace(during, at=0.4)
    assert verdict(*runs, faults=(before,), expected=expected).unexplained


# -- the record -----------------------------------------------------------------------------


class Request:
    id = "t"
    retries = 0
    hostname = A
    properties = {"delivery_tag": "m"}  # noqa: RUF012 (stands for Celery's)


def test_executions_are_read_as_they_were_written(tmp_path: Path, monkeypatch):
    """One that didn't end has none; the same child may run the same message twice."""
    path = tmp_path / "record"
    monkeypatch.setenv(record.VARIABLE, str(path))
    assert record.read(path) == []
    for _ in range(2):
        with record.executing(Request):
            pass
    with pytest.raises(ValueError, match="on purpose"), record.executing(Request):
        raise ValueError("on purpose")
    unfinished = record.executing(Request)
    unfinished.__enter__()
    runs = record.read(path)
    unfinished.__exit__(None, None, None)
    assert [run.end is None for run in runs] == [False, False, False, True]
    assert all(run.start <= run.end for run in runs[:3])
    assert [run.start for run in runs] == sorted(run.start for run in runs)
    assert {run.worker for run in runs} == {"local-aaaaaa"}


# -- the plan ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan():
    kinds = chosen([])
    assert make_plan(7, 300, kinds) == make_plan(7, 300, kinds)
    assert make_plan(7, 300, kinds).steps != make_plan(8, 300, kinds).steps


def test_a_longer_plan_begins_like_a_shorter_one():
    kinds = chosen([])
    assert make_plan(7, 300, kinds).steps[:50] == make_plan(7, 50, kinds).steps


def test_kinds_of_one_group_keep_apart():
    """However rarely anything else is chosen: what the broker's guardian bears is bounded."""
    kinds = [Kind("a", 9, "g", 8.0), Kind("b", 9, "g", 8.0), Kind("c", 1)]
    now, last = 0.0, -8.0
    for step in make_plan(7, 200, kinds).steps:
        now += step.pause
        if step.fault in {"a", "b"}:
            assert now - last >= 8.0
            last = now


def test_a_plan_of_one_group_waits():
    assert sum(step.pause for step in make_plan(7, 5, [Kind("a", 1, "g", 8.0)]).steps) >= 32


def test_kinds_are_known_by_the_names_of_what_they_do():
    assert all(name == kind.name for name, (kind, _) in KINDS.items())
    with pytest.raises(KeyError):
        chosen(["no-such-fault"])
