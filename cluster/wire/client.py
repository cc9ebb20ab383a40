"""How this package's clients connect to the broker, Celery's included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.model import Endpoint
from cluster.wire.secret import password

if TYPE_CHECKING:
    from redis import Redis


def lean() -> dict[str, Any]:
    """Arguments of a connection that leave out what a private broker doesn't need.

    By itself redis-py introduces itself and asks for notices of a managed
    service's maintenance: three round trips a connection, and its own version
    looked up on disk each time. A worker makes a dozen connections.
    """
    from redis.maint_notifications import MaintNotificationsConfig

    return {
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def connect(endpoint: Endpoint, timeout: float, name: str | None = None) -> Redis:
    """A client that raises at the first failure: whoever uses it has a loop of its own, with
    other duties, and knows what a failure means.

    Args:
        endpoint: the broker.
        timeout: seconds for a connection, and for each command.
        name: what the broker calls its connections.
    """
    # Imported here: the guardian starts the server first.
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    parameters = {
        "host": endpoint.host,
        "port": endpoint.port,
        "username": endpoint.user or None,
        "password": password(endpoint.secret, endpoint.user),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "client_name": name,
        "retry": Retry(NoBackoff(), 0),
        **lean(),
    }
    if not endpoint.tls:
        return redis.Redis(**parameters)
    from cluster.wire.secured import Connection

    secured = {"connection_class": Connection, **verification(endpoint)}
    return redis.Redis.from_pool(redis.ConnectionPool(**parameters, **secured))


def verification(endpoint: Endpoint) -> dict[str, Any]:
    """Arguments of a TLS connection to this broker, as Celery's ``broker_use_ssl`` has them, too:
    https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-use-ssl"""
    import ssl

    from cluster.wire.tls import authority

    return {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_ca_data": authority(endpoint.secret),
        "ssl_check_hostname": True,
    }
