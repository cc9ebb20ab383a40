"""A network between workers and a broker that can be cut without a word to either side."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator


class Network:
    """Passes on what comes to a port of its own, until it is cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._wake, self._waker = socket.socketpair()
        self._whole = threading.Event()
        self._whole.set()
        self._ending = False
        for readable in (self._listener, self._wake):
            self._selector.register(readable, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """From now on nothing gets through, and no connection is closed."""
        self._whole.clear()
        self._waker.send(b"x")

    def heal(self) -> None:
        """What was held back goes on, as after a cable is plugged in again."""
        self._whole.set()

    def end(self) -> None:
        self._ending = True
        self.heal()
        self._waker.send(b"x")
        self._thread.join()

    def _run(self) -> None:
        while not self._ending:
            self._whole.wait()
            for key, _ in self._selector.select():
                if not self._whole.is_set():
                    break
                if key.fileobj is self._listener:
                    self._connect()
                elif key.fileobj is self._wake:
                    self._wake.recv(1)
                elif key.fileobj in self._pairs:
                    self._pass_on(key.fileobj)
        for one in (*self._pairs, self._listener, self._wake, self._waker):
            one.close()
        self._selector.close()

    def _connect(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        for one, other in ((client, server), (server, client)):
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        other = self._pairs[one]
        try:
            data = one.recv(65536)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass  # reset by one side: both are done
        for each in (one, other):
            self._selector.unregister(each)
            del self._pairs[each]
            each.close()


@contextlib.contextmanager
def network(target: tuple[str, int]) -> Iterator[Network]:
    """A network to ``target``, whole at first."""
    made = Network(target)
    try:
        yield made
    finally:
        made.end()
