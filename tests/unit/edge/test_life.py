"""TLS identity, drain, eviction and survival of the edge (load-balancer.md 2 to 4)."""

from __future__ import annotations

import datetime as dt
import errno
import gc
import shutil
import ssl
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from juicebox_hsm.adapters.edge.connection import Connection, ConnectionTable
from juicebox_hsm.adapters.edge.exchange import Request, Response
from juicebox_hsm.adapters.edge.h1 import H1Session
from juicebox_hsm.adapters.edge.h2 import H2Session
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.edge.server import open_edge_listener
from juicebox_hsm.adapters.edge.tls import EdgeTls, load_edge_context
from juicebox_hsm.adapters.tls.streams import TlsStream
from juicebox_hsm.errors import LocalError
from tests.patience import HANGS_S
from tests.unit.edge.harness import (
    EdgeFixture,
    H1Client,
    H2Client,
    Identity,
    MemoryStream,
    make_identity,
    patience,
    until_hangup,
)

# --- certificates ---


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_key_forms(identity: Identity, tmp_path: Path, form: PrivateFormat) -> None:
    """PKCS#8 and SEC1 keys are accepted, SEC1 also behind an EC PARAMETERS block."""
    key = load_pem_private_key(identity.key.read_bytes(), None)
    pem = key.private_bytes(Encoding.PEM, form, NoEncryption())
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    for index, content in enumerate((pem, parameters + pem)):
        path = tmp_path / f"{index}.key"
        path.write_bytes(content)
        _, leaf = load_edge_context(path, identity.cert)
        assert leaf.remaining_days(dt.datetime(2000, 1, 1, tzinfo=dt.UTC)) > 365


def test_pkcs1_key(tmp_path: Path) -> None:
    """A PKCS#1 RSA key is understood: the complaint about a foreign one is that it does not match."""
    made = make_identity(tmp_path)
    key = rsa.generate_private_key(65537, 2048)
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    with pytest.raises(LocalError, match="does not match"):
        load_edge_context(made.key, made.cert)


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        ("key", None, "cannot read TLS key file"),
        ("key", b"", "is empty; it may be being written"),
        ("key", b"junk", "no PEM private key"),
        ("key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is not a PKCS#8"),
        ("cert", None, "cannot read TLS certificate file"),
        ("cert", b"junk", "TLS certificate file"),
        ("cert", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "does not parse"),
        ("key", b"x" * (1 << 20) + b"xx", "larger than"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, which: str, content: bytes | None, message: str) -> None:
    """A missing, empty, huge or malformed file is refused with its name."""
    made = make_identity(tmp_path)
    path = made.key if which == "key" else made.cert
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(LocalError, match=message) as caught:
        EdgeTls(made.key, made.cert)
    assert str(path) in str(caught.value)


def test_certificate_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """A certificate that parses and whose key does not is a refused reload, not an end of the process."""
    made = make_identity(tmp_path)
    tls = EdgeTls(made.key, made.cert)
    before = (tls.context, tls.leaf)
    der = ssl.PEM_cert_to_DER_cert(made.cert.read_text())
    curve = bytes.fromhex("06082a8648ce3d030107")
    assert curve in der
    made.cert.write_text(ssl.DER_cert_to_PEM_cert(der.replace(curve, curve[:-1] + b"\x7f")))
    with pytest.raises(LocalError, match="cannot be used") as caught:
        tls.reload()
    assert str(made.cert) in str(caught.value)
    assert (tls.context, tls.leaf) == before


