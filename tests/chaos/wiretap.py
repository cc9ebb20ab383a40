"""Listens to what the broker is told, to strike at a moment: as a message is taken, say.

With MONITOR the broker sends every command that it runs, those inside scripts included:
https://redis.io/docs/latest/commands/monitor/
"""

from __future__ import annotations

import re
import socket
import time
from types import TracebackType
from typing import Self

from cluster.model import Endpoint
from cluster.wire.secret import password

#: Seconds to connect, and for each piece of what is said.
TIMEOUT = 1.0

_ADDRESS = re.compile(rb"\[\d+ [^\]]*:(\d+)\]")


class Wiretap:
    """A connection that listens; used in a ``with`` statement.

    Raises:
        OSError: the broker is away.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._socket = socket.create_connection((endpoint.host, endpoint.port), TIMEOUT)
        word = f"AUTH {password(endpoint.secret)}\r\nMONITOR\r\n"
        self._socket.sendall(word.encode())
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def wait_for(self, words: bytes, seconds: float) -> bytes | None:
        """The first command that has ``words`` in it, as soon as it is run, or ``None``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                heard = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            if not heard:
                return None
            *lines, self._heard = (self._heard + heard).split(b"\n")
            for line in lines:
                if words in line:
                    return line
            # A long command is known by its beginning, before all of it has come.
            if words in self._heard:
                return self._heard
        return None


def port_of(line: bytes) -> int | None:
    """The port of the client that gave this command, or ``None`` for a script's."""
    found = _ADDRESS.search(line)
    return int(found[1]) if found else None
