"""The hand-out scripts against a model, on a real server: no message is ever lost or doubled."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError
from tools import wait_until

from cluster.broker.guardian import free_port
from cluster.broker.server import configuration, find_server, write_configuration
from cluster.model import Endpoint
from cluster.wire import keys
from cluster.wire.ledger import Ledger, is_refusal
from cluster.wire.scripts import Scripts, is_fenced, is_taken
from cluster.wire.secret import broker_url, new_secret, password

QUEUES = ("celery", "other")
MOST = 3

SECRET = new_secret()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A server without a guardian."""
    directory = tmp_path_factory.mktemp("server")
    port = free_port("127.0.0.1")
    config = configuration(
        endpoint=Endpoint("127.0.0.1", port, SECRET),
        directory=str(directory),
        workers=1,
        memory=2**30,
    )
    program = find_server(os.environ.get("CLUSTER_BROKER_SERVER", "")).path
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=log, stderr=log)
    assert server.stdin is not None
    with server.stdin as stdin:
        stdin.write(write_configuration(config).encode())
    made = redis.Redis(host="127.0.0.1", port=port, password=password(SECRET))

    def answers() -> bool:
        try:
            return bool(made.ping())
        except redis.exceptions.ConnectionError:
            return False

    wait_until(answers, "the server answers")
    yield made
    made.close()
    server.kill()
    server.wait()


