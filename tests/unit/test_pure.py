"""The decisions: pure functions and data, told what time it is."""

from __future__ import annotations

import pytest

from cluster import jsonlines
from cluster.attention import Attention
from cluster.broker import messages
from cluster.broker.presence import Presence
from cluster.broker.room import Gauge, Level
from cluster.model import (
    TRANSITIONS,
    ClusterStatus,
    Endpoint,
    Phase,
    Registration,
    State,
    WorkerRef,
    WorkerStatus,
    WorkerView,
)
from cluster.readiness import Verdict, decide
from cluster.replacement import IDLE_AT_LEAST, LONG, UNREADY_AT_LEAST, WINDOW, Replacements
from cluster.restarts import Restarts
from cluster.roster import Roster
from cluster.wire import ending, exitcodes, identity, registration, secret
from cluster.wire.exitcodes import ExitCode

# -- readiness ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ready", "coming", "wanted", "minimum", "expired", "verdict"),
    [
        (0, 4, 4, 4, False, Verdict.WAIT),
        (3, 1, 4, 2, False, Verdict.WAIT),  # the minimum is there, and more may come
        (4, 0, 4, 4, False, Verdict.ALL),
        (5, 0, 4, 4, False, Verdict.ALL),
        (0, 0, 0, 0, False, Verdict.ALL),
        (2, 2, 4, 2, True, Verdict.ENOUGH),
        (1, 3, 4, 2, True, Verdict.TOO_FEW),
        (2, 0, 4, 2, False, Verdict.ENOUGH),  # the others have failed for good
        (2, 1, 4, 4, False, Verdict.TOO_FEW),  # the minimum can't be reached any more
        (0, 0, 4, 1, False, Verdict.TOO_FEW),
    ],
)
def test_readiness(ready, coming, wanted, minimum, expired, verdict):
    found = decide(ready=ready, coming=coming, wanted=wanted, minimum=minimum, expired=expired)
    assert found is verdict


# -- restarts and replacements -------------------------------------------------------


def test_restarts_come_with_growing_pauses_and_end():
    restarts = Restarts(limit=4, window=10.0, first=0.1, longest=0.3)
    assert [restarts.next(0.0) for _ in range(6)] == [0.0, 0.1, 0.2, 0.3, None, None]


