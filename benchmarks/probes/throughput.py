"""Tasks a second and round trips, with this project or with stock Celery by hand.

The same app, client code, number of workers and server program; what differs is who boots
the workers, and with which transport and result backend.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import byhand
import cpu
from celery import group
from redis import Redis
from stopwatch import report
from throughput_app import app, echo, nothing, nothing_kept

#: A queue that no worker takes from until it is told to.
ASIDE = "aside"

#: Seconds between two looks at a queue that is being drained.
LOOK_EVERY = 0.005

#: Seconds for a result that is due.
PATIENCE = 60.0

#: Keys that this project's guardian and manager look at all the time, tasks or not.
STEADY_KEYS = {"cluster:workers", "cluster:joined", "cluster:given-up"}

#: Said to the server where the commands of interest end.
THE_END = "the-end"


def main(system: str, workers: int, counts: Mapping[str, int]) -> None:
    with SYSTEMS[system](workers):
        warm_up(workers)
        with app.connection_for_write() as connection:
            client: Redis = connection.default_channel.client
            report(
                {
                    "publish": publish(nothing, counts["publish"], client),
                    "publish_ignored": publish(nothing_kept, counts["publish"], client),
                    "tasks": all_of(counts["tasks"]),
                    "group": one_group(counts["group"]),
                    "round_trips": round_trips(counts["round_trips"]),
                    "drain": drain(counts["drain"], workers, client),
                    "payloads": payloads(counts["payloads"], counts["payload"]),
                    "commands": commands(counts["commands"], client),
                }
            )


# -- the systems ---------------------------------------------------------------------------


@contextlib.contextmanager
def ours(workers: int) -> Iterator[None]:
    import cluster

    with cluster.start(workers, app=app, progress=False):
        yield


@contextlib.contextmanager
def stock(workers: int, keeps: Sequence[str]) -> Iterator[None]:
    port = byhand.free_port()
    byhand.use_server(port)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(byhand.process(byhand.server_command(port, keeps)))
        client = stack.enter_context(Redis(host="127.0.0.1", port=port))
        byhand.wait_for_server(server, client)
        started = [
            stack.enter_context(
                byhand.process(byhand.worker_command("throughput_app", number, byhand.LEAN))
            )
            for number in range(workers)
        ]
        byhand.wait_for_subscribers(client, workers)
        try:
            yield
        finally:
            app.backend.result_consumer.stop()
            for process in started:  # all at once: they end side by side
                process.terminate()


SYSTEMS: Mapping[str, Callable[[int], contextlib.AbstractContextManager[None]]] = {
    "cluster": ours,
    "durable": lambda workers: stock(workers, byhand.DURABLE),
    "forgetful": lambda workers: stock(workers, byhand.FORGETFUL),
}


# -- what is measured ----------------------------------------------------------------------


def warm_up(workers: int) -> None:
    """Until connections are there and every process has imported what a task needs."""
    for result in [nothing.delay() for _ in range(50 * workers)]:
        result.get(timeout=PATIENCE)


def publish(task: Any, count: int, client: Redis) -> float:
    """Messages sent a second, while the workers are idle."""
    began = time.perf_counter()
    results = [task.apply_async(queue=ASIDE) for _ in range(count)]
    took = time.perf_counter() - began
    client.delete(ASIDE)
    for result in results:
        result.forget()
    return count / took


def all_of(count: int) -> Mapping[str, float]:
    """From the first ``delay()`` to the last ``get()``: tasks a second, and seconds of CPU that
    all processes together take for one."""
    used, began = cpu.seconds(), time.perf_counter()
    for result in [nothing.delay() for _ in range(count)]:
        result.get(timeout=PATIENCE)
    took = time.perf_counter() - began
    return {"rate": count / took, "cpu": (cpu.seconds() - used) / count}


def one_group(count: int) -> float:
    """Tasks a second of one group, sent and fetched."""
    tasks = group(nothing.s() for _ in range(count))
    began = time.perf_counter()
    tasks().get(timeout=PATIENCE)
    return count / (time.perf_counter() - began)


def round_trips(count: int) -> Sequence[float]:
    """Seconds from ``delay()`` to the result, one task after the other."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        nothing.delay().get(timeout=PATIENCE)
        taken.append(time.perf_counter() - began)
    return taken


def drain(count: int, workers: int, client: Redis) -> float:
    """Tasks a second of workers that find a full queue.

    From the first result that is there to the last: how soon an idle worker looks at a queue
    that is new to it is another question.
    """
    keys = [f"celery-task-meta-{nothing.apply_async(queue=ASIDE).id}" for _ in range(count)]
    app.control.add_consumer(ASIDE, reply=True, limit=workers)

    def stored() -> int:
        return client.exists(*keys)

    while client.llen(ASIDE) == count:
        time.sleep(LOOK_EVERY)
    began, before = time.perf_counter(), stored()
    while client.llen(ASIDE):
        time.sleep(LOOK_EVERY)
    while stored() < count:
        time.sleep(LOOK_EVERY)
    took = time.perf_counter() - began
    app.control.cancel_consumer(ASIDE, reply=True, limit=workers)
    return (count - before) / took


def payloads(count: int, size: int) -> Mapping[str, float]:
    """The same for tasks whose argument and result have this many bytes."""
    text = "x" * size
    used, began = cpu.seconds(), time.perf_counter()
    for result in [echo.delay(text) for _ in range(count)]:
        if len(result.get(timeout=PATIENCE)) != size:
            raise ValueError("The result isn't the argument.")
        result.forget()
    took = time.perf_counter() - began
    return {"rate": count / took, "cpu": (cpu.seconds() - used) / count}


def commands(count: int, client: Redis) -> Mapping[str, float]:
    """Commands a task that clients send; those that scripts run inside the server don't count."""
    seen: Counter[str] = Counter()
    with client.monitor() as monitor:
        for result in [nothing.delay() for _ in range(count)]:
            result.get(timeout=PATIENCE)
        client.echo(THE_END)
        for entry in monitor.listen():
            name, *words = entry["command"].split(" ")
            if words[:1] == [THE_END]:
                break
            if entry["client_type"] != "lua" and not is_steady(name, words):
                seen[name] += 1
    return {name: number / count for name, number in seen.items()}


def is_steady(name: str, words: Sequence[str]) -> bool:
    """Whether it is sent all the time, tasks or not."""
    return name == "PUBSUB" or not STEADY_KEYS.isdisjoint(words[:1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