class HandOut(RuleBasedStateMachine):
    """Nodes take, settle and die; the dead try to go on, and new ones come."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.scripts = Scripts(self.client, MOST)
        self.queues: dict[str, list[bytes]] = {queue: [] for queue in QUEUES}  # first: next
        self.holds: dict[str, dict[int, tuple[str, bytes]]] = {}  # of those that live
        self.dead: dict[str, list[int]] = {}  # and what they once held
        self.returns: dict[bytes, list[list[str]]] = {}  # who died of it, and how
        self.given_up: list[tuple[bytes, list[list[str]]]] = []
        self.started: set[int] = set()
        self.published = 0

    # -- what happens ---------------------------------------------------------

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.boot()

    @precondition(lambda self: len(self.holds) < 3)
    @rule()
    def boot(self) -> None:
        node = f"node{len(self.holds) + len(self.dead)}@h"
        self.scripts.register(node, f"registration of {node}")
        with pytest.raises(ResponseError) as caught:
            self.scripts.register(node, "a second one")
        assert is_taken(caught.value)
        self.holds[node] = {}

    @rule(data=st.data(), queue=st.sampled_from(QUEUES), count=st.integers(1, 5))
    def publish(self, data: st.DataObject, queue: str, count: int) -> None:
        for _ in range(count):
            self.published += 1
            eta = '"2030-01-01"' if data.draw(st.booleans()) else "null"
            raw = f'{{"headers": {{"eta": {eta}}}, "n": {self.published}}}'.encode()
            self.client.lpush(queue, raw)
            self.client.lpush(keys.wake(queue), "1")
            self.queues[queue].append(raw)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), order=st.permutations(QUEUES), count=st.integers(1, 4))
    def take(self, data: st.DataObject, order: list[str], count: int) -> None:
        node = self.some_node(data)
        for _ in range(count):
            reply = self.scripts.take(node, order, order)
            expected = next((queue for queue in order if self.queues[queue]), None)
            if expected is None:
                assert reply == len(self.holds[node])
                assert not any(self.client.exists(keys.wake(queue)) for queue in order)
                return
            assert isinstance(reply, list)
            source, number, returned, raw = reply
            assert source.decode() == expected
            assert raw == self.queues[expected].pop(0)
            assert returned == len(self.returns.get(raw, ()))
            self.holds[node][number] = (expected, raw)

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A task runs; only one with an ETA needs to say so."""
        node, number = self.some_message(data)
        if waits(self.holds[node][number][1]):
            self.scripts.start(node, number)
            self.started.add(number)

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        node, number = self.some_message(data)
        self.scripts.ack(node, number)
        self.scripts.ack(node, number)  # repeated after a lost connection: harmless
        _, raw = self.holds[node].pop(number)
        self.returns.pop(raw, None)

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data(), died=st.booleans())
    def reject(self, data: st.DataObject, died: bool) -> None:
        node, number = self.some_message(data)
        how = f"died on {node}" if died else ""
        self.scripts.reject(node, number, died=how)
        self.scripts.reject(node, number, died=how)
        self.give_back(self.holds[node].pop(number), front=False, death=[node, how])

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def reconcile(self, data: st.DataObject) -> None:
        node = self.some_node(data)
        assert self.scripts.held(node) == set(self.holds[node])
        lost = {number for number in self.holds[node] if data.draw(st.booleans())}
        assert self.scripts.reconcile(node, lost) == len(lost)
        assert self.scripts.reconcile(node, lost) == 0
        # The oldest is next in its queue, as if it had never been handed out.
        for number in sorted(lost, reverse=True):
            self.give_back(self.holds[node].pop(number), front=True, death=[node, ""])

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), died=st.booleans())
    def release(self, data: st.DataObject, died: bool) -> None:
        node = self.some_node(data)
        held = self.holds.pop(node)
        assert self.scripts.release(node, "it is gone", died=died) == len(held)
        assert self.scripts.release(node, "once more", died=died) == -1
        for number in sorted(held, reverse=True):
            ran = number in self.started or not waits(held[number][1])
            death = [node, "it is gone" if died and ran else ""]
            self.give_back(held[number], front=True, death=death)
        self.dead[node] = list(held)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """A node that was declared dead changes nothing, whatever it tries."""
        node = data.draw(st.sampled_from(sorted(self.dead)))
        number = data.draw(st.sampled_from(self.dead[node] or [1]))
        for step in (
            lambda: self.scripts.take(node, QUEUES, QUEUES),
            lambda: self.scripts.ack(node, number),
            lambda: self.scripts.reject(node, number, died="killed"),
            lambda: self.scripts.reconcile(node, [number]),
            lambda: self.scripts.start(node, number),
            lambda: self.scripts.register(node, "again"),
        ):
            with pytest.raises(ResponseError) as caught:
                step()
            assert is_fenced(caught.value)

    # -- the model ------------------------------------------------------------

    def some_node(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.holds)))

    def some_message(self, data: st.DataObject) -> tuple[str, int]:
        held = [(node, number) for node, numbers in self.holds.items() for number in numbers]
        return data.draw(st.sampled_from(held))

    def give_back(self, entry: tuple[str, bytes], *, front: bool, death: list[str]) -> None:
        queue, raw = entry
        if death[1]:
            self.returns.setdefault(raw, []).append(death)
            if len(self.returns[raw]) >= MOST:
                self.given_up.append((raw, self.returns.pop(raw)))
                return
        self.queues[queue].insert(0 if front else len(self.queues[queue]), raw)

    @invariant()
    def each_message_is_where_the_model_has_it(self) -> None:
        for queue, messages in self.queues.items():
            assert self.client.lrange(queue, 0, -1)[::-1] == messages
            if messages:
                assert self.client.llen(keys.wake(queue)), "somebody must be woken for these"
        for node, held in self.holds.items():
            assert {int(n) for n in self.client.hkeys(keys.unacked(node))} == set(held)
        listed = [json.loads(entry) for entry in self.client.lrange(keys.GIVEN_UP, 0, -1)]
        found = [(entry["message"].encode(), entry["deaths"]) for entry in listed]
        assert found[::-1] == self.given_up
        assert {node.decode() for node in self.client.hkeys(keys.FENCED)} == set(self.dead)
        assert {node.decode() for node in self.client.hkeys(keys.WORKERS)} == set(self.holds)
        assert self.client.hlen(keys.RETURNS) == len(self.returns)
        for node in self.dead:
            assert not self.client.exists(keys.unacked(node), keys.started(node))


def waits(raw: bytes) -> bool:
    return json.loads(raw)["headers"]["eta"] is not None


