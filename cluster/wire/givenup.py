"""A message that was handed out too often, read back into the task it was."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from celery.app.task import Context
from kombu import serialization
from kombu.exceptions import KombuError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A task that won't be run again: the context its result needs, the last node, how often."""

    request: Context
    node: str
    times: int

    def __str__(self) -> str:
        return (
            f"Task {self.request.task}[{self.request.id}] was given up: each of the {self.times} "
            f"times it was run, the process that ran it died, the last time on {self.node}. "
            "Out of memory, a crash in a C extension and os._exit() do that."
        )


def read(entry: str | bytes, accept: Collection[str]) -> GivenUp:
    """Read an entry of the list.

    Args:
        entry: as the script wrote it.
        accept: the app's ``accept_content``.
    """
    fields = json.loads(entry)
    message = json.loads(fields["message"])
    request = Context(message["headers"], **_embedded(message, accept))
    return GivenUp(request, fields["node"], fields["times"])


def _embedded(message: dict[str, Any], accept: Collection[str]) -> dict[str, Any]:
    """What a task's body says of its canvas, so that a chord or an error callback hears of it.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    try:
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        _, _, embedded = serialization.loads(
            body,
            message["content-type"],
            message["content-encoding"],
            accept=serialization.prepare_accept_content(accept),
        )
    except (KombuError, ValueError, KeyError, TypeError) as error:
        logger.warning("The body of a task that was given up can't be read: %s", error)
        return {}
    return {key: embedded.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
