"""One secret a run, and what is derived from it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from urllib.parse import quote

from cluster.model import Endpoint

#: The broker's user that workers, and so their tasks, are.
WORKER = "worker"


def new_secret() -> str:
    """256 random bits, in hexadecimal."""
    return secrets.token_hex(32)


def derive(secret: str, purpose: str) -> str:
    """Derive the value for one purpose: HKDF-Expand with SHA-256, one block.

    The extract step is left out as RFC 5869, section 3.3 allows: the secret is
    a uniformly random key already.
    """
    block = purpose.encode() + b"\x01"
    return hmac.new(bytes.fromhex(secret), block, hashlib.sha256).hexdigest()


def password(secret: str, user: str = "") -> str:
    """The broker's password for one of its users; by default, for the manager."""
    return derive(secret, f"broker password of {user}" if user else "broker password")


def broker_url(endpoint: Endpoint) -> str:
    """The URL under which any Celery client reaches the broker. Holds the password."""
    scheme = "rediss" if endpoint.tls else "redis"
    known = f"{endpoint.user}:{quote(password(endpoint.secret, endpoint.user))}"
    return f"{scheme}://{known}@{endpoint.address}/0"
