"""What Celery's tasks can do, they can do here. One cluster for all of this module."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import canvasapp
import pytest
from canvasapp import (
    add,
    app,
    counter,
    die,
    fail,
    fan_out,
    flaky,
    hard_limited,
    hold,
    ignored,
    limited,
    log_line,
    rejected,
    replaced,
    report,
    retry_until,
    silent,
    soft_limited,
    total,
    write_error,
)
from celery import chain, chord, group
from celery.exceptions import (
    ChordError,
    MaxRetriesExceededError,
    NotRegistered,
    Reject,
    TaskRevokedError,
    TimeLimitExceeded,
)
from celery.result import AsyncResult, GroupResult
from tools import leaving_nothing, strip_environment

import cluster

#: Seconds for a result. None of these tasks takes one.
SOON = 20


@pytest.fixture(autouse=True)
def traces() -> None:
    """Not around each test: the cluster is the module's, and so is the check."""


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """Two workers with one process each, and nothing left of them after the last test."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        strip_environment(monkeypatch)
        with (
            leaving_nothing(tmp_path_factory.mktemp("tmp"), monkeypatch),
            cluster.start(2, app=app) as c,
        ):
            yield c


@pytest.fixture(autouse=True)
def idle(running: cluster.Cluster) -> Iterator[None]:
    """A test leaves two workers behind that run tasks."""
    yield
    running.wait_for_workers(2, timeout=SOON)
    assert add.delay(1, 1).get(timeout=SOON) == 2


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


# -- canvas ---------------------------------------------------------------------------


def test_a_group_gives_its_results_in_order():
    assert group(add.s(i, i) for i in range(10))().get(timeout=SOON) == [2 * i for i in range(10)]


def test_a_chord_gives_its_members_results_to_its_body():
    assert chord(add.s(i, 1) for i in range(5))(total.s()).get(timeout=SOON) == 15


def test_a_chord_with_a_failing_member_fails_with_what_the_member_raised():
    """And soon, rather than with the end of the wait. A get() that propagates raises the
    member's own error where it sees that first."""
    result = chord([add.s(1, 1), fail.s(), add.s(2, 2)])(total.s())
    error = result.get(timeout=SOON, propagate=False)
    assert isinstance(error, ChordError)
    assert "on purpose" in str(error)
    with pytest.raises((ChordError, ValueError), match="on purpose"):
        result.get(timeout=SOON)


def test_a_chord_with_a_member_that_is_given_up_fails(log: Path):
    """A member that kills its process three times ends the chord as one that raises does."""
    result = chord([add.s(1, 1), die.s(str(log))])(total.s())
    error = result.get(timeout=SOON, propagate=False)
    assert isinstance(error, ChordError)
    assert "given up" in str(error)
    assert len(lines(log)) == 3


def test_an_error_callback_hears_of_a_task_that_is_given_up(tmp_path: Path, log: Path, eventually):
    heard = tmp_path / "heard"
    result = die.apply_async((str(log),), link_error=write_error.s(str(heard)))
    with pytest.raises(cluster.WorkerLost):
        result.get(timeout=SOON)
    eventually(lambda: lines(heard), "the callback has run")
    assert lines(heard)[0].startswith("WorkerLost: Task canvasapp.die")


def test_a_chain_hands_on_results():
    assert chain(add.s(1, 2), add.s(3), add.s(4))().get(timeout=SOON) == 10


def test_nested_chains_groups_and_chords():
    """A group inside a chain becomes a chord; a chain inside a group stays one."""
    inner = group(chain(add.s(1), add.s(10)), add.s(2))
    assert chain(add.s(1, 1), inner, total.s())().get(timeout=SOON) == 13 + 4
    outer = chord([group(add.s(1, 1), add.s(2, 2)) | total.s(), add.s(4, 4)], total.s())
    assert outer().get(timeout=SOON) == 14


def test_a_chain_with_a_failing_link_stops_there(log: Path):
    result = chain(add.s(1, 1), fail.s(), log_line.si(str(log), "after"))()
    with pytest.raises(ValueError, match="on purpose"):
        result.parent.get(timeout=SOON)
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=SOON)
    assert lines(log) == []


def test_chunks_map_and_starmap():
    pairs = [(i, i) for i in range(10)]
    assert add.chunks(pairs, 5)().get(timeout=SOON) == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18]]
    assert add.starmap(pairs).delay().get(timeout=SOON) == [2 * i for i in range(10)]
    assert total.map([[1, 2], [3]]).delay().get(timeout=SOON) == [3, 3]


def test_link_and_link_error(log: Path, tmp_path: Path, eventually):
    """Callbacks run elsewhere, with the result or the error."""
    add.apply_async((1, 2), link=log_line.si(str(log), "linked"))
    eventually(lambda: lines(log) == ["linked"], "the callback has run")
    errors = tmp_path / "errors"
    fail.apply_async(link_error=write_error.s(str(errors)))
    eventually(lambda: lines(errors) == ["ValueError: on purpose"], "the error callback has run")


