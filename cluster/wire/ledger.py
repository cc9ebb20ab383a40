"""What this worker holds: taken from the broker, not settled yet.

One a process, whatever connections come and go: a message is held by the
*node*, so a task that was running while the broker restarted is acknowledged
over whichever connection there is by then. An acknowledgement that can't be
sent now is kept and sent later; both scripts are harmless when repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.wire import identity
from cluster.wire.scripts import Scripts, is_fenced

#: What a broker that is restarting, or a connection that is, may raise.
CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)


class Ledger:
    """The node's hand-outs, by delivery tag."""

    def __init__(self, node: str, client: Redis) -> None:
        self.node = node
        self.scripts = Scripts(client)
        self._numbers: dict[str, int] = {}
        self._unsent: list[Callable[[], None]] = []
        self._deadly: set[str] = set()
        self._lock = threading.Lock()

    def hold(self, tag: str, number: int) -> None:
        """The message with this delivery tag is ours."""
        with self._lock:
            self._numbers[tag] = number

    def ack(self, tag: str) -> None:
        """Done with it."""
        self._deadly.discard(tag)
        self._settle(tag, self.scripts.ack)

    def reject(self, tag: str) -> None:
        """Somebody else shall have it."""
        died = tag in self._deadly
        self._deadly.discard(tag)
        self._settle(tag, partial(self.scripts.reject, died=died))

    def note_death(self, tag: str) -> None:
        """The process that ran this message's task died: a reject that follows counts.

        A task that asks to be put back (``Reject(requeue=True)``) may do so
        for ever; one that kills whoever runs it may not.
        """
        self._deadly.add(tag)

    def _settle(self, tag: str, script: Callable[[str, int], None]) -> None:
        with self._lock:
            number = self._numbers.pop(tag, None)
            if number is None:
                return
            self._unsent.append(partial(script, self.node, number))
        self.flush()

    def flush(self) -> None:
        """Send what couldn't be sent; what can't be sent now either stays."""
        with self._lock:
            while self._unsent:
                try:
                    guarded(self.node, self._unsent[0])
                except CONNECTION_ERRORS:
                    return
                self._unsent.pop(0)

    def compare(self, held: int) -> None:
        """The broker counts ``held`` messages as this node's; act if we count fewer.

        Call it only while no take is under way.
        """
        with self._lock:
            counted = len(self._numbers) + len(self._unsent)
        if held != counted:
            self.reconcile()

    def reconcile(self) -> None:
        """After a lost connection: give back what was handed out and never arrived."""
        self.flush()
        with self._lock:
            known = list(self._numbers.values())
        guarded(self.node, partial(self.scripts.reconcile, self.node, known))

    def release(self, why: str) -> None:
        """Give all back and take no more: this node is leaving."""
        self.flush()
        self.scripts.release(self.node, why, died=False)


def guarded(node: str, script: Callable[[], Any]) -> Any:
    """Run a script for ``node``; if the fence refuses it, the node leaves."""
    try:
        return script()
    except ResponseError as error:
        if is_fenced(error):
            identity.fenced(node)
        raise
