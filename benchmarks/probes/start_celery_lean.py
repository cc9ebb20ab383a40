"""Celery by the hand of somebody who knows it well: only what a local run needs.

No mingle, gossip and heartbeat, and no ping before all workers have subscribed to such.
"""

import sys
import time

import start_celery
from redis import Redis


def wait_for_subscribers(client: Redis, workers: int) -> None:
    # As long as it takes: the script that runs this probe has the deadline.
    while len(client.client_list(_type="pubsub")) < workers:
        time.sleep(start_celery.LOOK_EVERY)


if __name__ == "__main__":
    start_celery.main(
        int(sys.argv[1]),
        flags=["--without-mingle", "--without-gossip", "--without-heartbeat"],
        before_ping=wait_for_subscribers,
    )