def test_restarts_may_be_many_at_once_and_be_forgotten():
    restarts = Restarts(limit=4, window=10.0, first=0.1, at_once=3)
    assert [restarts.next(0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.1, None]
    restarts.forget()
    assert restarts.next(0.0) == 0.0


def test_old_restarts_are_forgotten():
    restarts = Restarts(limit=1, window=10.0)
    assert restarts.next(0.0) == 0.0
    assert restarts.next(9.0) is None
    assert restarts.next(10.0) == 0.0


SECRET = "00" * 32

DIED = WorkerStatus(Phase.FAILED, final=True, exit_code=-9)
HOPELESS = WorkerStatus(Phase.FAILED, final=True, retryable=False, exit_code=84)


def test_a_worker_whose_successor_would_fail_alike_is_not_replaced():
    assert Replacements(4).next(HOPELESS, ready_for=None, done=0, now=0.0) is None


def fruitless(replacements: Replacements, count: int, ready_for: float | None, now: float = 0.0):
    return [replacements.next(DIED, ready_for=ready_for, done=0, now=now) for _ in range(count + 1)]


def test_a_crash_loop_gets_pauses_and_ends():
    replacements = Replacements(1)
    unready = fruitless(replacements, UNREADY_AT_LEAST, None)
    assert unready == [0.0, 0.1, 0.2, None]
    idle = fruitless(replacements, IDLE_AT_LEAST, 5.0)
    assert idle[0] == 0.0 and idle[-1] is None
    assert all(0 < pause <= 5.0 for pause in idle[1:-1])
    assert fruitless(replacements, UNREADY_AT_LEAST, None, WINDOW) == unready, "an hour later"


def test_a_worker_that_was_of_use_is_replaced_at_once_however_often():
    replacements = Replacements(1)
    for _ in range(1000):
        assert replacements.next(DIED, ready_for=0.1, done=1, now=0.0) == 0.0
        assert replacements.next(DIED, ready_for=LONG, done=0, now=0.0) == 0.0
    fruitless(replacements, IDLE_AT_LEAST, 5.0)
    replacements.next(DIED, ready_for=0.1, done=1, now=0.0)
    assert fruitless(replacements, IDLE_AT_LEAST, 5.0)[0] == 0.0, "that they can is known again"


def test_a_whole_cluster_that_is_lost_is_replaced_at_once():
    assert fruitless(Replacements(100), 100, 5.0)[:100] == [0.0] * 100
    assert fruitless(Replacements(100), 100, None)[-2:] == [0.0, None]


def test_workers_that_become_ready_show_that_others_can():
    replacements = Replacements(1)
    for _ in range(100):
        assert replacements.next(DIED, ready_for=None, done=0, now=0.0) == 0.0
        replacements.became_ready()


# -- presence ------------------------------------------------------------------------


def test_a_worker_is_dead_when_missing_twice_and_without_a_connection():
    presence = Presence(10.0)
    assert not presence.must_ask(2, 2)
    assert presence.must_ask(2, 1)
    assert presence.look({"a": 1, "b": 0}, 0.0) == set()
    assert presence.must_ask(2, 2), "a suspicion is followed up, whatever the counts say"
    assert presence.look({"a": 1, "b": 0}, 0.1) == {"b"}
    assert presence.judge({"b"}, {"a"}, 0.1) == {"b"}
    assert presence.look({"a": 1}, 0.2) == set()
    assert not presence.must_ask(1, 1)


def test_a_worker_that_reconnects_at_once_is_forgiven():
    presence = Presence(10.0)
    presence.look({"a": 0}, 0.0)
    assert presence.look({"a": 1}, 0.1) == set()
    assert presence.look({"a": 0}, 0.2) == set()


def test_a_worker_that_has_another_connection_gets_time():
    presence = Presence(10.0)
    presence.look({"a": 0}, 0.0)
    assert presence.look({"a": 0}, 0.1) == {"a"}
    assert presence.judge({"a"}, {"a"}, 0.1) == set()
    assert presence.look({"a": 0}, 0.2) == set(), "not asked about again at once"
    assert presence.must_ask(1, 1)
    assert presence.look({"a": 0}, 0.7) == {"a"}
    assert presence.judge({"a"}, set(), 0.7) == {"a"}, "it died in the meantime"


def test_a_worker_that_never_subscribes_again_is_dead_in_the_end():
    presence = Presence(10.0)
    presence.look({"a": 0}, 0.0)
    assert presence.look({"a": 0}, 9.9) == {"a"}
    assert presence.judge({"a"}, {"a"}, 9.9) == set()
    assert presence.look({"a": 0}, 10.5) == {"a"}
    assert presence.judge({"a"}, {"a"}, 10.5) == {"a"}


def test_after_a_restart_of_the_broker_all_may_come_back():
    presence = Presence(10.0)
    presence.look({"a": 0}, 0.0)
    presence.broker_was_away(["a", "b"], 0.0)
    assert presence.must_ask(2, 0)
    for now in (0.1, 0.2, 5.0):
        assert presence.look({"a": 0, "b": 0}, now) == set()
    assert presence.look({"a": 1, "b": 0}, 6.0) == set()
    assert presence.look({"a": 0, "b": 0}, 6.1) == set(), "a is back, and missing for once"
    assert presence.look({"a": 0, "b": 0}, 6.2) == {"a"}, "it has used its second chance"
    assert presence.judge({"a"}, set(), 6.2) == {"a"}
    assert presence.look({"b": 0}, 10.0) == {"b"}, "out of time"


def hearing(silences: list[float], patience: float = 10.0) -> list[bool]:
    """Whether a worker is dead, by what the broker has measured at looks 1 s apart."""
    presence = Presence(patience)
    return [presence.hear({"a": s}, 1.0 * i) == {"a"} for i, s in enumerate(silences)]


def test_a_silent_worker_is_dead_within_its_time():
    assert hearing([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == [False] * 9 + [True, False]
    assert hearing([5, 6, 7, 8, 0, 1, 2]) == [False] * 7, "it has spoken"
    assert hearing([7, 8, 9, 10]) == [False, False, False, True], "it is doubted for a while"


def test_who_is_silent_is_listened_to_closely():
    presence = Presence(10.0)
    presence.hear({"a": 4.0}, 0.0)
    assert not presence.doubts
    presence.hear({"a": 5.0}, 1.0)
    assert presence.doubts
    presence.hear({"a": 0.0}, 2.0)
    assert not presence.doubts


def test_a_pause_of_the_whole_machine_condemns_nobody():
    """Every worker has been silent for an hour, as the broker has it; then they speak."""
    assert hearing([0, 3600, 0, 0]) == [False] * 4
    assert hearing([0, 3600, 3601, 3602, 0]) == [False] * 5
    assert hearing([0, 3600, 3601, 3602, 3603]) == [False, False, False, False, True]


def test_silence_before_a_restart_of_the_broker_does_not_count():
    presence = Presence(10.0)
    presence.hear({"a": 8.0}, 0.0)
    presence.broker_was_away(["a"], 1.0)
    assert presence.hear({"a": 10.0}, 6.0) == set()
    assert presence.hear({}, 8.0) == set(), "who has no subscription is missing, not silent"


def test_attention_counts_no_pause_of_ones_own():
    attention = Attention(longest=2.0)
    assert [attention.look(now) for now in (100.0, 101.0, 161.0, 161.5)] == [0.0, 1.0, 3.0, 3.5]


# -- the broker's memory -------------------------------------------------------------


def test_a_full_broker_refuses_by_degrees_and_recovers_with_a_margin():
    gauge = Gauge(1000)
    assert (gauge.read(530), gauge.level) == (False, Level.FINE)
    assert (gauge.read(550), gauge.level) == (True, Level.SENDERS_REFUSED)
    assert (gauge.read(500), gauge.level) == (False, Level.SENDERS_REFUSED)
    assert (gauge.read(810), gauge.level) == (True, Level.LARGE_REFUSED)
    assert (gauge.read(730), gauge.level) == (False, Level.LARGE_REFUSED)
    assert (gauge.read(710), gauge.level) == (True, Level.SENDERS_REFUSED)
    assert (gauge.read(960), gauge.level) == (True, Level.ALL_REFUSED)
    assert (gauge.read(700), gauge.level) == (True, Level.SENDERS_REFUSED)
    assert (gauge.read(960), gauge.level) == (True, Level.ALL_REFUSED)
    assert (gauge.read(100), gauge.level) == (True, Level.FINE)


# -- roster --------------------------------------------------------------------------


def joined(node: str, worker: str) -> Registration:
    return Registration(node=node, worker=worker, host="h", pid=1)


def test_a_worker_on_its_way_through_the_roster():
    roster, ref = Roster(), WorkerRef("w1", "local")
    roster.launched([ref])
    assert (roster.coming, roster.ready, roster.unanswered) == (1, (), ())
    assert roster.starting == (ref,)
    roster.joined(joined("n1@h", "w1"))
    assert (roster.coming, roster.unanswered, roster.starting) == (1, ("n1@h",), ())
    roster.answered(["n1@h", "stranger"], 3.0)
    roster.answered(["n1@h"], 4.0)
    assert (roster.coming, roster.ready, roster.unanswered) == (0, ("n1@h",), ())
    assert roster.find("w1") == roster.find("n1@h") == ref
    [seat] = roster.described({ref: DIED})
    assert (seat.ref, seat.ready, seat.ready_since) == (ref, True, 3.0)
    assert roster.described({ref: DIED}) == [], "it is news only once"
    assert (roster.coming, roster.ready, roster.unfinished) == (0, (), ())
    assert [seat.ref for seat in roster.failed] == [ref]
    assert roster.statuses == {ref: DIED}


def test_a_worker_that_the_guardian_lost_is_gone_once():
    roster, ref = Roster(), WorkerRef("w1")
    roster.launched([ref])
    roster.joined(joined("n1", "w1"))
    roster.answered(["n1"], 0.0)
    assert roster.lost("n1") is not None
    assert roster.lost("n1") is None
    assert roster.ready == ()
    assert roster.unfinished == (ref,), "its platform has yet to say that it ended"
    assert roster.described({ref: DIED}) == [], "and that is no news either"
    roster.answered(["n1"], 0.0)
    assert roster.ready == ()


def test_a_worker_that_is_lost_before_it_was_heard_of_is_gone():
    roster = Roster()
    roster.launched([WorkerRef("w-1"), WorkerRef("w-2")])
    seat = roster.lost("w-1-c0ffee@h")
    assert seat is not None and seat.ref == WorkerRef("w-1")
    assert roster.lost("w-1-c0ffee@h") is None
    assert roster.coming == 1
    roster.joined(joined("w-1-c0ffee@h", "w-1"))  # late, and nothing any more
    assert roster.unanswered == ()


def test_how_a_worker_ended_is_known_by_its_node_though_its_registration_came_too_late():
    roster, lost, described = Roster(), WorkerRef("w-1"), WorkerRef("w-2")
    roster.launched([lost, described])
    roster.lost("w-1-c0ffee@h")
    roster.described({lost: DIED, described: DIED})
    for ref in (lost, described):
        node = f"{ref.id}-c0ffee@h"
        roster.joined(joined(node, ref.id))
        seat = roster.of(node)
        assert seat is not None and seat.ref == ref and seat.status == DIED


def test_a_stranger_takes_no_seat():
    roster = Roster()
    roster.joined(joined("n1", "unheard-of"))
    roster.answered(["n1"], 0.0)
    assert roster.lost("n1") is None
    assert roster.ready == ()


def test_a_worker_that_left_when_told_has_not_failed():
    roster, ref = Roster(), WorkerRef("w1")
    roster.launched([ref])
    roster.described({ref: WorkerStatus(Phase.EXITED, final=True, exit_code=0)})
    assert roster.failed == ()


# -- data ----------------------------------------------------------------------------


def test_every_state_leads_to_the_end_and_nowhere_else():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.STOPPED] == frozenset()
    for state in (State.STARTING, State.READY, State.SCALING):
        assert {State.STOPPING, State.FAILED} <= TRANSITIONS[state]
    assert TRANSITIONS[State.FAILED] == {State.STOPPING}, "no failure without cleaning up"


def test_a_status_prints_as_a_table():
    status = ClusterStatus(
        id="c0ffee",
        state=State.READY,
        launcher="local",
        broker="127.0.0.1:7000",
        wanted=2,
        workers=(
            WorkerView("w1", "n1@h", True, WorkerStatus(Phase.RUNNING, reason="process 1")),
            WorkerView("worker2", "", False, WorkerStatus(Phase.PENDING)),
        ),
    )
    assert str(status).splitlines() == [
        "cluster c0ffee: ready, 1 of 2 workers ready (local, broker at 127.0.0.1:7000)",
        "  worker   state    node",
        "  w1       ready    n1@h  process 1",
        "  worker2  pending  -",
    ]
    html = status._repr_html_()
    assert "<caption>cluster c0ffee: ready" in html and "<td>n1@h</td>" in html


def test_no_repr_shows_the_secret():
    value = secret.new_secret()
    endpoint = Endpoint("127.0.0.1", 7000, value)
    order = messages.Order("redis-server", "127.0.0.1", value, "/run", 4, 2**30, 10.0, 3)
    assert value not in repr(endpoint) + repr(order)
    assert endpoint.address == "127.0.0.1:7000"


def test_messages_come_through_as_they_were():
    order = messages.Order("redis-server", "127.0.0.1", "00" * 32, "/run", 4, 2**30, 10.0, 3)
    assert jsonlines.decode(jsonlines.encode(order), messages.Order) == order
    for event in (
        messages.Started(7000, 12),
        messages.Failed("it ended", ("a", "b")),
        messages.Restarted(13, "it ended with code -9"),
        messages.Dead("n1@h", 3, "its connection is gone"),
        messages.Full(9, 10, results=False),
        messages.Room(),
        messages.Alive(),
    ):
        line = jsonlines.encode(event)
        assert line.count(b"\n") == 1
        assert jsonlines.decode(line, *messages.EVENTS) == event


# -- wire ----------------------------------------------------------------------------


def test_secrets_differ_and_so_does_what_is_derived():
    one, other = secret.new_secret(), secret.new_secret()
    assert one != other and len(bytes.fromhex(one)) == 32
    assert secret.password(one) == secret.password(one) != secret.password(other)
    assert one not in secret.password(one)
    assert secret.derive(one, "broker password") != secret.derive(one, "something else")
    assert secret.password(one) != secret.password(one, secret.WORKER)


def test_the_url_says_how_the_broker_is_to_be_spoken_to():
    here = Endpoint("127.0.0.1", 1, SECRET)
    assert secret.broker_url(here) == f"redis://:{secret.password(SECRET)}@127.0.0.1:1/0"
    there = Endpoint("10.1.2.3", 1, SECRET, secret.WORKER)
    word = secret.password(SECRET, secret.WORKER)
    assert secret.broker_url(there) == f"rediss://worker:{word}@10.1.2.3:1/0"


def test_exit_codes_are_the_table_and_explain_themselves():
    assert {code.name: int(code) for code in ExitCode} == {
        "LEFT": 0,
        "PLATFORM_NOTICE": 81,
        "ORPHANED": 82,
        "FENCED": 83,
        "IMPORT_FAILED": 84,
        "VERSION_MISMATCH": 85,
    }
    assert all(exitcodes.explain(code) for code in ExitCode)
    assert exitcodes.explain(-9) == "killed by SIGKILL"
    assert exitcodes.explain(-99) == "killed by signal 99"
    assert exitcodes.explain(3) == "exit code 3"


def test_node_names_never_repeat():
    names = {identity.new_node_name("local-1") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("local-1-") and name.count("@") == 1 for name in names)


def test_a_fenced_node_outside_a_worker_raises_what_nobody_catches_by_mistake():
    assert identity.current() is None
    with pytest.raises(identity.Fenced, match="n1@h"):
        identity.fenced("n1@h")
    assert not issubclass(identity.Fenced, Exception)


def test_the_managers_word_is_understood_and_no_other():
    assert registration.grace_in(b"over 2.5") == 2.5
    assert registration.grace_in("something else") is None
    one = joined("n1@h", "w1")
    assert registration.decode(registration.encode(one)) == one


def test_an_ended_broker_is_named_by_its_first_reason():
    import cluster

    ending.check("no such password")
    ending.end("p", cluster.BrokerLost("gone"))
    ending.end("p", cluster.ClusterError("stopped"))
    assert ending.has_ended("p")
    raised = []
    for _ in range(2):
        with pytest.raises(cluster.BrokerLost, match="gone") as caught:
            ending.check("p")
        raised.append(caught.value)
    assert raised[0] is not raised[1]
