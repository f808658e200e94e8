"""The two CAs: what they sign, what they refuse, and how their files lie on disk."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire.rpc import PeerRole


def read(path: Path) -> x509.Certificate:
    """Parse one PEM certificate."""
    return x509.load_pem_x509_certificate(path.read_bytes())


def mode(path: Path) -> int:
    """Return the permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """Return the directory of a fresh cluster CA."""
    init_ca(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def edge_ca(tmp_path: Path) -> Path:
    """Return the directory of a fresh edge CA."""
    init_ca(tmp_path / "edge-ca", kind=CaKind.EDGE)
    return tmp_path / "edge-ca"


def test_ca(ca: Path) -> None:
    """A CA lives 10 years, signs only leaves, and keeps its key to its owner."""
    certificate = read(ca / "ca.pem")
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert (certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)).days in {3649, 3650}
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert mode(ca) == 0o700
    assert mode(ca / "ca-key.pem") == 0o600
    assert sorted(path.name for path in ca.iterdir()) == ["ca-key.pem", "ca.pem"]


@pytest.mark.parametrize("left", ["ca.pem", "ca-key.pem"])
def test_ca_is_never_overwritten(ca: Path, left: str) -> None:
    """Neither file of an existing CA is replaced, even when the other is gone: it would orphan every certificate."""
    for path in ca.iterdir():
        if path.name != left:
            path.unlink()
    before = (ca / left).read_bytes()
    with pytest.raises(LocalError, match=f"{left}: exists already"):
        init_ca(ca)
    assert (ca / left).read_bytes() == before


@pytest.mark.parametrize("role", list(PeerRole))
def test_issue(ca: Path, tmp_path: Path, role: PeerRole) -> None:
    """A cluster certificate names exactly its role, is good for both ends, and lives 90 days."""
    out = tmp_path / "new" / "out"
    issue(ca, role, "a1", out)
    leaf = read(out / "cert.pem")
    leaf.verify_directly_issued_by(read(out / "ca.pem"))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"juicebox:role:{role.value}")]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.subject.rfc4514_string() == "CN=a1"
    assert (leaf.not_valid_after_utc - dt.datetime.now(dt.UTC)).days in {89, 90}
    assert mode(out) == 0o700
    assert mode(out / "key.pem") == 0o600
    assert sorted(path.name for path in out.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_issue_again_replaces(ca: Path, tmp_path: Path) -> None:
    """A certificate is renewed in place, with a new key and serial number."""
    out = tmp_path / "out"
    issue(ca, "agent", "a1", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    issue(ca, "agent", "a1", out, days=5)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before["ca.pem"] == after["ca.pem"]
    assert before["cert.pem"] != after["cert.pem"]
    assert before["key.pem"] != after["key.pem"]


def test_issue_edge(edge_ca: Path, tmp_path: Path) -> None:
    """An edge certificate names hosts and addresses, is good for servers only, and names no role."""
    issue_edge(edge_ca, ["lb.example.org", "127.0.0.1", "::1"], tmp_path / "cert.pem", tmp_path / "key.pem", 30)
    leaf = read(tmp_path / "cert.pem")
    leaf.verify_directly_issued_by(read(edge_ca / "ca.pem"))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["lb.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == []
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert mode(tmp_path / "key.pem") == 0o600


def test_the_two_cas_do_not_mix(ca: Path, edge_ca: Path, tmp_path: Path) -> None:
    """The edge's CA signs no roles and the cluster's no hosts: a client's trust anchor must admit nobody inside."""
    with pytest.raises(LocalError, match="different CAs"):
        issue(edge_ca, "agent", "a", tmp_path / "out")
    with pytest.raises(LocalError, match="different CAs"):
        issue_edge(ca, ["localhost"], tmp_path / "cert.pem", tmp_path / "key.pem")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cert.pem").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "root"}, "unknown role 'root'; use one of agent, lb, manager, operator"),
        ({"days": 0}, "never valid"),
        ({"days": 4000}, "use fewer days or a new CA"),
        ({"ca_directory": "missing"}, "ca.pem: No such file or directory; make one with"),
        ({"out": "ca"}, "is the CA's directory"),
        ({"out": "file"}, "cannot make the directory"),
    ],
)
def test_issue_refuses(ca: Path, tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    """Mistakes are one line that says which file or value, and what to do; nothing is written."""
    (tmp_path / "file").write_text("")
    given: dict[str, object] = {"ca_directory": "ca", "role": "agent", "name": "a", "out": "out", "days": 90}
    given |= arguments
    given["ca_directory"] = tmp_path / str(given["ca_directory"])
    given["out"] = tmp_path / str(given["out"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LocalError, match=message) as caught:
        issue(**given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_ca_key_of_another_ca_is_refused(ca: Path, tmp_path: Path) -> None:
    """A CA whose files do not belong together signs nothing."""
    init_ca(tmp_path / "other")
    (ca / "ca-key.pem").write_bytes((tmp_path / "other" / "ca-key.pem").read_bytes())
    with pytest.raises(LocalError, match=r"ca-key.pem: does not match"):
        issue(ca, "agent", "a", tmp_path / "out")
    (ca / "ca-key.pem").write_bytes(b"junk")
    with pytest.raises(LocalError, match="is not PEM"):
        issue(ca, "agent", "a", tmp_path / "out")


@pytest.mark.parametrize("hosts", [[], ["a..b"], ["x" * 64 + ".org"]])
def test_bad_hosts_are_refused(edge_ca: Path, tmp_path: Path, hosts: list[str]) -> None:
    """An edge certificate for nothing, or for what is no host name, is not made."""
    with pytest.raises(LocalError, match="host name"):
        issue_edge(edge_ca, hosts, tmp_path / "cert.pem", tmp_path / "key.pem")
