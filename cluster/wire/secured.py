"""A connection to a broker that speaks TLS."""

from __future__ import annotations

import ssl
from socket import socket

from redis.connection import SSLConnection

from cluster.wire.tls import context


class Connection(SSLConnection):
    """redis-py's, which would read all the world's authorities for each connection, and
    trust them as well. A worker makes a dozen connections."""

    def _wrap_socket_with_ssl(self, sock: socket) -> ssl.SSLSocket:
        return context(self.ca_data).wrap_socket(sock, server_hostname=self.host)
