"""The five lines: run it with ``python examples/demo.py``."""

from celery import Celery

import cluster

app = Celery("demo")


@app.task
def square(x: int) -> int:
    return x * x


if __name__ == "__main__":
    with cluster.start(4):  # a broker, and four workers that have answered a ping
        results = [square.delay(i) for i in range(100)]
        print(sum(result.get() for result in results))
