"""The pure parts that keep a state, in whatever order they are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.attention import Attention
from cluster.broker.presence import Presence
from cluster.model import Phase, Registration, WorkerRef, WorkerStatus
from cluster.replacement import Replacements
from cluster.roster import Roster
from cluster.wire.deliveries import REMEMBERED, Deliveries

RUNNING = WorkerStatus(Phase.RUNNING)
DIED = WorkerStatus(Phase.FAILED, final=True, exit_code=-9)

# -- roster ----------------------------------------------------------------------------

WORKERS = st.integers(0, 2)
TOLD = st.sampled_from(["joined", "answered", "runs", "ended", "lost"])


@given(st.lists(st.tuples(TOLD, WORKERS)))
def test_a_worker_is_gone_once_whoever_says_so_first(told):
    """Guardian and platform both tell, at any time, and again; one replacement each is due."""
    roster = Roster()
    refs = [WorkerRef(f"w{number}") for number in range(3)]
    roster.launched(refs)
    gone: list[WorkerRef] = []
    for what, number in told:
        node, ref = f"n{number}@h", refs[number]
        before = ref in gone
        match what:
            case "joined":
                roster.joined(Registration(node=node, worker=ref.id, host="h", pid=1))
            case "answered":
                roster.answered([node], now=1.0)
            case "runs" if not roster.statuses[ref].final:
                roster.described({ref: RUNNING})
            case "ended":
                gone += [seat.ref for seat in roster.described({ref: DIED})]
            case "lost":
                gone += [seat.ref for seat in [roster.lost(node)] if seat is not None]
        if before:
            assert node not in roster.ready + roster.unanswered
    assert len(gone) == len(set(gone))
    assert {seat.ref for seat in roster.gone} == set(gone)
    assert len(roster.ready) + roster.coming + len(gone) == 3
    assert set(roster.starting) <= set(roster.unfinished)


# -- replacements ------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, 0.0, 1.0, 599.0]), st.floats(0, 30), st.sampled_from([0, 0, 1])
        )
    ),
    st.integers(0, 5),
)
def test_a_worker_that_was_of_use_is_always_replaced_and_the_others_within_a_budget(ends, wanted):
    replacements, now, in_vain = Replacements(wanted), 0.0, 0
    for ready_for, pause, done in ends:
        now += pause
        due = replacements.next(DIED, ready_for=ready_for, done=done, now=now)
        if done:
            assert due == 0.0
            in_vain = 0
        elif due is not None:
            assert due >= 0.0
            in_vain += 1
        # Two budgets, each of at least that.
        assert in_vain <= max(10, 2 * wanted) + max(3, wanted)


# -- attention and presence ----------------------------------------------------------------


@given(st.lists(st.floats(0, 1000)), st.floats(0.1, 10))
def test_attention_is_no_more_than_the_time_and_no_more_than_the_looks(pauses, longest):
    attention, now = Attention(longest), 0.0
    seconds = attention.look(now)
    assert seconds == 0.0
    for count, pause in enumerate(pauses, 1):
        now += pause
        later = attention.look(now)
        assert seconds <= later <= min(now, count * longest) * (1 + 1e-9)
        seconds = later


@given(
    st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans(), st.booleans())),
)
def test_who_is_declared_dead_was_missing_at_two_looks_in_a_row(looks):
    presence, now, missing = Presence(10.0), 0.0, 0
    for pause, subscribes, connected, away in looks:
        now += pause
        if away:
            presence.broker_was_away(["a"], now)
            missing = 0
        missing = 0 if subscribes else missing + 1
        suspects = presence.look({"a": int(subscribes)}, now)
        dead = presence.judge(suspects, {"a"} if connected else set(), now)
        assert not dead or (missing >= 2 and not subscribes)
        if missing and not dead:
            assert presence.must_ask(1, 1), "it is followed up"


@given(st.lists(st.tuples(st.floats(0.1, 3), st.floats(0, 30))))
def test_who_was_heard_of_in_the_last_while_is_not_dead(hearings):
    """The silence must be long by the broker's measure, and found in two hearings at least."""
    presence, now, quiet_since = Presence(10.0), 0.0, None
    for pause, silence in hearings:
        now += pause
        quiet_since = (quiet_since if quiet_since is not None else now) if silence >= 5 else None
        if presence.hear({"a": silence}, now):
            assert silence >= 9.0
            assert quiet_since is not None and now - quiet_since >= 3.0
            quiet_since = None


# -- deliveries ----------------------------------------------------------------------------


def test_deliveries_are_told_once_in_order_and_again_if_that_failed():
    deliveries = Deliveries()
    deliveries.note(["a", "b"])
    deliveries.note(["c"])
    first = deliveries.take(2)
    assert first == ["a", "b"]
    deliveries.put_back(first)
    assert deliveries.take(10) == ["a", "b", "c"]
    assert deliveries.take(10) == []
    assert deliveries.knows("a") and deliveries.knows("c") and not deliveries.knows("d")
    deliveries.forget("a")
    deliveries.forget("a")
    assert not deliveries.knows("a")


@pytest.mark.parametrize("more", [0, 5])
def test_of_deliveries_the_last_are_remembered(more):
    deliveries = Deliveries()
    deliveries.note(str(number) for number in range(REMEMBERED + more))
    assert deliveries.knows(str(more))
    assert not more or not deliveries.knows(str(more - 1))
