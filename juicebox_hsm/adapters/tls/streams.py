"""Byte streams for hot paths: fewer trips through Trio's scheduler than its own streams take.

Own, instead of `trio.SocketStream` and `trio.SSLStream`, because every trip costs 30 to 60 us and a request crosses
six streams. Trio's send yields after the kernel has taken everything, and each read and write of its TLS stream
takes two locks that yield; one reader and one writer need neither. What is given up: a send that the kernel takes at
once is no checkpoint, and concurrent readers or concurrent writers are not detected. Every read is a checkpoint, so a
task that talks to a peer still lets others run.
"""

from __future__ import annotations

import os
import ssl
from typing import Any, Final, Protocol

import trio
import trio.abc

RECEIVE_BYTES: Final = 16_384
"""Usual read size; also the largest TLS record."""


class ByteStream(Protocol):
    """What protocol loops need of a connection. One reader and one writer at a time."""

    async def receive_some(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        """Return some bytes, b"" once the peer is done sending or gone."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send everything; raises `trio.BrokenResourceError` when the peer is gone."""
        ...

    async def aclose(self) -> None:
        """Say goodbye if possible and close; closing twice is fine."""
        ...


class SocketStream:
    """A connected TCP socket: waits first and reads then, and sends without waiting while the kernel takes it."""

    __slots__ = ("_stream", "socket")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        """Return some bytes, b"" at the end. Raises `trio.BrokenResourceError` and `trio.ClosedResourceError`."""
        while True:
            await trio.lowlevel.wait_readable(self._descriptor())
            try:
                return os.read(self._descriptor(), max_bytes)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def send_all(self, data: bytes) -> None:
        """Send everything; a checkpoint only if the kernel does not take it at once. Raises as `receive_some`."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor(), left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._descriptor())
            except OSError as error:
                raise trio.BrokenResourceError(f"socket connection broken: {error}") from error

    async def aclose(self) -> None:
        """Close; whoever waits gets `trio.ClosedResourceError`."""
        await self._stream.aclose()

    def _descriptor(self) -> int:
        """Return the open descriptor. Asked for anew each time: a closed one's number may belong to somebody else."""
        descriptor = self.socket.fileno()
        if descriptor < 0:
            raise trio.ClosedResourceError("this stream was closed")
        return descriptor


class TlsStream:
    """One side of TLS over `transport`, `server_name` None for the server's side or a peer known otherwise.

    Session tickets leave together with the first answer, in one packet. End of stream is the same clean or not: HTTP
    and frames carry their own lengths.
    """

    __slots__ = ("_broken", "_closed", "_incoming", "_outgoing", "_sending", "_tls", "_transport")

    def __init__(
        self,
        transport: ByteStream | trio.abc.Stream,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: str | None = None,
    ) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._broken = False
        self._sending = False
        self._closed = False

    async def handshake(self) -> str | None:
        """Complete the handshake and return the chosen ALPN protocol, None when nothing was agreed.

        Raises `ssl.SSLError` for a peer that breaks TLS or is not who it should be (the alert is sent), and
        `trio.BrokenResourceError`.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self._incoming.write(await self._receive_handshake())
            except (ssl.SSLError, ValueError):
                self._broken = True
                await self._flush()
                raise
            else:
                break
        # Everything but a TLS 1.3 server's tickets is waited for by the peer.
        if not self._tls.server_side or self._tls.version() != "TLSv1.3":
            await self._flush()
        return self._tls.selected_alpn_protocol()

    def getpeercert(self) -> dict[str, Any] | None:
        """Return the peer's verified certificate in the form of `ssl.SSLSocket.getpeercert`."""
        return self._tls.getpeercert()

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._transport.send_all(self._outgoing.read())

    async def _receive_handshake(self) -> bytes:
        data = await self._transport.receive_some(RECEIVE_BYTES)
        if not data:
            raise trio.BrokenResourceError("closed during the TLS handshake")
        return bytes(data)

    async def receive_some(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        """Return some decrypted bytes; b"" at the end, clean or not.

        Raises `trio.BrokenResourceError` for a reset and for bytes that are not TLS.
        """
        while True:
            try:
                return self._tls.read(max_bytes)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError:
                self._broken = True
                return b""
            except ssl.SSLError as error:
                self._broken = True
                raise trio.BrokenResourceError(f"TLS failed: {error.reason}") from None
            data = await self._transport.receive_some(max_bytes)
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    async def send_all(self, data: bytes) -> None:
        """Encrypt and send `data` (any length)."""
        if not data:
            return
        if self._broken or self._sending:
            raise trio.BrokenResourceError("the stream is broken")
        self._sending = True  # until all is sent: a send that was cancelled half way must not be followed by another
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"cannot send: {error.reason}") from None
        await self._transport.send_all(self._outgoing.read())
        self._sending = False

    async def aclose(self) -> None:
        """Send close-notify if the stream is sound, do not wait for the peer's, and close the transport."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._broken and not self._sending:
                try:
                    self._tls.unwrap()
                except (ssl.SSLError, ValueError):  # want-read is the normal case: the peer has not answered yet
                    pass
                await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass
        finally:
            await aclose_forcefully(self._transport)


def lean(stream: trio.abc.Stream) -> ByteStream | trio.abc.Stream:
    """Return the lean form of an accepted stream; streams that are no sockets stay as they are."""
    return SocketStream(stream) if isinstance(stream, trio.SocketStream) else stream


async def aclose_forcefully(stream: ByteStream | trio.abc.AsyncResource) -> None:
    """Close without waiting for the peer; what cannot be said at once is not said."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.aclose()
