"""What this worker holds: taken from the broker, not settled yet.

One a process, whatever connections come and go: a message is held by the
*node*, so a task that was running while the broker restarted is acknowledged
over whichever connection there is by then. An acknowledgement that can't be
sent now is kept and sent later; both scripts are harmless when repeated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.wire import identity
from cluster.wire.scripts import FULL_ERROR, Scripts, is_fenced

#: What a broker that is restarting, or a connection that is, may raise.
CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

#: First words of the errors of a server that can't write for now. redis-py takes some of
#: them off and makes classes of them.
REFUSALS = ("MISCONF", "OOM", "READONLY", "NOREPLICAS", "BUSY")

logger = logging.getLogger(__name__)


class Ledger:
    """The node's hand-outs, by delivery tag."""

    def __init__(self, node: str, scripts: Scripts) -> None:
        self.node = node
        self.scripts = scripts
        self._numbers: dict[str, int] = {}
        self._unsent: list[tuple[int, Callable[[], None]]] = []
        self._deadly: dict[str, str] = {}
        self._lock = threading.Lock()

    def hold(self, tag: str, number: int) -> None:
        """The message with this delivery tag is ours."""
        with self._lock:
            self._numbers[tag] = number

    def ack(self, tag: str) -> None:
        """Done with it."""
        self._deadly.pop(tag, None)
        self._settle(tag, self.scripts.ack)

    def reject(self, tag: str) -> None:
        """Somebody else shall have it."""
        died = self._deadly.pop(tag, "")
        self._settle(tag, partial(self.scripts.reject, died=died))

    def note_death(self, tag: str, how: str) -> None:
        """The process that ran this message's task died: a reject that follows counts.

        A task that asks to be put back (``Reject(requeue=True)``) may do so
        for ever; one that kills whoever runs it may not.
        """
        self._deadly[tag] = how

    def wait(self, tag: str) -> None:
        """A task that won't run at once: should this worker die, it hasn't died of that."""
        self._mark(tag, self.scripts.wait)

    def start(self, tag: str) -> None:
        """A task that waited runs now."""
        self._mark(tag, self.scripts.start)

    def _mark(self, tag: str, script: Callable[[str, int], None]) -> None:
        with self._lock:
            number = self._numbers.get(tag)
        if number is None:
            return
        try:
            guarded(self.node, partial(script, self.node, number))
        except CONNECTION_ERRORS as error:
            # Should this worker die now, it is counted wrongly. No harm yet.
            logger.warning("The broker is away as a task comes or starts (%s).", error)

    def _settle(self, tag: str, script: Callable[[str, int], None]) -> None:
        with self._lock:
            number = self._numbers.pop(tag, None)
            if number is None:
                return
            self._unsent.append((number, partial(script, self.node, number)))
        self.flush()

    def flush(self) -> None:
        """Send what couldn't be sent; what can't be sent now either stays."""
        with self._lock:
            while self._unsent:
                _, script = self._unsent[0]
                try:
                    guarded(self.node, script)
                except CONNECTION_ERRORS:
                    return
                self._unsent.pop(0)

    def compare(self, held: int) -> None:
        """The broker counts ``held`` messages as this node's; act if that isn't what we count, and
        send what couldn't be sent.

        Call it only while no take is under way.
        """
        with self._lock:
            counted, unsent = len(self._numbers) + len(self._unsent), bool(self._unsent)
        if held != counted:
            self.reconcile()
        elif unsent:
            self.flush()

    def reconcile(self) -> None:
        """After a lost connection: give back what was handed out and never arrived.

        What is lost is named, and not what is known: a command that a broker which hung carries
        out late must not give back what was handed out since.
        """
        self.flush()
        held = self.scripts.held(self.node)
        with self._lock:
            # What is settled here and not yet there is known, too.
            known = {*self._numbers.values(), *(number for number, _ in self._unsent)}
        if lost := held - known:
            guarded(self.node, partial(self.scripts.reconcile, self.node, lost))

    def release(self, why: str) -> None:
        """Give all back and take no more: this node is leaving.

        Raises what a broken connection raises, also where something that is done couldn't be
        settled: it must not be given back.
        """
        self.flush()
        with self._lock:
            if self._unsent:
                raise RedisConnectionError("what is done can't be settled")
        guarded(self.node, partial(self.scripts.release, self.node, why, died=False))


def guarded(node: str, script: Callable[[], Any]) -> Any:
    """Run a script for ``node``; if the fence refuses it, the node leaves."""
    try:
        return script()
    except ResponseError as error:
        raise_for(error, node)


def raise_for(error: ResponseError, node: str) -> NoReturn:
    """What a script's error means for ``node``: the fence, a broker that refuses everybody
    for now and is waited for like one that is away, or a mistake."""
    if is_fenced(error):
        identity.fenced(node)
    if is_refusal(error) or is_full(error):
        raise RedisConnectionError(str(error)) from error
    raise error


def is_full(error: Exception) -> bool:
    """Whether a message or a result was refused for want of room."""
    words = reason(error)
    return words.startswith(FULL_ERROR) or "'maxmemory'" in words  # the server's own


def is_refusal(error: ResponseError) -> bool:
    """Whether the broker can't write at the moment: no room in memory or on disk, or busy."""
    return isinstance(error, OutOfMemoryError | ReadOnlyError) or reason(error).startswith(REFUSALS)


def reason(error: Exception) -> str:
    """The broker's own words, without those by which redis-py says where in a pipeline."""
    return str(error).rpartition(" of pipeline caused error: ")[2]