def test_a_task_replaces_itself_and_sends_others():
    assert replaced.delay(4).get(timeout=SOON) == 5
    assert AsyncResult(fan_out.delay(3).get(timeout=SOON), app=app).get(timeout=SOON) == 6


def test_a_class_based_task():
    assert counter.delay(1).get(timeout=SOON) == 2


# -- retries, delays, limits ----------------------------------------------------------


def test_retry_runs_again_until_it_succeeds():
    assert retry_until.delay(2).get(timeout=SOON) == 2


def test_retries_end_at_their_maximum():
    with pytest.raises(MaxRetriesExceededError):
        retry_until.delay(4).get(timeout=SOON)


def test_a_base_class_with_autoretry():
    """What was raised last is the result once the retries are used up."""
    assert flaky.delay(2).get(timeout=SOON) == 2
    with pytest.raises(ConnectionError, match="not yet"):
        flaky.delay(3).get(timeout=SOON)


def test_a_countdown_and_an_eta_let_others_go_first(log: Path):
    later = [
        log_line.apply_async((str(log), "countdown"), countdown=0.5),
        log_line.apply_async((str(log), "eta"), eta=datetime.now(UTC) + timedelta(seconds=1)),
    ]
    log_line.delay(str(log), "at once").get(timeout=SOON)
    for result in later:
        result.get(timeout=SOON)
    assert lines(log) == ["at once", "countdown", "eta"]


def test_many_etas_hold_up_no_worker(eventually):
    """A worker that waits for more ETAs than it has processes still runs what is due."""
    later = [add.apply_async((i, 0), countdown=600) for i in range(20)]
    assert add.delay(2, 3).get(timeout=SOON) == 5
    app.control.revoke([result.id for result in later])
    eventually(lambda: {each.state for each in later} == {"REVOKED"}, "all are revoked")


def test_a_task_that_has_expired_ends_revoked():
    result = add.apply_async((1, 1), expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SOON)
    assert result.state == "REVOKED"


def test_a_soft_time_limit_lets_the_task_clean_up():
    assert soft_limited.delay().get(timeout=SOON) == "cleaned up"


def test_a_hard_time_limit_ends_the_task_once(log: Path):
    """The child is killed; that is the task's result and no worker's death."""
    with pytest.raises(TimeLimitExceeded):
        hard_limited.delay(str(log)).get(timeout=SOON)
    for _ in range(10):  # a second run would be before these
        add.delay(1, 1).get(timeout=SOON)
    assert lines(log) == ["start"]


def test_rate_limits():
    """In the decorator and from outside: the tasks run, and every worker has heard."""
    results = [limited.delay(i) for i in range(10)]
    assert [result.get(timeout=SOON) for result in results] == list(range(10))
    replies = app.control.rate_limit(limited.name, "200/s", reply=True, limit=2)
    said = [next(iter(reply.values())) for reply in replies]
    assert said == [{"ok": "new rate limit set successfully"}] * 2
    assert limited.delay(11).get(timeout=SOON) == 11


# -- revoke ---------------------------------------------------------------------------


def test_a_queued_task_that_is_revoked_never_runs(log: Path, go: Path, tmp_path, eventually):
    held = [hold.delay(str(log), str(go)) for _ in range(2)]
    eventually(lambda: len(lines(log)) == 2, "both workers are busy")
    never = tmp_path / "never"
    result = log_line.delay(str(never), "ran")
    assert len(app.control.revoke(result.id, reply=True, limit=2)) == 2
    go.touch()
    assert [each.get(timeout=SOON) for each in held] == ["held", "held"]
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SOON)
    assert not never.exists()


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_running_task_that_is_terminated_ends_revoked_and_once(
    signal: str, log: Path, go: Path, eventually
):
    """Its process is ended; the task isn't run again, and its worker goes on."""
    result = hold.delay(str(log), str(go))
    eventually(lambda: lines(log), "it runs")
    nodes = app.control.inspect(limit=2, timeout=5).ping().keys()
    result.revoke(terminate=True, signal=signal)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SOON)
    assert result.state == "REVOKED"
    for _ in range(10):
        add.delay(1, 1).get(timeout=SOON)
    assert len(lines(log)) == 1
    assert app.control.inspect(limit=2, timeout=5).ping().keys() == nodes


def test_revoke_by_stamped_header(log: Path, go: Path, tmp_path: Path, eventually):
    held = [hold.delay(str(log), str(go)) for _ in range(2)]
    eventually(lambda: len(lines(log)) == 2, "both workers are busy")
    never = tmp_path / "never"
    signature = log_line.si(str(never), "ran")
    signature.stamp(batch="42")
    result = signature.delay()
    app.control.revoke_by_stamped_headers({"batch": "42"}, reply=True, limit=2)
    go.touch()
    for each in held:
        each.get(timeout=SOON)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SOON)
    assert not never.exists()


# -- results --------------------------------------------------------------------------


def test_update_state_is_seen_while_the_task_runs(go: Path, eventually):
    result = report.delay(str(go))
    eventually(lambda: result.state == "PROGRESS", "it reports")
    assert result.info == {"done": 1, "of": 2}
    go.touch()
    assert result.get(timeout=SOON) == "done"


