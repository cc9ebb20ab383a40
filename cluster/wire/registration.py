"""How a worker announces itself to the manager, and the manager's word to workers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.model import Registration
from cluster.wire import keys
from cluster.wire.scripts import SAY_OVER

if TYPE_CHECKING:
    from redis import Redis

#: The message on the presence channel that ends the cluster; the grace follows it.
OVER = "over"

#: The message on a node's own channel, sent by a script, that it counts as dead.
FENCED = "fenced"


def encode(registration: Registration) -> str:
    return json.dumps(asdict(registration))


def decode(text: str | bytes) -> Registration:
    fields = json.loads(text)
    return Registration(
        **{**fields, "tasks": tuple(fields["tasks"]), "remarks": tuple(fields["remarks"])}
    )


def announce_over(client: Redis, grace: float) -> None:
    """Tell every worker to leave, also those that connect later.

    Args:
        client: any client of the broker.
        grace: seconds that running tasks get to finish.
    """
    client.eval(SAY_OVER, 1, keys.OVER, str(grace), keys.PRESENCE, f"{OVER} {grace}")


def is_fenced(message: Any) -> bool:
    """Whether a message of its own channel tells a node that it counts as dead."""
    return _text(message) == FENCED


def grace_in(message: Any) -> float | None:
    """The grace in a message of the presence channel, or ``None`` if it isn't the end."""
    word, _, grace = _text(message).partition(" ")
    return float(grace) if word == OVER else None


def _text(message: Any) -> str:
    return message.decode() if isinstance(message, bytes) else str(message)
