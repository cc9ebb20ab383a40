"""The broker's memory is bounded: what is too large is refused, what was delivered is freed,
who sends too much is told, and nothing that was accepted is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bulkapp import (
    app,
    fail_at_length,
    hold,
    hold_and_die,
    length,
    mark_of,
    marks,
    retry_later,
    send_on,
    swell,
    swell_later,
)
from celery import chain, chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult

import cluster
from cluster.model import State
from cluster.wire import keys, transport

#: Seconds for a result.
SOON = 30

MB = 1_000_000
MIB = 2**20

#: The least that a broker may have, and what that makes of the limit of one message.
MEMORY = 32 * MIB

LARGE = "x" * 100_000


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_MEMORY", "32MiB")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process doesn't wait for room before it says that there is none."""
    monkeypatch.setattr(transport, "ROOM_WITHIN", 0.1)


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_MESSAGE_LIMIT", "100kB")


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def used(c: cluster.Cluster) -> int:
    return int(c._client.info("memory")["used_memory"])


def queued(c: cluster.Cluster) -> int:
    return int(c._client.llen("celery"))


def refused(c: cluster.Cluster) -> bytes:
    """The broker's word on what it refuses."""
    return c._client.get(keys.FULL) or b""


def stored(c: cluster.Cluster) -> int:
    """How many results the broker has."""
    return sum(1 for _ in c._client.scan_iter("celery-task-meta-*", 1000))


def one_right(result: AsyncResult, mark: int, size: int = MB) -> bool:
    return result.get(timeout=SOON) == [mark, "x" * size]


def busy(tmp_path: Path, eventually: Callable[..., None]) -> tuple[AsyncResult, Path]:
    """One worker is held up until the file exists."""
    go, log = tmp_path / "go", tmp_path / "log"
    result = hold.delay(str(go), str(log))
    eventually(lambda: lines(log), "the worker is busy")
    return result, go


# -- one that is too large --------------------------------------------------------------


def test_arguments_beyond_the_limit_are_refused_and_nothing_is_queued(small_messages):
    with cluster.start(0, app=app) as c:
        with pytest.raises(cluster.MessageTooLarge) as caught:
            length.delay("x" * 200_000)
        assert caught.value.limit == 100_000
        assert caught.value.size > 200_000
        assert "bulkapp.length" in str(caught.value)
        assert "CLUSTER_MESSAGE_LIMIT" in str(caught.value)
        big = length.s("x" * 200_000)
        for canvas in (
            chain(big, mark_of.s()),
            group([big, big]),
            chord([big], marks.s()),
            chord([length.s("")], length.si("x" * 200_000)),
        ):
            with pytest.raises(cluster.MessageTooLarge):
                canvas.apply_async()
        assert queued(c) == 0
        length.delay("x" * 50_000)
        assert queued(c) == 1


def test_a_chain_with_a_later_link_that_is_too_large_is_refused_as_a_whole(small_messages):
    """Its first message has all of them. A group's members are sent one by one."""
    with cluster.start(0, app=app) as c:
        with pytest.raises(cluster.MessageTooLarge):
            chain(length.s("x"), length.si("x" * 200_000)).apply_async()
        assert queued(c) == 0


def test_a_result_beyond_the_limit_fails_its_task_and_what_waits_for_it(small_messages):
    with cluster.start(1, app=app):
        with pytest.raises(cluster.MessageTooLarge, match="CLUSTER_MESSAGE_LIMIT") as caught:
            swell.delay(200_000).get(timeout=SOON)
        assert caught.value.limit == 100_000
        assert caught.value.size > 200_000
        result = chain(swell.s(200_000), mark_of.s())()
        with pytest.raises(cluster.MessageTooLarge):
            result.get(timeout=SOON)
        with pytest.raises((cluster.MessageTooLarge, ChordError), match="result is too large"):
            chord([swell.s(10, 1), swell.s(200_000, 2)])(marks.s()).get(timeout=SOON)
        with pytest.raises(cluster.MessageTooLarge):
            group([swell.s(10, 1), swell.s(200_000, 2)])().get(timeout=SOON)
        assert length.delay("").get(timeout=SOON) == [0, 0]


