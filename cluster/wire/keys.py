"""The broker's keys that are ours. Queues and stored results keep Celery's own.

Every name is here and nowhere else, the Lua in :mod:`cluster.wire.scripts`
included: it gets them as arguments.
"""

from __future__ import annotations

#: Hash: node name → registration, as JSON. The workers that take part.
WORKERS = "cluster:workers"
#: Hash: node name → why. A node in it can't take, settle or store any more.
FENCED = "cluster:fenced"
#: List of registrations, for the manager to wait on.
JOINED = "cluster:joined"
#: List of messages that were handed out too often, for the manager to fail.
GIVEN_UP = "cluster:given-up"
#: String: what the manager runs, which a worker compares with itself.
MANAGER = "cluster:manager"
#: String: set when the cluster is over; what it holds is the grace in seconds.
OVER = "cluster:over"
#: Counter that numbers the hand-outs.
HANDOUTS = "cluster:handouts"
#: Hash: SHA-1 of a message → who died of it so far and how, as JSON: [[node, how], …].
RETURNS = "cluster:returns"
#: Hash: node name → how many messages it has acknowledged.
DONE = "cluster:done"
#: String: set while there is no room for messages from outside of workers. What it begins with
#: says whether there is none for results either (:mod:`cluster.wire.scripts`).
FULL = "cluster:full"
#: Set of the keys of results that are waited for while there is no room for others.
AWAITED = "cluster:awaited"
#: List of the keys of results that the manager has got, the last first.
DELIVERED = "cluster:delivered"
#: Sorted set: id of a task that was revoked → when.
REVOKED = "cluster:revoked"
#: Channel to which each worker's watchdog subscribes; carries the manager's word too.
PRESENCE = "cluster:presence"


def unacked(node: str) -> str:
    """Hash: number of the hand-out → where it came from, for one node. The message lies beside it,
    under this name with the number (:mod:`cluster.wire.scripts`)."""
    return f"cluster:unacked:{node}"


def waiting(node: str) -> str:
    """Set: numbers of the hand-outs that one node holds for later."""
    return f"cluster:waiting:{node}"


def started(node: str) -> str:
    """Set: numbers of those whose tasks have started since, or had an ETA and have started."""
    return f"cluster:started:{node}"


def published(publisher: str, queue: str) -> str:
    """The number of the last message that arrived from a publisher for this queue."""
    return f"cluster:published:{publisher}:{queue}"


def presence(node: str) -> str:
    """The channel that only one node's watchdog subscribes to."""
    return f"cluster:presence:{node}"


def wake(queue: str) -> str:
    """List of tokens, one a published message: an idle worker blocks on it."""
    return f"cluster:wake:{queue}"
