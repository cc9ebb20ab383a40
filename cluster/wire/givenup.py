"""A message that was handed out too often, read back into the task it was."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from celery.app.task import Context
from kombu.exceptions import KombuError
from kombu.message import Message
from kombu.serialization import prepare_accept_content

#: How the death of a pool's process begins; any other is a worker's.
POOL_PROCESS = "a process of its pool ended"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A message that won't be run again: what it was, and who died of it.

    ``request`` is the context that a task's result needs; ``None`` for a
    message that is no task. ``deaths`` are pairs: the node, and how.
    """

    request: Context | None
    deaths: tuple[tuple[str, str], ...]

    def explain(self, deaths: Sequence[tuple[str, str]]) -> str:
        """Say what happened.

        Args:
            deaths: as :attr:`deaths`, in the best words there are.
        """
        what = (
            f"Task {self.request.task}[{self.request.id}]"
            if self.request is not None
            else "A message that is no task"
        )
        return (
            f"{what} was given up: each of the {len(deaths)} times it was run, the process that "
            "ran it died. Running out of memory, a crash in a C extension, sys.exit() and "
            "os._exit() do that.\n" + "\n".join(f"  {node}: {how}" for node, how in deaths)
        )


def read(entry: str | bytes, accept: Collection[str]) -> GivenUp:
    """Read an entry of the list.

    Args:
        entry: as the script wrote it.
        accept: the app's ``accept_content``.
    """
    # What stock clients have sent may be anything.
    fields = json.loads(entry.decode(errors="replace") if isinstance(entry, bytes) else entry)
    deaths = tuple((node, how) for node, how in fields["deaths"])
    return GivenUp(_request(fields["message"], accept), deaths)


def _request(raw: str, accept: Collection[str]) -> Context | None:
    """https://docs.celeryq.dev/en/stable/internals/protocol.html"""
    try:
        message = json.loads(raw)
        headers, properties = message["headers"], message["properties"]
        if not {"id", "task"} <= headers.keys():
            return None
        return Context(
            headers,
            delivery_info=properties.get("delivery_info") or {},
            reply_to=properties.get("reply_to"),
            correlation_id=properties.get("correlation_id"),
            **_embedded(message, accept),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # by another publisher, in another form


def _embedded(message: dict[str, Any], accept: Collection[str]) -> dict[str, Any]:
    """What a task's body says of its canvas, so that a chord or an error callback hears of it."""
    body = message["body"]
    try:
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        _, _, found = Message(
            body=body,
            content_type=message["content-type"],
            content_encoding=message["content-encoding"],
            headers=message["headers"],
            accept=prepare_accept_content(accept),
        ).decode()
        embedded = dict(found or {})
    except (KombuError, ValueError, KeyError, TypeError) as error:
        logger.warning("The body of a task that was given up can't be read: %s", error)
        return {}
    return {key: embedded.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
