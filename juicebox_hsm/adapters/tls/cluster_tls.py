"""Mutual TLS 1.3 inside the cluster (decision record: cluster identity).

A directory holds `ca.pem` (whom we trust), `cert.pem` and `key.pem` (who we are). Both sides check that the other's
certificate comes from the CA and names one role in a URI SAN `juicebox:role:ROLE`; host names are not checked, for
addresses in a cluster change and a role is what methods are permitted to. Nothing takes effect before everything in
the directory was read and found to belong together, at start and at every reload.
"""

from __future__ import annotations

import datetime as dt
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.regular_file import open_regular
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.errors import LocalError, NotYet, PeerError
from juicebox_hsm.wire.rpc import PeerRole

CA_FILE: Final = "ca.pem"
CERT_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
ROLE_URI_PREFIX: Final = "juicebox:role:"
FILE_BYTES_MAX: Final = 1 << 20  # own: a CA bundle during a rotation has a few kB

_log = get_logger("cluster-tls")
_ISSUE: Final = "issue one with `juicebox-hsm cluster ca issue --dir CA --role ROLE --name NAME --out DIR`"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who a verified certificate says the peer is; `name` is its common name, for people only."""

    role: PeerRole
    name: str


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One consistent set of files."""

    identity: PeerIdentity
    not_after: dt.datetime
    server_context: ssl.SSLContext
    client_context: ssl.SSLContext


class ClusterTls:
    """Our identity in the cluster and the contexts that prove it. Made by `load`."""

    __slots__ = ("_directory", "_loaded")

    def __init__(self, directory: Path, loaded: _Loaded) -> None:
        self._directory = directory
        self._loaded = loaded

    @classmethod
    def load(cls, directory: Path | str, role: PeerRole | None = None) -> ClusterTls:
        """Read and verify `ca.pem`, `cert.pem` and `key.pem`, which must be for `role` if one is given.

        Raises `LocalError`: which file, what is wrong, how to fix it.
        """
        path = Path(directory)
        loaded = _load(path)
        if role is not None and loaded.identity.role is not role:
            raise LocalError(
                f"{path / CERT_FILE}: is for role {loaded.identity.role.value}, {role.value} is needed; {_ISSUE}"
            )
        return cls(path, loaded)

    def reload(self) -> None:
        """Read the directory again; new streams use what it holds now, existing ones stay as they are.

        Raises `LocalError` as `load` does, and then nothing has changed. The role cannot change.
        """
        loaded = _load(self._directory)
        if loaded.identity.role is not self.identity.role:
            raise LocalError(
                f"{self._directory / CERT_FILE}: is for role {loaded.identity.role.value}, this process runs as "
                f"{self.identity.role.value}; {_ISSUE}"
            )
        self._loaded = loaded

    @property
    def identity(self) -> PeerIdentity:
        """Our own role and name."""
        return self._loaded.identity

    @property
    def not_after(self) -> dt.datetime:
        """When our certificate ends (UTC)."""
        return self._loaded.not_after

    @property
    def server_context(self) -> ssl.SSLContext:
        """The context for accepted streams; ask for it anew for each."""
        return self._loaded.server_context

    @property
    def client_context(self) -> ssl.SSLContext:
        """The context for opened streams; ask for it anew for each."""
        return self._loaded.client_context


def certificate_end(tls: ClusterTls | None) -> dt.datetime | None:
    """Return when the certificate in service ends (UTC), None without TLS; a reload may change it."""
    return None if tls is None else tls.not_after


def cluster_reloads(tls: ClusterTls | None) -> dict[str, Callable[[], Awaitable[None]]]:
    """Return what a service reloads on SIGHUP of its cluster identity: nothing without TLS."""
    if tls is None:
        return {}

    async def reload() -> None:
        await in_thread_or_here(tls.reload)
        _log.info("cluster certificate reloaded", name=tls.identity.name, not_after=tls.not_after.isoformat())

    return {"cluster certificate": reload}


class _Verified(Protocol):
    """A TLS stream after its handshake."""

    def getpeercert(self) -> dict[str, Any] | None: ...


