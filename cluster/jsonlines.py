"""Dataclasses as JSON, one object a line, for pipes between processes of this package."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def encode(message: DataclassInstance) -> bytes:
    """One line, with the name of the message's class."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes | str, *kinds: type[Any]) -> Any:
    """The message in a line, which is of one of these classes. Lists become tuples."""
    fields: dict[str, Any] = json.loads(line)
    name = fields.pop("kind")
    [kind] = [kind for kind in kinds if kind.__name__ == name]
    return kind(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    )
