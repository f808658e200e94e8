"""The edge's TLS identity: verified loading, and a swap that never harms service (load-balancer.md 2).

`EdgeTls.context` is what the next accepted connection uses; established connections keep the context they began with.
"""

from __future__ import annotations

import datetime as dt
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.regular_file import open_regular
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.errors import LocalError, NotYet
from juicebox_hsm.host.certificates import may_replace

ALPN: Final = ("http/1.1", "h2")
"""Our preference (decision record 0007): HTTP/1.1 costs half of what HTTP/2 does."""

PEM_BYTES_MAX: Final = 1 << 20
"""Largest key or certificate file that is read (own)."""

_FORM: Final = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True, slots=True)
class LeafInfo:
    """What an operator wants to know of the certificate in service. Its validity is in UTC."""

    subject: str
    serial: str
    not_before: dt.datetime
    not_after: dt.datetime

    def remaining_days(self, now: dt.datetime) -> float:
        """Return the days until the certificate expires, negative afterwards."""
        return (self.not_after - now).total_seconds() / 86_400

    @property
    def valid_ms(self) -> tuple[int, int]:
        """Return from when until when it is valid, in Unix ms."""
        return round(self.not_before.timestamp() * 1000), round(self.not_after.timestamp() * 1000)


def _read(path: Path, what: str) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(PEM_BYTES_MAX + 1)
    except OSError as error:
        raise local_error(f"cannot read TLS {what} file {path}: {error.strerror}", error) from None
    if not data:
        raise NotYet(f"TLS {what} file {path} is empty; it may be being written")
    if len(data) > PEM_BYTES_MAX:
        raise LocalError(f"TLS {what} file {path} is larger than {PEM_BYTES_MAX} bytes")
    return data


def _load_key(path: Path, data: bytes) -> PrivateKeyTypes:
    start = data.find(b"-----BEGIN ")
    while start >= 0 and b"PRIVATE KEY-----" not in data[start : data.find(b"\n", start) + 1 or None]:
        start = data.find(b"-----BEGIN ", start + 1)  # SEC1 files often begin with EC PARAMETERS
    if start < 0:
        raise LocalError(f"TLS key file {path} holds no PEM private key")
    try:
        return load_pem_private_key(data[start:], password=None)
    except TypeError:
        raise LocalError(f"TLS key file {path} is encrypted; an unencrypted key is needed") from None
    except Exception:  # noqa: BLE001  # the library documents no complete list; its text may quote the file
        raise LocalError(f"TLS key file {path} is not a PKCS#8, PKCS#1 or SEC1 private key in PEM") from None


def _load_leaf(path: Path, data: bytes) -> x509.Certificate:
    try:
        chain = x509.load_pem_x509_certificates(data)
    except (ValueError, x509.InvalidVersion):  # the library's text is about its own parts
        holds = "a private key" if b"PRIVATE KEY-----" in data else "no whole certificate in PEM"
        raise LocalError(f"TLS certificate file {path} does not parse: it holds {holds}") from None
    if not chain:
        raise LocalError(f"TLS certificate file {path} holds no certificate")
    return chain[0]


def _describe(path: Path, leaf: x509.Certificate) -> tuple[bytes, LeafInfo]:
    """Return a certificate's public key (DER) and what an operator wants to know of it. Raises `LocalError` only."""
    try:
        public = leaf.public_key().public_bytes(*_FORM)
        subject, serial = leaf.subject.rfc4514_string(), f"{leaf.serial_number:x}"
        return public, LeafInfo(subject, serial, leaf.not_valid_before_utc, leaf.not_valid_after_utc)
    except Exception:  # noqa: BLE001  # it is parsed as it is used, with errors of many types
        raise LocalError(f"TLS certificate file {path} cannot be used: it is damaged, or of an unknown kind") from None


def load_edge_context(key_file: Path, cert_file: Path) -> tuple[ssl.SSLContext, LeafInfo]:
    """Read key (PKCS#8, PKCS#1 or SEC1 PEM) and chain (leaf first), check that they match, build a server context.

    Raises `LocalError` that names the file at fault.
    """
    key = _load_key(key_file, _read(key_file, "key"))
    public, info = _describe(cert_file, _load_leaf(cert_file, _read(cert_file, "certificate")))
    if key.public_key().public_bytes(*_FORM) != public:
        raise NotYet(f"TLS key file {key_file} does not match the first certificate of {cert_file}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(list(ALPN))
    try:
        # Never ask a terminal for a password: files may change between our check and this read.
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        raise NotYet(f"TLS key {key_file} and certificate {cert_file} cannot be used: {reason_of(error)}") from None
    return context, info


class EdgeTls:
    """The pair of files in service. Construction loads them; raises `LocalError`."""

    def __init__(self, key_file: Path, cert_file: Path) -> None:
        self._key_file = key_file
        self._cert_file = cert_file
        self.context, self.leaf = load_edge_context(key_file, cert_file)

    def reload(self) -> LeafInfo:
        """Read both files again and put them in service if they verify; else raises `LocalError`, unchanged.

        A certificate that is not valid now does not take the place of one that is.
        """
        context, leaf = load_edge_context(self._key_file, self._cert_file)
        if not may_replace(self.leaf.valid_ms, leaf.valid_ms, round(time.time() * 1000)):
            raise NotYet(
                f"TLS certificate file {self._cert_file}: is valid from {leaf.not_before:%Y-%m-%d %H:%M} to "
                f"{leaf.not_after:%Y-%m-%d %H:%M} UTC only, and the one in service is valid now"
            )
        self.context, self.leaf = context, leaf
        return leaf

    def following_context(self) -> ssl.SSLContext:
        """Return a context for a server that takes one for good: each handshake gets what is in service by then."""

        def follow(handshake: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
            handshake.context = self.context

        context = self.context
        context.sni_callback = follow
        return context
