"""One secret a run, and what is derived from it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from urllib.parse import quote


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


def password(secret: str) -> str:
    """The broker's password."""
    return derive(secret, "broker password")


def broker_url(host: str, port: int, secret: str) -> str:
    """The URL under which any Celery client reaches the broker. Holds the password."""
    return f"redis://:{quote(password(secret))}@{host}:{port}/0"
