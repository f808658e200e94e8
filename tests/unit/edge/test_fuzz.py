"""Random bytes at the edge: a documented status or a closed connection, never a defect (decision record: outsiders)."""

from __future__ import annotations

import re

import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from tests.unit.edge.harness import EdgeFixture, Identity, until_hangup

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_DOCUMENTED = {b"100", b"200", b"400", b"413", b"431"}

_H1_PIECES = st.sampled_from(
    [
        b"POST /req HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\n",
        b"host: x\r\n",
        b"content-length: 5\r\n",
        b"content-length: 99999\r\n",
        b"transfer-encoding: chunked\r\n",
        b"expect: 100-continue\r\n",
        b"connection: close\r\n",
        b"upgrade: h2c\r\n",
        b"\r\n",
        b"5\r\nabcde\r\n",
        b"0\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)
_H1_INPUT = st.lists(st.one_of(_H1_PIECES, st.binary(max_size=60)), max_size=12).map(b"".join)


def _h2_frames() -> st.SearchStrategy[bytes]:
    connection = H2Connection(H2Configuration(client_side=True))
    connection.initiate_connection()
    connection.data_to_send()
    connection.send_headers(1, [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "x")])
    good = connection.data_to_send()
    frame = st.builds(
        lambda kind, flags, stream, body: (
            len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
        ),
        st.integers(0, 12),
        st.integers(0, 255),
        st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1]),
        st.binary(max_size=40),
    )
    return st.lists(st.one_of(frame, st.just(good), st.binary(max_size=20)), max_size=10).map(b"".join)


async def _exchange(identity: Identity, data: bytes, cuts: list[int], *protocols: str) -> tuple[bytes, EdgeFixture]:
    """Send `data` in pieces, hang up for writing, and return everything that came back."""
    received = b""
    async with trio.open_nursery() as nursery:
        edge = EdgeFixture(identity, nursery)
        stream = await edge.connect(*protocols)

        async def read() -> None:
            nonlocal received
            received = await until_hangup(stream)

        nursery.start_soon(read)
        start = 0
        try:
            for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
                if end > start:
                    await stream.send_all(data[start:end])
                    await trio.testing.wait_all_tasks_blocked()
                start = max(start, end)
            await trio.testing.wait_all_tasks_blocked()
            await stream.transport_stream.send_stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await trio.testing.wait_all_tasks_blocked()
        assert edge.drain.connections == 0
        nursery.cancel_scope.cancel()
    return received, edge


@given(data=_H1_INPUT, cuts=st.lists(st.integers(0, 1000), max_size=3))
@examples(70)
def test_random_bytes_over_h1(identity: Identity, data: bytes, cuts: list[int]) -> None:
    """Whatever bytes arrive in whatever pieces, answers are whole and documented and the connection ends cleanly."""
    received, edge = trio.run(_exchange, identity, data, cuts, "http/1.1")
    assert edge.recorder.errors == []
    assert set(_STATUS_LINE.findall(received)) <= _DOCUMENTED
    assert not received or received.startswith(b"HTTP/1.1 ")


@given(data=_h2_frames(), cuts=st.lists(st.integers(0, 1000), max_size=3))
@examples(70)
def test_random_frames_over_h2(identity: Identity, data: bytes, cuts: list[int]) -> None:
    """Whatever frames arrive after a good preface, nothing unexpected is raised and the connection ends."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    _, edge = trio.run(_exchange, identity, preface + data, cuts, "h2")
    assert edge.recorder.errors == []


@given(data=st.binary(max_size=200))
def test_random_bytes_instead_of_tls(identity: Identity, data: bytes) -> None:
    """Bytes that are not TLS end that connection only."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            edge = EdgeFixture(identity, nursery)
            raw = edge.dial()
            await raw.send_all(data)
            await raw.send_stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert edge.drain.connections == 0
            assert edge.recorder.errors == []
            nursery.cancel_scope.cancel()

    trio.run(main)
