"""The authority that both sides derive from the run's secret."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.wire import tls
from cluster.wire.secret import new_secret

SECRET = new_secret()


@contextlib.contextmanager
def served(directory: Path, secret: str, host: str) -> Iterator[socket.socket]:
    """The client's end of a connection to somebody who shows that certificate."""
    certificate, key = tls.certificate(secret, host)
    for name, text in (("certificate", certificate), ("key", key)):
        (directory / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate", directory / "key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(OSError), context.wrap_socket(theirs, server_side=True) as shown:
            shown.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours:
            yield ours
    finally:
        thread.join(10)


def connects(connection: socket.socket, secret: str, host: str) -> None:
    # Made anew, as in another process: not the one that signed.
    authority = tls.authority.__wrapped__(secret)
    tls.context(authority).wrap_socket(connection, server_hostname=host).close()


def test_an_authority_made_elsewhere_verifies_the_same_broker(tmp_path: Path):
    assert tls.authority.__wrapped__(SECRET) != tls.authority(SECRET)
    with served(tmp_path, SECRET, "10.1.2.3") as connection:
        connects(connection, SECRET, "10.1.2.3")


def test_that_of_another_run_refuses_it(tmp_path: Path):
    with (
        served(tmp_path, new_secret(), "10.1.2.3") as connection,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        connects(connection, SECRET, "10.1.2.3")


def test_a_broker_at_another_address_is_refused(tmp_path: Path):
    with (
        served(tmp_path, SECRET, "10.1.2.3") as connection,
        pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"),
    ):
        connects(connection, SECRET, "10.1.2.4")


def test_nothing_public_tells_the_key():
    certificate, key = tls.certificate(SECRET, "10.1.2.3")
    assert "PRIVATE" in key
    assert "PRIVATE" not in certificate + tls.authority(SECRET)