def test_a_chord_whose_body_gets_too_much_from_its_members_fails(small_messages):
    """Each is small enough, together they aren't."""
    with cluster.start(1, app=app):
        result = chord([swell.s(60_000, i) for i in range(3)])(marks.s())
        with pytest.raises((cluster.MessageTooLarge, ChordError), match="too large"):
            result.get(timeout=SOON)
        assert length.delay("").get(timeout=SOON) == [0, 0]


def test_a_chain_whose_next_link_gets_too_much_fails(small_messages):
    """The result itself is within the limit; with the rest of the message it isn't."""
    with cluster.start(1, app=app):
        result = chain(swell.s(80_000), marks.s(), length.si("x" * 40_000))()
        with pytest.raises(cluster.MessageTooLarge):
            result.get(timeout=SOON)
        assert length.delay("").get(timeout=SOON) == [0, 0]


def test_an_exception_beyond_the_limit_is_a_failure_that_is_stored(small_messages):
    with cluster.start(1, app=app):
        result = fail_at_length.delay(200_000)
        with pytest.raises((cluster.MessageTooLarge, ValueError), match="too large"):
            result.get(timeout=SOON)
        assert result.state == "FAILURE"
        with pytest.raises((ChordError, cluster.MessageTooLarge)):
            chord([fail_at_length.s(200_000)])(marks.s()).get(timeout=SOON)


def test_a_task_that_sends_too_much_fails_with_that(small_messages):
    with cluster.start(1, app=app):
        with pytest.raises(cluster.MessageTooLarge, match="bulkapp.length"):
            send_on.delay(200_000).get(timeout=SOON)
        inner = send_on.delay(50_000).get(timeout=SOON)
        assert AsyncResult(inner, app=app).get(timeout=SOON) == [0, 50_000]


# -- the queue is full ------------------------------------------------------------------


def send_until_full(send: Callable[[int], AsyncResult]) -> list[AsyncResult]:
    """What was accepted until a send was refused."""
    accepted: list[AsyncResult] = []

    def send_all() -> None:
        for i in range(1000):
            accepted.append(send(i))  # noqa: PERF401 (what comes before an exception counts)

    with pytest.raises(cluster.BrokerFull, match="CLUSTER_BROKER_MEMORY"):
        send_all()
    return accepted


def test_a_queue_that_fills_up_refuses_senders_and_loses_nothing(
    little_memory, impatient, tmp_path: Path, eventually, caplog
):
    with cluster.start(1, app=app) as c:
        held, go = busy(tmp_path, eventually)
        accepted = send_until_full(lambda i: length.delay(LARGE, i))
        assert queued(c) == len(accepted) > 50
        assert used(c) < 0.95 * MEMORY, "before the server itself refuses"
        eventually(lambda: "The broker is full" in caplog.text, "the manager says so", timeout=5)
        assert "CLUSTER_BROKER_MEMORY" in caplog.text
        go.touch()
        assert held.get(timeout=SOON) == "held"
        assert [r.get(timeout=SOON) for r in accepted] == [
            [i, len(LARGE)] for i in range(len(accepted))
        ]
        eventually(lambda: "There is room in the broker again" in caplog.text, "and that")
        assert length.delay(LARGE, 7).get(timeout=SOON) == [7, len(LARGE)]
        assert c.state is State.READY


