"""The frame codec: exact bytes, any chunking, and a documented error for everything else."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS
from juicebox_hsm.wire.rpc import FRAME_BYTES_MAX, GroupCall, RpcCode

HELLO = frames.encode_hello("b")
METHODS = list(AGENT_METHODS.values()) + list(MANAGER_METHODS.values())


def framed(payload: bytes) -> bytes:
    """Put a length before `payload`."""
    return len(payload).to_bytes(4, "big") + payload


def greeted() -> frames.FrameReader:
    """Return a reader that has seen a hello."""
    reader = frames.FrameReader()
    assert reader.feed(HELLO) == []
    return reader


def test_bytes_on_the_wire() -> None:
    """Frames are the arrays of agent.md 2, byte for byte: another implementation must be able to speak to us."""
    assert frames.encode_hello("b").hex() == "0000000a" + "93a568656c6c6f01a162"
    call = GroupCall(b"r", b"g")
    assert frames.encode_request(5, "m", 250, None, call) == framed(
        b"\x96\x00\x05\xa1m\xcc\xfa\xc0" + msgspec.msgpack.encode(call)
    )
    assert frames.encode_request(5, "m", 1, "t", call)[4:11] == b"\x96\x00\x05\xa1m\x01\xa1"
    assert frames.encode_reply(5, call) == framed(b"\x93\x01\x05" + msgspec.msgpack.encode(call))
    assert frames.encode_failure(5, RpcCode.OVERLOADED) == framed(b"\x93\x02\x05\xaaOverloaded")
    assert framed(b"\x91\x03") == frames.PING
    assert framed(b"\x91\x04") == frames.PONG


@given(
    bodies=st.lists(st.binary(max_size=400), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 3000), max_size=20),
)
def test_any_chunking_gives_the_same_frames(bodies: list[bytes], cuts: list[int]) -> None:
    """Where the byte stream is cut makes no difference."""
    stream = HELLO + frames.PING
    for number, text in enumerate(bodies):
        stream += frames.encode_request(number, "m", 7, "trace", GroupCall(b"r", text))
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    reader = frames.FrameReader()
    got: list[frames.Frame] = []
    for start, end in pairwise(places):
        got += reader.feed(stream[start:end])
    assert got[0] == frames.Ping()
    decode = frames.BodyDecoder(GroupCall)
    requests = [frame for frame in got[1:] if isinstance(frame, frames.Request)]
    assert [(frame.id, frame.method, frame.timeout_ms, frame.trace) for frame in requests] == [
        (number, "m", 7, "trace") for number in range(len(bodies))
    ]
    assert [decode(frame.body).group for frame in requests] == bodies


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.booleans())
def test_garbage_is_an_error_or_frames(chunks: list[bytes], after_hello: bool) -> None:
    """Bytes of a hostile peer give frames or `FrameError`, nothing else, and never a large buffer."""
    reader = greeted() if after_hello else frames.FrameReader()
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except frames.FrameError:
        pass
    assert len(reader._partial) <= sum(map(len, chunks))


@given(st.binary(max_size=200))
def test_garbage_payload_is_an_error_or_a_frame(payload: bytes) -> None:
    """A well-framed payload of garbage is one frame or `FrameError`."""
    reader = greeted()
    try:
        got = reader.feed(framed(payload))
    except frames.FrameError:
        return
    assert len(got) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=8),
        max_leaves=20,
    ),
    st.sampled_from(METHODS),
)
def test_hostile_bodies_are_decoding_errors(value: object, method: object) -> None:
    """A body of the wrong shape is `DecodingError` for every method's request and reply."""
    raw = msgspec.Raw(msgspec.msgpack.encode(value))
    for body_type in (method.request, method.reply):  # type: ignore[attr-defined]
        with suppress(DecodingError):
            frames.BodyDecoder(body_type)(raw)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(4), "frame length 0"),
        ((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), f"frame length {FRAME_BYTES_MAX + 1}"),
        (b"\xff\xff\xff\xff", "frame length 4294967295"),
        (framed(b"\x91\x05"), "not a frame"),
        (framed(b"\x91\x03\x00"), "not a frame"),
        (framed(b"\x93\x00\x01" + b"\x91" * 200_000 + b"\x00"), "not a frame"),
        (framed(b"\x96\x00\x01\xa1m\x01\xc0\xdd\xff\xff\xff\xff"), "not a frame"),
        (framed(b"\x96\x00\xff\xa1m\x01\xc0\x90"), "not a frame"),
        (frames.encode_request(1, "m" * 65, 1, None, None), "not a frame"),
        (frames.encode_request(1, "m", 1, "t" * 257, None), "not a frame"),
        (frames.encode_request(1, "m", 600_001, None, None), "not a frame"),
        (frames.encode_request(1, "m", -1, None, None), "not a frame"),
        (frames.encode_request(2**63, "m", 1, None, None), "not a frame"),
        (HELLO, "not a frame"),
    ],
)
def test_refused_after_hello(data: bytes, reason: str) -> None:
    """Lengths, limits and nesting out of bounds end the stream; a second hello too."""
    with pytest.raises(frames.FrameError, match=reason):
        greeted().feed(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frames.PING, "does not speak the internal RPC"),
        (framed(msgspec.msgpack.encode(["hello", 2, "b"])), "protocol 2"),
        (framed(msgspec.msgpack.encode(["hello", 1, "b" * 257])), "does not speak the internal RPC"),
        ((1025).to_bytes(4, "big"), "does not speak the internal RPC"),
        (b"GET / HTTP/1.1\r\n", "is it another port, or another program"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "does not speak the internal RPC"),
    ],
)
def test_refused_as_first_frame(data: bytes, reason: str) -> None:
    """A peer must introduce itself with our protocol number first, and small; HTTP and TLS are not taken for it."""
    with pytest.raises(frames.FrameError, match=reason):
        frames.FrameReader().feed(data)


def test_largest_frame_passes_and_one_more_is_not_sent() -> None:
    """1 MiB is the limit on both sides: what we encode we also accept."""
    overhead = len(frames.encode_reply(1, bytes(100_000))) - 100_000 - 4
    largest = frames.encode_reply(1, bytes(FRAME_BYTES_MAX - overhead))
    assert len(largest) == FRAME_BYTES_MAX + 4
    assert len(greeted().feed(largest)) == 1
    with pytest.raises(frames.FrameTooLarge):
        frames.encode_reply(1, bytes(FRAME_BYTES_MAX - overhead + 1))


def test_unknown_fields_at_the_end_are_ignored() -> None:
    """A newer peer may append fields to a frame or a body."""
    reader = greeted()
    assert reader.feed(framed(msgspec.msgpack.encode([4, "new"]))) == [frames.Pong()]
    got = frames.BodyDecoder(GroupCall)(msgspec.Raw(msgspec.msgpack.encode(["GroupCall", b"r", b"g", "new"])))
    assert got == GroupCall(b"r", b"g")


def test_another_version_is_told_as_that() -> None:
    """A body with fewer or other fields is named as another version's, not in the words of a library."""
    raw = msgspec.Raw(msgspec.msgpack.encode(["GroupCall", b"r"]))
    with pytest.raises(DecodingError) as caught:
        frames.BodyDecoder(GroupCall)(raw)
    assert "runs another version" in str(caught.value)
    assert "Expected" not in str(caught.value)
