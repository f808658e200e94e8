"""Frames of the internal RPC, without I/O (agent.md 2).

A frame is a big-endian u32 length (1 byte to 1 MiB) and one MessagePack array:

    ["hello", protocol, build]                       first frame each way
    [0, id, method, timeout_ms, trace|nil, body]     request
    [1, id, body]                                    reply
    [2, id, code]                                    error of the RPC layer
    [3]                                              ping
    [4]                                              pong

Bodies stay raw here: the reader of a stream does not know a reply's type, and a request's body is decoded
only after method and caller were found permitted.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from juicebox_hsm.errors import DecodingError, LocalError
from juicebox_hsm.wire.rpc import FRAME_BYTES_MAX, PROTOCOL, RpcCode

LENGTH_BYTES: Final = 4
HELLO_BYTES_MAX: Final = 1024  # own: a peer that has not introduced itself gets no large buffer
METHOD_CHARS_MAX: Final = 64  # own: the longest name of the tables has 23
TRACE_CHARS_MAX: Final = 256  # own: a W3C traceparent has 55
BUILD_CHARS_MAX: Final = 256  # own
TIMEOUT_MS_MAX: Final = 600_000  # own: four times the longest time-out in use (150 s, `transfer`)
ID_MAX: Final = 2**63 - 1

_Id = Annotated[int, Meta(ge=0, le=ID_MAX)]


class _Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of the frames; none of them can be part of a reference cycle."""


class Request(_Frame, tag=0, frozen=True):
    """A call. `timeout_ms` is relative to its arrival."""

    id: _Id
    method: Annotated[str, Meta(max_length=METHOD_CHARS_MAX)]
    timeout_ms: Annotated[int, Meta(ge=0, le=TIMEOUT_MS_MAX)]
    trace: Annotated[str, Meta(max_length=TRACE_CHARS_MAX)] | None
    body: msgspec.Raw


class Reply(_Frame, tag=1, frozen=True):
    """The outcome of a call."""

    id: _Id
    body: msgspec.Raw


class Failure(_Frame, tag=2, frozen=True):
    """The RPC layer's refusal of a call."""

    id: _Id
    code: RpcCode


class Ping(_Frame, tag=3, frozen=True):
    """Asks for a `Pong`."""


class Pong(_Frame, tag=4, frozen=True):
    """Answers a `Ping`."""


class Hello(_Frame, tag="hello", frozen=True):
    """The first frame each way."""

    protocol: int
    build: Annotated[str, Meta(max_length=BUILD_CHARS_MAX)]


Frame = Request | Reply | Failure | Ping | Pong

_FRAME: Final = msgspec.msgpack.Decoder(Frame)
_HELLO: Final = msgspec.msgpack.Decoder(Hello)
_encode: Final = msgspec.msgpack.Encoder().encode


NOT_OF_OURS: Final = "not what this version knows by that name: the other side runs another version"
NO_HELLO: Final = "whatever answers there does not speak the internal RPC; is it another port, or another program?"


class FrameError(DecodingError):
    """A peer sent what is no frame; the stream cannot be read any further."""


class FrameTooLarge(LocalError):
    """We were asked to send a frame of more than 1 MiB; nothing was sent."""


def _framed(payload: bytes) -> bytes:
    if len(payload) > FRAME_BYTES_MAX:
        raise FrameTooLarge(f"frame of {len(payload)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def encode_hello(build: str) -> bytes:
    """Encode our first frame; `build` is cut to 256 characters."""
    return _framed(_encode(("hello", PROTOCOL, build[:BUILD_CHARS_MAX])))


def encode_request(call_id: int, method: str, timeout_ms: int, trace: str | None, body: object) -> bytes:
    """Encode a call. `body` is a msgspec struct. Raises `FrameTooLarge`."""
    return _framed(_encode((0, call_id, method, timeout_ms, trace, body)))


def encode_reply(call_id: int, body: object) -> bytes:
    """Encode the outcome of a call. `body` is a msgspec struct. Raises `FrameTooLarge`."""
    return _framed(_encode((1, call_id, body)))


def encode_failure(call_id: int, code: RpcCode) -> bytes:
    """Encode the RPC layer's refusal of a call."""
    return _framed(_encode((2, call_id, code.value)))


PING: Final = _framed(_encode((3,)))
PONG: Final = _framed(_encode((4,)))


class BodyDecoder:
    """Decodes bodies of one type; made once per method, for making it is slow and using it is fast."""

    __slots__ = ("_decode",)

    def __init__(self, body_type: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(body_type).decode

    def __call__(self, raw: msgspec.Raw) -> Any:
        """Decode a body. Raises `DecodingError` when it is not of the type."""
        try:
            return self._decode(raw)
        except (msgspec.DecodeError, RecursionError):
            raise DecodingError(NOT_OF_OURS) from None


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one incomplete frame (1 MiB) and one received piece.

    The first frame must be a hello of our protocol number; `hello` is set when it came.
    """

    __slots__ = ("_needed", "_partial", "hello")

    def __init__(self) -> None:
        self._partial = bytearray()
        self._needed = 0
        self.hello: Hello | None = None

    def feed(self, data: bytes | bytearray) -> list[Frame]:
        """Return the frames that `data` completes.

        Raises `FrameError` for a length of 0 or over the limit, for bytes that are no frame, and for a first frame
        that is not our hello; the reader must not be used afterwards.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return []
            data = bytes(self._partial)
            self._partial.clear()
        frames: list[Frame] = []
        view = memoryview(data)
        start, end = 0, len(data)
        self._needed = LENGTH_BYTES
        while end - start >= LENGTH_BYTES:
            length = int.from_bytes(view[start : start + LENGTH_BYTES], "big")
            limit = FRAME_BYTES_MAX if self.hello is not None else HELLO_BYTES_MAX
            if not 1 <= length <= limit:
                raise FrameError(f"frame length {length} is not in 1..{limit}" if self.hello else NO_HELLO)
            body = start + LENGTH_BYTES
            stop = body + length
            if stop > end:
                self._needed = LENGTH_BYTES + length
                break
            self._read(view[body:stop], frames)
            start = stop
        if start < end:
            self._partial += view[start:end]
        return frames

    def _read(self, payload: memoryview, frames: list[Frame]) -> None:
        try:
            if self.hello is not None:
                frames.append(_FRAME.decode(payload))
                return
            hello = _HELLO.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            raise FrameError("not a frame of the internal RPC" if self.hello else NO_HELLO) from None
        if hello.protocol != PROTOCOL:
            raise FrameError(f"peer speaks protocol {hello.protocol}, we speak {PROTOCOL}")
        self.hello = hello
