"""Tasks that were revoked before this worker came, or while it couldn't hear of it.

Celery tells the workers there are, and each keeps it in memory
(celery/worker/state.py). Here the broker keeps it as well
(:meth:`cluster.wire.transport.Channel._keep_revokes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from celery.worker import state

from cluster.wire import keys

if TYPE_CHECKING:
    from redis import Redis


def learn(client: Redis) -> None:
    """Take in what the broker has kept."""
    for id_ in cast("list[bytes]", client.zrange(keys.REVOKED, 0, -1)):
        if id_.decode() not in state.revoked:
            state.revoked.add(id_.decode())
