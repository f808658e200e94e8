"""The two small certificate authorities: one for the cluster, one for the edge (decision record: cluster identity).

The cluster's CA signs certificates that name a role; the edge's CA signs certificates that name hosts. They are apart
because a client's trust anchor must admit nobody inside. Keys are ECDSA P-256. Key files are 0600, directories that
are made here 0700. Files appear complete or not at all, a key before its certificate, so that a process that reloads
in between finds a pair that does not match and keeps its old one.
"""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from juicebox_hsm.adapters.process.directory_lock import writing_into
from juicebox_hsm.adapters.tls.cluster_tls import CA_FILE, CERT_FILE, KEY_FILE, ROLE_URI_PREFIX
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import parse_host
from juicebox_hsm.wire.rpc import PeerRole

CA_KEY_FILE: Final = "ca-key.pem"
CA_DAYS: Final = 3650  # decision record: 10 years
LEAF_DAYS: Final = 90  # decision record
BACKDATE: Final = dt.timedelta(minutes=5)  # own: clocks of a cluster differ a little
NAME_CHARS_MAX: Final = 64  # X.520 upper bound of a common name


class CaKind(enum.Enum):
    """What a CA signs; the value is its common name, by which it is told apart."""

    CLUSTER = "juicebox-hsm cluster CA"
    EDGE = "juicebox-hsm edge CA"


def init_ca(directory: Path | str, *, kind: CaKind = CaKind.CLUSTER, now: dt.datetime | None = None) -> None:
    """Make a CA: `ca.pem` and `ca-key.pem` in `directory`, valid 10 years.

    Raises `LocalError` if there is one already, or if the directory cannot be written.
    """
    path = Path(directory)
    _refuse_existing(path)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, kind.value)])
    builder = _builder(name, name, key.public_key(), now, CA_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    make_directory(path)
    with writing_into(path):
        _refuse_existing(path)  # made by another run, since it was looked for
        _write(path / CA_KEY_FILE, _key_pem(key), 0o600)
        _write(path / CA_FILE, certificate.public_bytes(Encoding.PEM), 0o644)


def _refuse_existing(path: Path) -> None:
    for file in (CA_FILE, CA_KEY_FILE):
        if (path / file).exists():
            raise LocalError(
                f"{path / file}: exists already; a CA is never overwritten, use another directory or remove it yourself"
            )


def issue(
    ca_directory: Path | str,
    role: PeerRole | str,
    name: str,
    out: Path | str,
    days: int = LEAF_DAYS,
    *,
    now: dt.datetime | None = None,
) -> None:
    """Issue a cluster certificate: writes `ca.pem`, `cert.pem` and `key.pem` to the directory `out`.

    `name` is for people (common name). An older certificate there is replaced. Raises `LocalError` for an unknown
    role, a CA that is not the cluster's, a certificate that would outlive its CA, and files that cannot be used.
    """
    try:
        role = PeerRole(role)
    except ValueError:
        raise LocalError(f"unknown role {role!r}; use one of {', '.join(r.value for r in PeerRole)}") from None
    san: list[x509.GeneralName] = [x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role.value)]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    ca_path, path = Path(ca_directory), Path(out)
    if path.resolve() == ca_path.resolve():
        raise LocalError(f"{path}: is the CA's directory; give the certificate its own, for --cluster-tls")
    ca, certificate, key = _sign(ca_path, CaKind.CLUSTER, name, san, usages, days, now)
    make_directory(path)
    with writing_into(path):  # two at once would leave one's key beside the other's certificate
        _write(path / KEY_FILE, _key_pem(key), 0o600)
        _write(path / CERT_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
        _write(path / CA_FILE, ca.public_bytes(Encoding.PEM), 0o644)


def issue_edge(
    ca_directory: Path | str,
    hosts: Sequence[str],
    out_cert: Path | str,
    out_key: Path | str,
    days: int = LEAF_DAYS,
    *,
    now: dt.datetime | None = None,
) -> None:
    """Issue a certificate for the load balancers' edge, for DNS names and IP addresses `hosts` (at least one).

    Raises `LocalError` as `issue` does; the CA must be the edge's.
    """
    if not hosts:
        raise LocalError("an edge certificate needs at least one host name or address")
    san = [_host_name(host) for host in hosts]
    _, certificate, key = _sign(
        Path(ca_directory), CaKind.EDGE, hosts[0], san, [ExtendedKeyUsageOID.SERVER_AUTH], days, now
    )
    for path in (Path(out_key), Path(out_cert)):
        make_directory(path.parent)
    _write(Path(out_key), _key_pem(key), 0o600)
    _write(Path(out_cert), certificate.public_bytes(Encoding.PEM), 0o644)


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass  # then it is a name
    try:
        return x509.DNSName(parse_host(host))
    except ValueError as error:
        raise LocalError(str(error)) from None


def _sign(
    ca_path: Path,
    kind: CaKind,
    name: str,
    san: list[x509.GeneralName],
    usages: list[x509.ObjectIdentifier],
    days: int,
    now: dt.datetime | None,
) -> tuple[x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    ca, ca_key = _read_ca(ca_path, kind)
    if days < 1:
        raise LocalError(f"a certificate of {days} days is never valid; use at least 1")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:NAME_CHARS_MAX] or kind.value)])
    authority = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    end = (now or _now()) + dt.timedelta(days=days)
    if end > ca.not_valid_after_utc:
        raise LocalError(
            f"{ca_path / CA_FILE}: ends on {ca.not_valid_after_utc:%Y-%m-%d}, before {days} days are over; "
            "use fewer days or a new CA"
        )
    certificate = (
        _builder(subject, ca.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(san), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return ca, certificate, key


def _read_ca(path: Path, kind: CaKind) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    fix = "make one with `juicebox-hsm cluster ca init --dir DIR`"
    try:
        certificate = x509.load_pem_x509_certificate((path / CA_FILE).read_bytes())
        key = load_pem_private_key((path / CA_KEY_FILE).read_bytes(), password=None)
    except OSError as error:
        raise LocalError(f"{error.filename}: {error.strerror}; {fix}") from None
    except (ValueError, TypeError):
        raise LocalError(f"{path}: {CA_FILE} or {CA_KEY_FILE} is not PEM; {fix}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise LocalError(f"{path / CA_KEY_FILE}: does not match {CA_FILE}; {fix}")
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not common or common[0].value != kind.value:
        found = common[0].value if common else "(none)"
        raise LocalError(f"{path / CA_FILE}: is {found!r}, not {kind.value!r}; cluster and edge have different CAs")
    return certificate, key


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: dt.datetime | None,
    days: int,
) -> x509.CertificateBuilder:
    start = now or _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATE)
        .not_valid_after(start + dt.timedelta(days=days))
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_directory(path: Path) -> None:
    """Make a directory that only we may enter, unless it exists. Raises `LocalError`."""
    try:
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise LocalError(f"{path}: cannot make the directory: {error.strerror}") from None


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole, or not at all; it never exists with wider permissions than `mode`."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise LocalError(f"{path}: cannot be written: {error.strerror}") from None