def test_encrypted_key_is_refused_without_asking(tmp_path: Path) -> None:
    """An encrypted key is a clear error, not a prompt on the terminal."""
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    made = make_identity(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pw")))
    with pytest.raises(LocalError, match="encrypted"):
        EdgeTls(made.key, made.cert)


async def _serial(edge: EdgeFixture, ca_of: Identity) -> int:
    raw = edge.dial()
    stream = trio.SSLStream(raw, ca_of.client_context(), server_hostname="localhost", https_compatible=True)
    await stream.do_handshake()
    certificate = stream.getpeercert()
    await trio.aclose_forcefully(raw)
    return int(certificate["serialNumber"], 16)


@pytest.mark.parametrize("days", [(-30, -1), (1, 30)], ids=["ended", "not yet valid"])
def test_no_reload_takes_service_away(tmp_path: Path, days: tuple[int, int]) -> None:
    """A certificate that no client would accept never replaces one that they do; what is no better may be replaced."""
    good, bad = make_identity(tmp_path / "good"), make_identity(tmp_path / "bad", valid_days=days)
    tls = EdgeTls(good.key, good.cert)
    before = (tls.context, tls.leaf)
    for source, target in ((bad.key, good.key), (bad.cert, good.cert)):
        target.write_bytes(source.read_bytes())
    with pytest.raises(LocalError, match=r"valid from .* only, and the one in service is valid now") as caught:
        tls.reload()
    assert str(good.cert) in str(caught.value)
    assert (tls.context, tls.leaf) == before
    worse = EdgeTls(bad.key, bad.cert)
    assert worse.reload().serial == worse.leaf.serial


async def test_a_server_with_one_context_follows_reloads(tmp_path: Path) -> None:
    """A context given away once shows each client what is in service by then, with and without a name asked for."""
    first, second = make_identity(tmp_path / "1"), make_identity(tmp_path / "2")
    tls = EdgeTls(first.key, first.cert)
    context = tls.following_context()
    for identity in (first, second):
        first.key.write_bytes(identity.key.read_bytes())
        first.cert.write_bytes(identity.cert.read_bytes())
        tls.reload()
        for name in ("localhost", None):
            ours, theirs = trio.testing.memory_stream_pair()
            client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
            server = trio.SSLStream(ours, context, server_side=True)
            client = trio.SSLStream(theirs, client_context, server_hostname=name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                nursery.start_soon(client.do_handshake)
            shown = client.getpeercert(binary_form=True)
            assert shown == ssl.PEM_cert_to_DER_cert(identity.cert.read_text())


async def test_reload_swaps_for_new_connections_only(tmp_path: Path, nursery: trio.Nursery) -> None:
    """After a reload new connections see the new certificate; an idle and a busy one opened before go on."""
    release = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/wait":
            await release.wait()
        return Response(200, b"ok")

    old, new = make_identity(tmp_path, "a"), make_identity(tmp_path, "b")
    edge = EdgeFixture(old, nursery, handler)
    idle = H1Client(await edge.connect())
    assert (await idle.request("GET", "/")).status == 200
    busy = H1Client(await edge.connect())
    await busy.send(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
    first = await _serial(edge, old)
    assert await _serial(edge, old) == first
    shutil.copy(new.key, old.key)
    shutil.copy(new.cert, old.cert)
    edge.tls.reload()
    assert await _serial(edge, new) != first
    assert (await idle.request("GET", "/")).status == 200
    release.set()
    assert (await busy.answer()).body == b"ok"


@pytest.mark.parametrize("fault", ["garbage", "mismatch", "missing"])
async def test_bad_reload_changes_nothing(tmp_path: Path, nursery: trio.Nursery, fault: str) -> None:
    """A reload that does not verify leaves the old pair in service."""
    old, new = make_identity(tmp_path, "a"), make_identity(tmp_path, "b")
    edge = EdgeFixture(old, nursery)
    first = await _serial(edge, old)
    if fault == "garbage":
        old.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    elif fault == "mismatch":
        shutil.copy(new.cert, old.cert)
    else:
        old.key.unlink()
    with pytest.raises(LocalError):
        edge.tls.reload()
    assert await _serial(edge, old) == first


async def test_old_tls_is_refused(identity: Identity, nursery: trio.Nursery) -> None:
    """TLS 1.2 is served, older versions are not, and the failure is counted."""
    edge = EdgeFixture(identity, nursery)
    context = identity.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    stream = trio.SSLStream(edge.dial(), context, server_hostname="localhost")
    await stream.do_handshake()
    assert (await H1Client(stream).request("GET", "/")).status == 200
    raw = edge.dial()
    await raw.send_all(
        b"\x16\x03\x01\x00\x2a" + b"\x01\x00\x00\x26\x03\x01" + bytes(32) + b"\x00\x00\x02\x00\x2f\x01\x00"
    )
    await until_hangup(raw)
    assert edge.recorder.counts["load_balancer.connections.errors/tls"] == 1


# --- drain ---


async def test_drain_sequence(identity: Identity, nursery: trio.Nursery) -> None:
    """Notice serves on; drain refuses new connections, waits for the blocked request, and then is done at once."""
    release = trio.Event()
    blocking = trio.Event()
    drained = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/livez":
            return Response(200, edge.drain.phase.value.encode())
        blocking.set()
        await release.wait()
        return Response(200, b"in full")

    edge = EdgeFixture(identity, nursery, handler)
    listener = open_edge_listener("127.0.0.1", 0)
    port = listener.socket.getsockname()[1]

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        await edge.edge.serve([listener], task_status=task_status)
        drained.set()

    async def connect() -> H1Client:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        stream = trio.SSLStream(tcp, identity.client_context(), server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        return H1Client(stream)

    await nursery.start(serve)
    client = await connect()
    assert (await client.request("GET", "/livez")).body == b"live"
    edge.drain.begin_notice()
    assert edge.drain.phase.value == "notice"
    assert (await client.request("GET", "/livez")).body == b"notice"
    blocked = await connect()
    await blocked.send(b"GET /block HTTP/1.1\r\nhost: x\r\n\r\n")
    with patience():
        await blocking.wait()
    edge.drain.begin_drain()
    assert await client.closed()  # idle ones go at once
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream("127.0.0.1", port)
    assert not drained.is_set()
    release.set()
    answer = await blocked.answer()
    assert (answer.body, answer.headers["connection"]) == (b"in full", "close")
    with trio.fail_after(HANGS_S):
        await drained.wait()
    for each in (client, blocked):
        await each.stream.aclose()
    edge.drain.mark_stopped()
    assert edge.drain.phase.value == "stopped"


async def test_drain_of_h2(identity: Identity, nursery: trio.Nursery) -> None:
    """On drain an HTTP/2 connection gets GOAWAY, its open stream is answered, and then it ends."""
    release = trio.Event()
    started = trio.Event()

    async def handler(request: Request) -> Response:
        started.set()
        await release.wait()
        return Response(200, b"in full")

    edge = EdgeFixture(identity, nursery, handler)
    await edge.start()
    client = H2Client(await edge.connect("h2"))
    idle = H2Client(await edge.connect("h2"))
    await client.start()
    await idle.start()
    await client.begin("GET", "/")
    with patience():
        await started.wait()
    edge.drain.begin_drain()
    await idle.until_hangup()
    await trio.testing.wait_all_tasks_blocked()
    assert edge.drain.connections == 1
    release.set()
    received = await until_hangup(client.stream)  # raw: the client library stops understanding after GOAWAY
    await trio.testing.wait_all_tasks_blocked()
    assert b"in full" in received
    assert edge.drain.connections == 0


# --- limits ---


class _Listener(trio.abc.Listener[trio.abc.Stream]):
    """Hands out memory streams; raises the errors it is given first."""

    def __init__(self, errors: list[OSError]) -> None:
        self.errors = errors
        self.send, self.receive = trio.open_memory_channel[trio.abc.Stream](0)
        self.accepted = 0

    async def accept(self) -> trio.abc.Stream:
        if self.errors:
            await trio.lowlevel.checkpoint()
            raise self.errors.pop()
        stream = await self.receive.receive()
        self.accepted += 1
        return stream

    async def aclose(self) -> None:
        self.receive.close()

    async def dial(self) -> MemoryStream:
        client, server = trio.testing.memory_stream_pair()
        await self.send.send(server)
        return client


async def test_accept_errors_are_survived(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """Running out of files is logged and waited out; an aborted connection is passed over."""
    edge = EdgeFixture(identity, nursery)
    listener = _Listener([OSError(errno.EMFILE, "too many open files"), OSError(errno.ECONNABORTED, "gone")])
    await nursery.start(edge.edge.serve, [listener])
    raw = await listener.dial()
    stream = trio.SSLStream(raw, identity.client_context(), server_hostname="localhost")
    assert (await H1Client(stream).request("GET", "/")).status == 200
    assert edge.recorder.lines == [("warning", "cannot accept a connection")]


async def test_idle_crowd_is_evicted(identity: Identity, nursery: trio.Nursery, autojump_clock: object) -> None:
    """At the cap the connection idle longest makes room; one that is being served never does."""
    release = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/wait":
            await release.wait()
        return Response(200)

    edge = EdgeFixture(identity, nursery, handler, EdgeLimits(connections_max=3))
    listener = _Listener([])
    await nursery.start(edge.edge.serve, [listener])

    async def connect() -> H1Client:
        raw = await listener.dial()
        stream = trio.SSLStream(raw, identity.client_context(), server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        return H1Client(stream)

    busy = await connect()
    await busy.send(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
    oldest = await connect()
    await trio.sleep(0.5)
    younger = await connect()
    assert (await oldest.request("GET", "/")).status == 200  # now `younger` is idle longest
    await trio.sleep(0.4)
    began = trio.current_time()
    newcomer = await connect()
    assert trio.current_time() - began < 1.5
    assert (await newcomer.request("GET", "/")).status == 200
    assert await younger.closed()
    assert (await oldest.request("GET", "/")).status == 200
    assert edge.recorder.counts["load_balancer.connections.evicted"] >= 1
    release.set()
    assert (await busy.answer()).status == 200


def test_who_is_evicted() -> None:
    """The one idle longest goes, never one idle for less than a second, one that is busy, or one that already ends."""

    async def main() -> None:
        table = ConnectionTable()
        first, second, third = (table.add(now, 10.0) for now in (0.0, 0.1, 0.2))
        third.set_busy()
        assert not table.evict(0.99)
        first.set_idle(5.0)  # its handshake is over; now the second is idle longest
        assert table.evict(5.5)
        assert second.scope.cancel_called
        assert not table.evict(5.9)
        assert table.evict(6.0)
        assert first.scope.cancel_called
        assert not table.evict(99.0)
        assert not third.scope.cancel_called

    trio.run(main)


async def test_silent_handshakes_can_be_evicted(
    identity: Identity, nursery: trio.Nursery, autojump_clock: object
) -> None:
    """Connections that never begin TLS do not lock out honest clients for their whole time-out."""
    edge = EdgeFixture(identity, nursery, limits=EdgeLimits(connections_max=2))
    listener = _Listener([])
    await nursery.start(edge.edge.serve, [listener])
    silent = [await listener.dial(), await listener.dial()]
    began = trio.current_time()
    stream = trio.SSLStream(await listener.dial(), identity.client_context(), server_hostname="localhost")
    assert (await H1Client(stream).request("GET", "/")).status == 200
    assert trio.current_time() - began <= 2
    assert await until_hangup(silent[0]) == b""


def test_listener_in_use_is_a_clear_error() -> None:
    """An address in use is refused with the address."""

    async def main() -> None:
        listener = open_edge_listener("127.0.0.1", 0)
        port = listener.socket.getsockname()[1]
        with pytest.raises(LocalError, match=f"127.0.0.1:{port}"):
            open_edge_listener("127.0.0.1", port)
        await listener.aclose()

    trio.run(main)


@pytest.mark.parametrize("end", ["client", "idle", "handshake"])
@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
async def test_nothing_of_a_connection_waits_for_the_collector(
    identity: Identity, nursery: trio.Nursery, autojump_clock: object, protocol: str, end: str
) -> None:
    """What a connection held goes with it: cycles would pile up until the collector, which services run seldom."""
    edge = EdgeFixture(identity, nursery, limits=EdgeLimits(handshake_timeout_s=2.0, idle_timeout_s=2.0))
    await edge.start()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            if end == "handshake":
                edge.dial()
                continue
            stream = await edge.connect(protocol)
            if end == "client":
                await trio.aclose_forcefully(stream)
        await trio.sleep(20)
        assert edge.drain.connections == 0
        kinds = (Connection, H1Session, H2Session, TlsStream)
        assert [type(each) for each in gc.get_objects() if isinstance(each, kinds)] == []
    finally:
        gc.enable()
