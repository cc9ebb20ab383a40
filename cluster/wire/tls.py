"""TLS with nothing to hand around but the run's secret: both sides derive the same authority.

Whoever has the secret makes the authority's certificate by himself. Two that are made
apart differ in their dates and nothing that matters: what one of them has signed the other
one verifies, since key and name are the same. Nobody without the secret can sign anything.
"""

from __future__ import annotations

import datetime as dt
import functools
import ipaddress
import ssl
from typing import TYPE_CHECKING

from cluster.wire.secret import derive

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

#: Before now, for machines whose clocks differ; and after, for runs that take long.
SLACK = dt.timedelta(days=1)
VALID = dt.timedelta(days=3650)

_NAME = "celery-cluster run"


@functools.cache
def authority(secret: str) -> str:
    """The authority's certificate, as PEM; the same each time. Holds nothing secret."""
    from cryptography import x509

    key = _key(secret)
    builder = _builder(_NAME, key.public_key()).add_extension(
        # No authority below it.
        x509.BasicConstraints(ca=True, path_length=0),
        critical=True,
    )
    return _pem(builder.add_extension(_usage(ca=True), critical=True).sign(key, None))


def certificate(secret: str, host: str) -> tuple[str, str]:
    """A new certificate for a broker, and its key, as PEM.

    Args:
        secret: the run's.
        host: the IP address by which clients reach it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signer, key = _key(secret), Ed25519PrivateKey.generate()
    signed = (
        _builder("broker", key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        # Python 3.13 and newer refuse a certificate that doesn't say who signed it:
        # https://docs.python.org/3/library/ssl.html#ssl.VERIFY_X509_STRICT
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]),
            critical=False,
        )
        .sign(signer, None)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return _pem(signed), private.decode()


@functools.cache
def context(pem: str) -> ssl.SSLContext:
    """What a client verifies the broker with: this authority and no other, and the address.

    One for all connections: making one takes longer than a connection.

    Args:
        pem: from :func:`authority`.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=pem)
    return made


def _key(secret: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex(derive(secret, "certificate authority"))
    )


def _builder(name: str, key: Ed25519PublicKey) -> x509.CertificateBuilder:
    from cryptography import x509

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])

    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(_NAME))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(signed: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return signed.public_bytes(Encoding.PEM).decode()
