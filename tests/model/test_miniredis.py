"""The small Redis does as the real one: the machine that runs on a real server runs here, too."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from integration.test_handout_model import HandOut
from miniredis import Client, Fate, Link, Server
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError


def test_the_scripts_do_here_what_they_do_on_a_real_server():
    class HandOutHere(HandOut):
        client = Client(Link(Server(), "all"))

    run_state_machine_as_test(
        HandOutHere,
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_it_does_not_know_is_an_error():
    client = Client(Link(Server(), "me"))
    with pytest.raises(ResponseError, match="unknown command"):
        client.zadd("key", {"a": 1})
    client.lpush("list", "a")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        client.hget("list", "a")


@pytest.mark.parametrize(
    ("fate", "raised", "at_once", "in_the_end"),
    [
        (Fate.DONE, None, 1, 1),
        (Fate.LOST, RedisTimeoutError, 0, 0),
        (Fate.UNANSWERED, RedisConnectionError, 1, 1),
        (Fate.TWICE, None, 2, 2),
        (Fate.LATE, RedisTimeoutError, 0, 1),
    ],
)
def test_what_becomes_of_a_request(fate, raised, at_once, in_the_end):
    server = Server()
    link = Link(server, "me")
    client = Client(link)
    link.fates.append(fate)
    if raised is None:
        client.incr("times")
    else:
        with pytest.raises(raised):
            client.incr("times")
    assert int(client.get("times") or 0) == at_once
    while server.late:
        server.arrive(0)
    assert int(client.get("times") or 0) == in_the_end


def test_a_connection_that_is_cut_stands_until_something_gets_through():
    server = Server()
    link = Link(server, "me", "me")
    client = Client(link)
    client.get("x")
    link.cut = True
    with pytest.raises(RedisTimeoutError):
        client.get("x")
    assert [each["name"] for each in client_list(server)] == ["me", ""]
    link.cut = False
    link.close()
    assert [each["name"] for each in client_list(server)] == [""]


def client_list(server: Server) -> list[dict[str, str]]:
    link = Link(server, "another")
    listed: list[dict[str, str]] = Client(link).client_list()
    link.close()
    return listed
