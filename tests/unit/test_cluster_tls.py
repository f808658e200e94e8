"""Cluster identity: who is let in, who is not, and that a reload changes everything or nothing."""

from __future__ import annotations

import datetime as dt
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls, PeerIdentity, peer_identity
from juicebox_hsm.errors import LocalError, PeerError
from juicebox_hsm.wire.rpc import PeerRole
from tests.patience import HANGS_S


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a cluster CA."""
    path = tmp_path_factory.mktemp("cluster") / "ca"
    init_ca(path)
    return path


@pytest.fixture
def agent(ca: Path, tmp_path: Path) -> Path:
    """Return the directory of an agent's certificate."""
    issue(ca, "agent", "a1", tmp_path / "agent")
    return tmp_path / "agent"


def leaf_with(ca: Path, out: Path, *names: str) -> None:
    """Issue a certificate whose URI SANs are `names`, as the CA's own tool never would."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca_certificate = x509.load_pem_x509_certificate((ca / "ca.pem").read_bytes())
    ca_key = load_pem_private_key((ca / "ca-key.pem").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca_certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    if names:
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=True)
    out.mkdir()
    (out / "cert.pem").write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (out / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    shutil.copy(ca / "ca.pem", out)


async def handshake(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> tuple[PeerIdentity | Exception, PeerIdentity | Exception]:
    """Shake hands over memory; return whom the server and the client saw, or why not."""
    results: dict[str, PeerIdentity | Exception] = {}
    ours, theirs = trio.testing.memory_stream_pair()

    async def side(name: str, stream: trio.SSLStream[Any]) -> None:
        try:
            await stream.do_handshake()
            # In TLS 1.3 a client learns only with the first byte whether the server took its certificate.
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
            results[name] = peer_identity(stream)
        except (trio.BrokenResourceError, ssl.SSLError, PeerError, AssertionError) as error:
            results[name] = error
            await trio.aclose_forcefully(stream)

    with trio.fail_after(HANGS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "server", trio.SSLStream(theirs, server_context, server_side=True))
            nursery.start_soon(side, "client", trio.SSLStream(ours, client_context))
    return results["server"], results["client"]


async def test_both_sides_learn_role_and_name(ca: Path, agent: Path, tmp_path: Path) -> None:
    """Certificates of one CA are let in, and each side knows the other's role."""
    issue(ca, "lb", "balancer 1", tmp_path / "lb")
    server, client = await handshake(
        ClusterTls.load(agent).server_context, ClusterTls.load(tmp_path / "lb").client_context
    )
    assert server == PeerIdentity(PeerRole.LOAD_BALANCER, "balancer 1")
    assert client == PeerIdentity(PeerRole.AGENT, "a1")


async def test_other_ca_is_refused_by_both_sides(agent: Path, tmp_path: Path) -> None:
    """A certificate of another CA, with the same CA name, is worth nothing in either direction."""
    init_ca(tmp_path / "ca2")
    issue(tmp_path / "ca2", "agent", "intruder", tmp_path / "intruder")
    good, bad = ClusterTls.load(agent), ClusterTls.load(tmp_path / "intruder")
    for server, client in ((good, bad), (bad, good)):
        seen = await handshake(server.server_context, client.client_context)
        assert all(isinstance(result, Exception) for result in seen)


async def test_client_without_certificate_is_refused(ca: Path, agent: Path) -> None:
    """TLS alone lets nobody in."""
    plain = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    plain.check_hostname = False
    server, _ = await handshake(ClusterTls.load(agent).server_context, plain)
    assert isinstance(server, trio.BrokenResourceError)
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in str(server.__cause__)


async def test_edge_certificate_is_refused(agent: Path, tmp_path: Path) -> None:
    """A client's trust anchor admits nobody inside: the edge's certificates are no cluster certificates."""
    init_ca(tmp_path / "edge", kind=CaKind.EDGE)
    issue_edge(tmp_path / "edge", ["localhost"], tmp_path / "cert.pem", tmp_path / "key.pem")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server, _ = await handshake(ClusterTls.load(agent).server_context, context)
    assert isinstance(server, Exception)


async def test_expired_peer_is_refused(ca: Path, agent: Path, tmp_path: Path) -> None:
    """A certificate is worth nothing after its end."""
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=100)
    issue(ca, "agent", "old", tmp_path / "old", now=past)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca / "ca.pem")
    context.load_cert_chain(tmp_path / "old" / "cert.pem", tmp_path / "old" / "key.pem")
    server, _ = await handshake(ClusterTls.load(agent).server_context, context)
    assert isinstance(server, Exception)
    assert "expired" in str(server.__cause__)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "names 0 roles"),
        (("https://example.org",), "names 0 roles"),
        (("juicebox:role:agent", "juicebox:role:manager"), "names 2 roles"),
        (("juicebox:role:agent", "juicebox:role:agent"), "names 2 roles"),
        (("juicebox:role:root",), "unknown role 'root'"),
        (("juicebox:role:",), "unknown role ''"),
    ],
)
async def test_certificate_must_name_one_role(
    ca: Path, agent: Path, tmp_path: Path, names: tuple[str, ...], reason: str
) -> None:
    """A certificate of our CA with no role, two or an unknown one is refused by peers and at start."""
    leaf_with(ca, tmp_path / "odd", *names)
    context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "odd" / "cert.pem", tmp_path / "odd" / "key.pem")
    server, _ = await handshake(ClusterTls.load(agent).server_context, context)
    assert isinstance(server, PeerError)
    assert reason in str(server)
    with pytest.raises(LocalError, match=reason):
        ClusterTls.load(tmp_path / "odd")