def test_several_threads_meet_a_full_queue(little_memory, impatient, tmp_path: Path, eventually):
    with cluster.start(1, app=app) as c:
        held, go = busy(tmp_path, eventually)
        accepted: dict[int, list[AsyncResult]] = {n: [] for n in range(4)}
        refused = []

        def send(n: int) -> None:
            try:
                for i in range(1000):
                    accepted[n].append(length.delay(LARGE, i))
            except cluster.BrokerFull as error:
                refused.append(error)

        threads = [threading.Thread(target=send, args=(n,)) for n in accepted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert len(refused) == 4
        assert queued(c) == sum(map(len, accepted.values()))
        go.touch()
        held.get(timeout=SOON)
        for results in accepted.values():
            assert [r.get(timeout=SOON)[0] for r in results] == list(range(len(results)))


def test_a_batch_meets_a_full_queue(little_memory, impatient, tmp_path: Path, eventually, caplog):
    """What a batch has sent runs; once the broker is full, a batch is refused like any other."""
    with cluster.start(1, app=app) as c:
        held, go = busy(tmp_path, eventually)
        sent: list[AsyncResult] = []

        def send_batches() -> None:
            for start in range(0, 1000, 10):
                with app.producer_pool.acquire(block=True) as producer, producer.batch():
                    batch = [
                        length.apply_async((LARGE, i), producer=producer)
                        for i in range(start, start + 10)
                    ]
                sent.extend(batch)

        with pytest.raises(cluster.BrokerFull):
            send_batches()
        assert queued(c) >= len(sent) > 50
        go.touch()
        held.get(timeout=SOON)
        assert [r.get(timeout=SOON)[0] for r in sent] == list(range(len(sent)))
        assert length.delay(LARGE, 7).get(timeout=SOON) == [7, len(LARGE)]


def test_large_messages_are_refused_before_others_find_no_room(
    little_memory, impatient, tmp_path: Path, eventually
):
    """A few of them fill the broker before anybody has looked at it."""
    with cluster.start(1, app=app) as c:
        held, go = busy(tmp_path, eventually)
        accepted = send_until_full(lambda i: length.delay("x" * 5 * MB, i))
        assert used(c) < 0.95 * MEMORY
        go.touch()
        held.get(timeout=SOON)
        assert [r.get(timeout=SOON)[0] for r in accepted] == list(range(len(accepted)))
        eventually(lambda: not refused(c), "there is room again")
        assert length.delay(LARGE, 7).get(timeout=SOON) == [7, len(LARGE)]


@contextlib.contextmanager
def refusing_all(c: cluster.Cluster, eventually: Callable[..., None]) -> Iterator[None]:
    """The server has no room for anything, until something has been refused for a while."""
    before = c._client.config_get("maxmemory")["maxmemory"]
    c._client.config_set("maxmemory", 1)
    try:
        errors = c._client.info("stats")["total_error_replies"]
        yield
        eventually(lambda: c._client.info("stats")["total_error_replies"] > errors, "it refuses")
    finally:
        c._client.config_set("maxmemory", before)


def test_a_task_that_is_given_up_while_the_broker_is_full_fails_afterwards(
    tmp_path: Path, monkeypatch, eventually
):
    """Its failure can't be stored as long as there is no room."""
    monkeypatch.setenv("CLUSTER_MAX_DELIVERIES", "1")
    log, go = tmp_path / "log", tmp_path / "go"
    with cluster.start(1, app=app) as c:
        result = hold_and_die.delay(str(go), str(log))
        eventually(lambda: lines(log), "it runs")
        with refusing_all(c, eventually):
            go.touch()
        with pytest.raises(cluster.WorkerLost, match="was given up"):
            result.get(timeout=SOON)


@pytest.mark.parametrize("kind", ["the next link", "a chord's body", "another try"])
def test_what_a_worker_sends_on_while_the_broker_is_full_is_sent_afterwards(
    kind: str, tmp_path: Path, eventually
):
    """It was accepted with the task."""
    go = tmp_path / "go"
    with cluster.start(1, app=app) as c:
        if kind == "the next link":
            result, value = chain(swell_later.s(str(go), 10, 1), mark_of.s())(), 1
        elif kind == "a chord's body":
            result, value = chord([swell_later.s(str(go), 10, 2)])(marks.s()), [2]
        else:
            result, value = retry_later.delay(str(go)), 1
        eventually(lambda: queued(c) == 0, "it runs")
        with refusing_all(c, eventually):
            go.touch()
        assert result.get(timeout=SOON / 2) == value


def test_who_sends_for_the_first_time_while_the_broker_is_full_is_told(impatient, eventually):
    """By the error of everybody else, over a connection that is new."""
    errors: list[BaseException] = []

    def send() -> None:
        try:
            length.delay("x")
        except cluster.BrokerFull as error:
            errors.append(error)

    with cluster.start(0, app=app) as c, refusing_all(c, eventually):
        send()
        thread = threading.Thread(target=send)
        thread.start()
        thread.join(SOON)
        assert len(errors) == 2


# -- results ----------------------------------------------------------------------------


def test_results_that_were_delivered_one_after_the_other_are_freed(little_memory):
    with cluster.start(2, app=app) as c:
        first = swell.delay(MB, 0)
        assert one_right(first, 0)
        for i in range(1, 100):
            assert one_right(swell.delay(MB, i), i)
            assert used(c) < MEMORY
        assert first.get(timeout=SOON)[0] == 0, "who has it has it"
        with pytest.raises(cluster.ClusterError, match="freed.*CLUSTER_BROKER_MEMORY"):
            AsyncResult(first.id, app=app).get(timeout=SOON)
        recent = swell.delay(MB, 100)
        assert one_right(recent, 100)
        assert AsyncResult(recent.id, app=app).get(timeout=SOON)[0] == 100


def all_at_once(tmp_path: Path, eventually: Callable[..., None], count: int) -> AsyncResult:
    """A group that is sent while the one worker is busy: results that come while others are still
    sent would fill the broker, since who sends reads none."""
    tmp_path.mkdir(exist_ok=True)
    held, go = busy(tmp_path, eventually)
    sent = group([swell.s(MB, i) for i in range(count)])()
    go.touch()
    held.get(timeout=SOON)
    return sent


def test_results_that_were_delivered_to_a_group_are_freed(
    little_memory, tmp_path: Path, eventually
):
    with cluster.start(1, app=app) as c:
        for turn in range(5):
            values = all_at_once(tmp_path / str(turn), eventually, 20).get(timeout=SOON)
            assert [value[0] for value in values] == list(range(20))
            assert used(c) < MEMORY


def test_the_last_results_that_were_delivered_are_freed(little_memory, tmp_path: Path, eventually):
    """Also if nobody asks for anything afterwards."""
    with cluster.start(1, app=app) as c:
        values = all_at_once(tmp_path, eventually, 26).get(timeout=SOON)
        assert [value[0] for value in values] == list(range(26))
        eventually(lambda: used(c) < MEMORY / 2 + 2 * MB, "they are freed", timeout=5)
        assert length.delay(LARGE, 7).get(timeout=SOON) == [7, len(LARGE)]


def test_results_that_were_polled_for_are_freed(little_memory, eventually):
    """``ready()`` brings the result along, and ``get()`` then asks for nothing. The unread
    subscription keeps none either, in a broker that was restarted as in a new one."""
    with cluster.start(2, app=app) as c:
        for i in range(80):
            if i == 20:
                c._broker._server_process.kill()
            result = swell.delay(MB, i)
            eventually(result.ready, "it is done")
            assert one_right(result, i)


def test_results_that_chains_and_chords_passed_on_are_freed(little_memory):
    """The manager only ever gets the last one."""
    with cluster.start(2, app=app):
        for i in range(26):
            assert chain(swell.s(MB, i), mark_of.s())().get(timeout=SOON) == i
        for i in range(5):
            header = [swell.s(MB, i) for _ in range(5)]
            assert chord(header)(marks.s()).get(timeout=SOON) == [i] * 5


def test_without_pressure_a_result_can_be_asked_for_again():
    with cluster.start(1, app=app):
        results = [swell.delay(MB, i) for i in range(20)]
        for _ in range(2):
            for i, result in enumerate(results):
                assert one_right(AsyncResult(result.id, app=app), i)


def test_small_results_in_great_numbers_are_freed(little_memory, eventually):
    """What is remembered of each must not fill the broker either."""
    with cluster.start(1, app=app) as c:
        length.delay("", 1).get(timeout=SOON)
        # As many as there would be after some minutes' work, all of them delivered.
        store = """
        for i = 1, 10000 do
          local key = 'celery-task-meta-' .. redis.sha1hex(ARGV[1] .. i)
          redis.call('SETEX', key, 86400, ARGV[2])
          redis.call('LPUSH', KEYS[1], key)
        end
        """
        for i in range(20):
            eventually(lambda: used(c) < 0.6 * MEMORY, f"there is room for lot {i}", timeout=10)
            c._client.eval(store, 1, keys.DELIVERED, i, "x" * 200)
        assert length.delay(LARGE, 7).get(timeout=SOON) == [7, len(LARGE)]


def test_results_that_nobody_fetches_yet_wait_with_their_workers(
    little_memory, tmp_path: Path, eventually, caplog
):
    with cluster.start(2, app=app) as c:
        before = c.workers
        go = tmp_path / "go"
        results = [swell_later.delay(str(go), MB, i) for i in range(40)]
        go.touch()
        eventually(lambda: "Results are refused as well" in caplog.text, "the broker is full")
        eventually(lambda: "out of reach" in str(c.logs()), "a worker can't store its result")
        assert c.workers == before
        assert all(one_right(result, i) for i, result in enumerate(results))
        assert c.workers == before
        assert c.state is State.READY


@pytest.mark.parametrize("victims", [1, 2])
def test_a_worker_killed_in_a_full_broker_is_replaced_and_nothing_is_lost(
    little_memory, tmp_path: Path, victims: int, eventually, caplog
):
    """The replacement joins a broker that refuses writes, and neither it nor the guardian gives
    up."""
    with cluster.start(2, app=app) as c:
        before = set(c.workers)
        go = tmp_path / "go"
        results = [swell_later.delay(str(go), MB, i) for i in range(40)]
        go.touch()
        eventually(lambda: "Results are refused as well" in caplog.text, "the broker is full")
        workers = list(c.launcher._workers.values())
        for worker in workers[:victims]:
            os.kill(worker.process.pid, signal.SIGKILL)
        eventually(lambda: len(before - set(c.workers)) == victims, "it is missed")
        c.wait_for_workers(2, timeout=15)
        assert all(one_right(result, i) for i, result in enumerate(results))
        assert c.state is State.READY
        assert len(c.status().workers) == 2 + victims, "no crash loop"


def test_a_slow_first_result_does_not_wait_for_ever_behind_large_ones(
    little_memory, tmp_path: Path, caplog
):
    """The manager waits for the first and takes in the others meanwhile; they fill the broker."""
    go = tmp_path / "go"
    with cluster.start(2, app=app):
        results = [swell_later.delay(str(go), MB, 0)]
        others = tmp_path / "others"
        results += [swell_later.delay(str(others), MB, i) for i in range(1, 40)]
        others.touch()

        def let_go_when_full() -> None:
            deadline = time.monotonic() + SOON / 2
            while "Results are refused as well" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.02)
            go.touch()

        thread = threading.Thread(target=let_go_when_full)
        thread.start()
        assert all(one_right(result, i) for i, result in enumerate(results))
        thread.join(SOON)


