"""A client of the broker for our own commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.model import Endpoint
from cluster.wire.secret import password

if TYPE_CHECKING:
    from redis import Redis


def connect(endpoint: Endpoint, timeout: float) -> Redis:
    """A client that raises at the first failure: whoever uses it has a loop of its own, with
    other duties, and knows what a failure means.

    Args:
        endpoint: the broker.
        timeout: seconds for a connection, and for each command.
    """
    # Imported here: the guardian starts the server first.
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis.Redis(
        host=endpoint.host,
        port=endpoint.port,
        password=password(endpoint.secret),
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
    )