def test_a_result_that_is_ignored(log: Path, eventually):
    result = silent.delay(str(log))
    eventually(log.exists, "it ran")
    assert result.get(timeout=SOON) is None
    assert result.state == "PENDING"


def test_ignore_keeps_the_state_that_the_task_set(log: Path, eventually):
    result = ignored.delay(str(log))
    eventually(log.exists, "it ran")
    add.delay(1, 1).get(timeout=SOON)
    assert (result.state, result.info) == ("MINE", "kept")


def test_a_task_that_rejects_its_message_runs_once(log: Path, eventually):
    result = rejected.delay(str(log))
    eventually(log.exists, "it ran")
    for _ in range(10):
        add.delay(1, 1).get(timeout=SOON)
    assert lines(log) == ["ran"]
    assert isinstance(result.get(timeout=SOON, propagate=False), Reject)


def test_a_task_that_no_worker_knows_fails_with_its_name():
    with pytest.raises(NotRegistered, match="nobody.knows"):
        app.send_task("nobody.knows").get(timeout=SOON)


def test_a_task_by_name_with_an_id_of_its_own():
    task_id = str(uuid.uuid4())
    assert app.send_task(add.name, (1, 2), task_id=task_id).get(timeout=SOON) == 3
    again = AsyncResult(task_id, app=app)
    assert (again.state, again.name, again.args) == ("SUCCESS", add.name, [1, 2])


def test_a_result_in_another_thread():
    """By its id, and while the first thread waits for others."""
    results = [add.delay(i, 1) for i in range(20)]
    seen: list[int] = []

    def look() -> None:
        seen.extend(AsyncResult(r.id, app=app).get(timeout=SOON) for r in reversed(results))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    mine = [result.get(timeout=SOON) for result in results]
    for thread in threads:
        thread.join(SOON)
    assert sorted(seen) == sorted(3 * mine)


def test_a_group_is_saved_and_restored():
    saved = group(add.s(i, 0) for i in range(3))()
    saved.save()
    restored = GroupResult.restore(saved.id, app=app)
    assert restored.get(timeout=SOON) == [0, 1, 2]
    restored.delete()
    assert GroupResult.restore(saved.id, app=app) is None


def test_a_result_that_is_forgotten_is_gone():
    result = add.delay(1, 2)
    assert result.get(timeout=SOON) == 3
    result.forget()
    assert AsyncResult(result.id, app=app).state == "PENDING"


def test_a_group_tells_how_far_it_is():
    result = group(add.s(1, 1), add.s(2, 2), fail.s())()
    assert [each.get(timeout=SOON, propagate=False) for each in result.results[:2]] == [2, 4]
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=SOON)
    assert (result.completed_count(), result.failed()) == (2, True)


# -- remote control and events --------------------------------------------------------


def test_inspect_answers_for_every_worker(
    running: cluster.Cluster, log: Path, go: Path, eventually: Callable[..., None]
):
    result = hold.delay(str(log), str(go))
    eventually(log.exists, "it runs")
    inspect = app.control.inspect(limit=2, timeout=5)
    assert set(inspect.stats()) == set(running.workers)
    assert all(add.name in names for names in inspect.registered().values())
    active = [request["id"] for requests in inspect.active().values() for request in requests]
    assert active == [result.id]
    assert set(inspect.reserved()) == set(running.workers)
    assert {q["name"] for queues in inspect.active_queues().values() for q in queues} == {"celery"}
    go.touch()
    assert result.get(timeout=SOON) == "held"


def test_broadcast_reaches_every_worker(running: cluster.Cluster):
    replies = app.control.broadcast("ping", reply=True, limit=2, timeout=5)
    assert {name for reply in replies for name in reply} == set(running.workers)


def test_workers_can_be_told_to_take_from_another_queue():
    """What a task is sent to without being in the settings, after add_consumer."""
    app.control.add_consumer("aside", reply=True, limit=2, timeout=5)
    assert add.apply_async((1, 2), queue="aside").get(timeout=SOON) == 3
    app.control.cancel_consumer("aside", reply=True, limit=2, timeout=5)


def test_events_tell_of_a_task(eventually):
    """As Flower and `celery events` would see it."""
    seen: set[str] = set()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": lambda e: seen.add(e["type"])})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()

        def told() -> bool:
            """What is sent before the receiver listens is lost to it."""
            add.delay(20, 1).get(timeout=SOON)
            return seen >= {"task-sent", "task-received", "task-started", "task-succeeded"}

        try:
            eventually(told, "the events have come")
        finally:
            receiver.should_stop = True
            thread.join(SOON)
    assert not thread.is_alive()


def test_purge_empties_the_queue(go: Path, log: Path, eventually):
    held = [hold.delay(str(log), str(go)) for _ in range(2)]
    eventually(lambda: len(lines(log)) == 2, "both workers are busy")
    for _ in range(5):
        canvasapp.add.delay(1, 1)
    assert app.control.purge() == 5
    go.touch()
    assert [each.get(timeout=SOON) for each in held] == ["held", "held"]