def test_a_chord_whose_results_fill_the_broker_goes_through(little_memory):
    """Its members' results are there twice over, and the body's message has them all."""
    with cluster.start(2, app=app):
        result = chord([swell.s(MB, i) for i in range(5)])(marks.s())
        assert result.get(timeout=SOON) == list(range(5))


def test_a_chord_that_is_too_much_for_the_broker_ends(little_memory, tmp_path: Path):
    """More than it can ever hold: an error, and no hanging; others can go on."""
    with cluster.start(2, app=app):
        go = tmp_path / "go"
        result = chord([swell_later.s(str(go), MB, i) for i in range(30)])(marks.s())
        go.touch()
        with pytest.raises((cluster.ClusterError, ChordError)):
            result.get(timeout=SOON)


def test_a_manager_that_does_not_read_for_a_while_gets_everything(monkeypatch, eventually):
    """The server cuts a subscriber's connection that has an eighth of its memory waiting for it."""
    monkeypatch.setenv("CLUSTER_BROKER_MEMORY", "256MiB")
    with cluster.start(2, app=app) as c:
        results = [swell.delay(MB, i) for i in range(60)]
        eventually(lambda: stored(c) == 60, "all are stored")
        assert [r.get(timeout=SOON)[0] for r in results] == list(range(60))
        assert swell.delay(MB, 60).get(timeout=SOON)[0] == 60
