"""Celery by the hand of somebody who knows it well: only what a local run needs.

No mingle, gossip and heartbeat, and no ping before all workers have subscribed to such.
"""

import sys

import byhand
import start_celery

if __name__ == "__main__":
    start_celery.main(int(sys.argv[1]), flags=byhand.LEAN, before_ping=byhand.wait_for_subscribers)
