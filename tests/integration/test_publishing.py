"""What is sent arrives once, whatever happens to the answer."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import redis
from kombu import Exchange, Queue
from sampleapp import add, app, where

import cluster
from cluster.wire import transport
from cluster.wire.scripts import LARGE


@pytest.mark.parametrize("size", [1, 2 * LARGE], ids=["small", "large"])
def test_a_message_whose_answer_is_lost_is_published_once(monkeypatch, size: int):
    """kombu sends it again, over another connection."""
    lost = []

    def lose_answer(method):
        def call(*args, **kwargs):
            answer = method(*args, **kwargs)
            if len(lost) < 3:
                lost.append(answer)
                raise redis.exceptions.ConnectionError("the answer is lost")
            return answer

        return call

    with cluster.start(0, app=app) as c:
        add.delay(0, "x" * size)
        with monkeypatch.context() as broken:
            broken.setattr(redis.Redis, "evalsha", lose_answer(redis.Redis.evalsha))
            broken.setattr(transport, "_put_large", lose_answer(transport._put_large))
            results = [add.delay(i, "x" * size) for i in range(1, 4)]
        assert len(lost) == 3
        assert len({result.id for result in results}) == 3
        assert c._client.llen("celery") == 4


def test_one_producer_of_several_threads_and_a_batch_lose_nothing():
    """Each numbers its messages by itself: one that overtakes another doesn't replace it."""
    with cluster.start(0, app=app) as c:
        with app.producer_pool.acquire(block=True) as producer:
            with ThreadPoolExecutor(8) as threads:
                sent = [
                    threads.submit(add.apply_async, (i, i), producer=producer) for i in range(400)
                ]
                for future in sent:
                    future.result()
            with producer.batch():
                for i in range(10):
                    add.apply_async((i, i), producer=producer)
                with app.connection_for_write() as connection:
                    other = connection.Producer()
                    add.apply_async((1, 1), producer=other)
        assert c._client.llen("celery") == 411


def test_a_message_for_several_queues_reaches_each():
    with cluster.start(0, app=app) as c, app.connection_for_write() as connection:
        topic = Exchange("topics", "topic")
        for name in ("one", "two"):
            Queue(name, topic, routing_key="#")(connection.default_channel).declare()
        with connection.Producer() as producer:
            producer.publish({"a": 1}, exchange=topic, routing_key="a.b")
            producer.publish({"a": 2}, exchange=topic, routing_key="a.b")
        assert [c._client.llen(name) for name in ("one", "two")] == [2, 2]


def test_a_worker_whose_child_was_replaced_outlasts_a_restart_of_the_broker(eventually):
    """The new child was forked from a process that is connected, and must not keep that."""
    with cluster.start(1, app=app) as c:
        _, child, main = where.delay().get(timeout=30)
        for _ in range(2):
            os.kill(child, signal.SIGKILL)
            _, again, same = where.delay().get(timeout=30)
            assert again != child and same == main
            child = again
            server = c._broker._server_process
            server.kill()
            eventually(lambda dead=server: c._broker._server_process.pid != dead.pid, "restarted")
            assert [add.delay(i, i).get(timeout=30) for i in range(5)] == [0, 2, 4, 6, 8]


def test_a_child_holds_none_of_the_main_processs_connections():
    with cluster.start(1, app=app) as c:
        _, child, _ = where.delay().get(timeout=30)
        os.kill(child, signal.SIGKILL)
        _, child, main = where.delay().get(timeout=30)
        port = c._broker.endpoint.port

        def ports(pid: int) -> set[int]:
            connections = psutil.Process(pid).net_connections("tcp")
            return {one.laddr.port for one in connections if one.raddr and one.raddr.port == port}

        assert ports(main) and ports(child)
        assert not ports(main) & ports(child)