def peer_identity(stream: _Verified) -> PeerIdentity:
    """Return who the peer of a finished handshake is. Raises `PeerError` unless its certificate names one role."""
    certificate = stream.getpeercert()
    if not certificate:
        raise PeerError("peer showed no certificate")
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    names = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    try:
        return PeerIdentity(_role_of(uris), names[0] if names else "")
    except ValueError as error:
        raise PeerError(f"peer's certificate {error}") from None


def _role_of(uris: list[str]) -> PeerRole:
    roles = [uri.removeprefix(ROLE_URI_PREFIX) for uri in uris if uri.startswith(ROLE_URI_PREFIX)]
    if len(roles) != 1:
        raise ValueError(f"names {len(roles)} roles ({ROLE_URI_PREFIX}ROLE), not one")
    try:
        return PeerRole(roles[0])
    except ValueError:
        raise ValueError(f"names the unknown role {roles[0][:40]!r}") from None


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise local_error(f"{path}: {error.strerror}; {_ISSUE}", error) from None
    if not data:
        raise NotYet(f"{path}: is empty; it may be being written")
    if len(data) > FILE_BYTES_MAX:
        raise LocalError(f"{path}: larger than {FILE_BYTES_MAX} bytes; {_ISSUE}")
    return data


def _load(directory: Path) -> _Loaded:
    """Read and verify everything. Raises `LocalError` and nothing else: a reload must never end the process."""
    try:
        return _read_and_verify(directory)
    except LocalError:
        raise
    except Exception:  # noqa: BLE001  # certificates are parsed as they are used, with errors of many types
        what = "damaged, or not of the kind that `cluster ca issue` makes"
        raise LocalError(f"{directory / CERT_FILE} or {CA_FILE}: cannot be used: {what}; {_ISSUE}") from None


def _read_and_verify(directory: Path) -> _Loaded:
    ca_path, cert_path, key_path = (directory / name for name in (CA_FILE, CERT_FILE, KEY_FILE))
    ca_pem, cert_pem, key_pem = _read(ca_path), _read(cert_path), _read(key_path)
    cas, leaf = _parse(ca_path, ca_pem), _parse(cert_path, cert_pem)[0]
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError):
        raise LocalError(f"{key_path}: not an unencrypted PEM private key; {_ISSUE}") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise NotYet(f"{cert_path}: {KEY_FILE} does not match; {_ISSUE}")
    now = dt.datetime.now(dt.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise NotYet(
            f"{cert_path}: valid from {leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d} "
            f"only; {_ISSUE}"
        )
    if not any(_issued(leaf, ca) for ca in cas):
        raise NotYet(f"{cert_path}: not issued by a CA in {CA_FILE}; {_ISSUE}")
    identity = _identity(cert_path, leaf)
    try:
        server = _context(ssl.PROTOCOL_TLS_SERVER, ca_pem, cert_path, key_path)
        client = _context(ssl.PROTOCOL_TLS_CLIENT, ca_pem, cert_path, key_path)
    except (ssl.SSLError, OSError) as error:
        raise NotYet(f"{directory}: cannot be used for TLS: {reason_of(error)}; {_ISSUE}") from None
    return _Loaded(identity, leaf.not_valid_after_utc, server, client)


def _parse(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise LocalError(f"{path}: not a PEM certificate; {_ISSUE}") from None


def _issued(leaf: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _identity(path: Path, leaf: x509.Certificate) -> PeerIdentity:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    try:
        return PeerIdentity(_role_of(uris), str(common[0].value) if common else "")
    except ValueError as error:
        raise LocalError(f"{path}: {error}; {_ISSUE}") from None


def _context(protocol: int, ca_pem: bytes, cert_path: Path, key_path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # CA and role decide, not the address
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The files are read again here. If they change in between, OpenSSL itself refuses a key that does not match; a
    # complete newer pair is as good as the one checked, and its role is checked by every peer.
    context.load_cert_chain(cert_path, key_path)
    context.load_verify_locations(cadata=ca_pem.decode("ascii", "replace"))
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # streams live long; resumption would save nothing and keep key material around
    return context