async def test_only_tls_1_3(ca: Path, agent: Path) -> None:
    """Older versions are not spoken inside the cluster."""
    context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    context.check_hostname = False
    context.load_cert_chain(agent / "cert.pem", agent / "key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    seen = await handshake(ClusterTls.load(agent).server_context, context)
    assert all(isinstance(result, Exception) for result in seen)


P256_OID = bytes.fromhex("06082a8648ce3d030107")


def _other_key(agent: Path, ca: Path) -> None:
    issue(ca, "agent", "x", agent.parent / "x")
    shutil.copy(agent.parent / "x" / "key.pem", agent / "key.pem")


def _other_ca(agent: Path, _ca: Path) -> None:
    init_ca(agent.parent / "ca2")
    shutil.copy(agent.parent / "ca2" / "ca.pem", agent / "ca.pem")


def _expired(agent: Path, ca: Path) -> None:
    issue(ca, "agent", "x", agent, now=dt.datetime.now(dt.UTC) - dt.timedelta(days=91))


def _early(agent: Path, ca: Path) -> None:
    issue(ca, "agent", "x", agent, now=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))


def _encrypted(agent: Path, _ca: Path) -> None:
    (agent / "key.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")


def _unknown_curve(agent: Path, _ca: Path) -> None:
    path = agent / "cert.pem"
    der = ssl.PEM_cert_to_DER_cert(path.read_text())
    path.write_text(ssl.DER_cert_to_PEM_cert(der.replace(P256_OID, P256_OID[:-1] + b"\x7f")))


MISTAKES: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda agent, _: (agent / "ca.pem").unlink(), "ca.pem: No such file"),
    (lambda agent, _: (agent / "cert.pem").unlink(), "cert.pem: No such file"),
    (lambda agent, _: (agent / "key.pem").unlink(), "key.pem: No such file"),
    (lambda agent, _: (agent / "ca.pem").write_text("x"), "ca.pem: not a PEM certificate"),
    (lambda agent, _: (agent / "cert.pem").write_text("x"), "cert.pem: not a PEM certificate"),
    (lambda agent, _: (agent / "key.pem").write_text("x"), "key.pem: not an unencrypted PEM private key"),
    (lambda agent, _: (agent / "key.pem").write_bytes(bytes((1 << 20) + 1)), "key.pem: larger than"),
    (_encrypted, "key.pem: not an unencrypted PEM private key"),
    (_unknown_curve, "cannot be used"),
    (_other_key, "cert.pem: key.pem does not match"),
    (_other_ca, "cert.pem: not issued by a CA in ca.pem"),
    (_expired, "cert.pem: valid from"),
    (_early, "cert.pem: valid from"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes(ca: Path, agent: Path, mistake: Callable[[Path, Path], object], message: str) -> None:
    """A directory that does not hold together is refused in one line that names file, fault and remedy.

    The same at a reload, which then leaves everything as it was.
    """
    tls = ClusterTls.load(agent)
    before = (tls.identity, tls.not_after, tls.server_context, tls.client_context)
    mistake(agent, ca)
    for act in (tls.reload, lambda: ClusterTls.load(agent)):
        with pytest.raises(LocalError, match=message) as caught:
            act()
        assert str(agent) in str(caught.value)
        assert "juicebox-hsm cluster ca issue" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == (tls.identity, tls.not_after, tls.server_context, tls.client_context)


async def test_reload_takes_effect(ca: Path, agent: Path) -> None:
    """After a reload new handshakes use the new certificate."""
    tls = ClusterTls.load(agent)
    issue(ca, "agent", "renewed", agent, days=200)
    before = tls.not_after
    tls.reload()
    assert tls.not_after > before
    _, client = await handshake(tls.server_context, tls.client_context)
    assert client == PeerIdentity(PeerRole.AGENT, "renewed")


def test_reload_keeps_the_role(ca: Path, agent: Path) -> None:
    """A running agent does not become a manager because somebody put another certificate there."""
    tls = ClusterTls.load(agent)
    issue(ca, "manager", "m", agent)
    with pytest.raises(LocalError, match="is for role manager, this process runs as agent"):
        tls.reload()
    assert tls.identity == PeerIdentity(PeerRole.AGENT, "a1")


async def test_rotation_of_the_ca(ca: Path, agent: Path, tmp_path: Path) -> None:
    """While a CA is replaced, `ca.pem` holds both, and certificates of both are let in."""
    init_ca(tmp_path / "new-ca")
    issue(tmp_path / "new-ca", "agent", "new", tmp_path / "new")
    both = (ca / "ca.pem").read_bytes() + (tmp_path / "new-ca" / "ca.pem").read_bytes()
    for directory in (agent, tmp_path / "new"):
        (directory / "ca.pem").write_bytes(both)
    old, new = ClusterTls.load(agent), ClusterTls.load(tmp_path / "new")
    assert all(isinstance(seen, PeerIdentity) for seen in await handshake(old.server_context, new.client_context))