def test_no_message_is_lost_or_doubled(client: redis.Redis):
    """Whatever the order of publishing, taking, settling, dying and coming back."""
    HandOut.client = client
    run_state_machine_as_test(
        HandOut,
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_is_settled_here_and_not_yet_there_is_not_given_back(client: redis.Redis):
    """An acknowledgement that couldn't be sent before the ledger is compared."""
    client.flushall()
    client.lpush("q", b"m")
    ledger = Ledger("n@h", Scripts(client))
    _, number, _, _ = ledger.scripts.take("n@h", ["q"], ["q"])
    ledger.hold("tag", number)

    def away(*_: object) -> None:
        raise redis.exceptions.ConnectionError("away")

    original, ledger.scripts.ack = ledger.scripts.ack, away
    ledger.ack("tag")
    ledger.reconcile()
    assert client.llen("q") == 0
    assert client.hlen(keys.unacked("n@h")) == 1
    ledger._unsent = [(number, lambda: original("n@h", number))]
    ledger.compare(1)
    ledger.flush()
    assert client.hlen(keys.unacked("n@h")) == 0


@pytest.mark.parametrize("transaction", [True, False])
def test_a_refusal_is_known_in_a_transaction_as_well(client: redis.Redis, transaction: bool):
    """Where the client says first which of the commands it was."""
    client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(ResponseError) as caught, client.pipeline(transaction) as pipe:
            pipe.set("key", "value").execute()
    finally:
        client.config_set("min-replicas-to-write", 0)
    assert is_refusal(caught.value)


TWO_CHANNELS = """
import os, sys
from queue import Empty
from kombu import Connection
from cluster.wire import identity
identity.assume("n@h", lambda: sys.exit("fenced"))
connection, got = Connection(sys.argv[1], transport="cluster.wire.transport:Transport"), []
def channel(queue, callback):
    made = connection.channel()
    made.queue_declare(queue)
    made.exchange_declare("e", "direct")
    made.queue_bind(queue, "e", queue)
    made.basic_consume(queue, False, callback, queue)
    connection.transport.cycle._register_BRPOP(made)
    try: made._brpop_read()  # the script is loaded, or there is nothing
    except Empty: pass
    made._waiting = False
    return made
def wait(made):
    sock = made.client.connection._sock
    import select
    assert select.select([sock], [], [], 10)[0]
"""


def run_two_channels(client: redis.Redis, text: str, run_script, tmp_path) -> str:
    client.flushall()
    script = tmp_path / "channels.py"
    script.write_text(TWO_CHANNELS + text)
    port = client.connection_pool.connection_kwargs["port"]
    done = run_script(script, broker_url(Endpoint("127.0.0.1", port, SECRET)))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_message_on_its_way_to_one_channel_is_not_missed_by_another(
    client: redis.Redis, run_script, tmp_path
):
    """The one finds more recorded than it knows of while the other's reply is unread."""
    text = """
a, b = [channel(queue, lambda message: got.append(message.payload)) for queue in ("qa", "qb")]
with Connection(sys.argv[1]) as other: other.SimpleQueue("qb").put("hello")
b._brpop_start(); wait(b)
a._brpop_start(); wait(a)
try: a._brpop_read()
except Empty: pass
b._brpop_read()
print(got, b._size("qb"), flush=True)
os._exit(0)
"""
    assert run_two_channels(client, text, run_script, tmp_path) == "['hello'] 0"


def test_a_consumer_that_raises_leaves_the_message_to_others(
    client: redis.Redis, run_script, tmp_path
):
    text = """
def callback(message): raise FileNotFoundError("a mistake of the consumer's")
a = channel("qa", callback)
with Connection(sys.argv[1]) as other: other.SimpleQueue("qa").put("hello")
a._brpop_start(); wait(a)
try: a._brpop_read()
except FileNotFoundError: print(a._size("qa"), flush=True)
os._exit(0)
"""
    assert run_two_channels(client, text, run_script, tmp_path) == "1"
