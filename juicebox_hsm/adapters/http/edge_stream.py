"""TLS server streams for the edge: one reader, one writer at a time, over any Trio stream.

Own, instead of `trio.SSLStream`, for three reasons: its two internal locks add a trip through the scheduler to every
read and every write; its end-of-stream rules need exceptions where we only want to know that a client is gone; and
session tickets leave here together with the first answer, in one packet.
"""

from __future__ import annotations

import ssl
from typing import Final, Protocol

import trio
import trio.abc

RECEIVE_BYTES: Final = 16_384
"""Read size; also the largest TLS record."""


class ByteStream(Protocol):
    """What the protocol loops need of a connection."""

    async def receive_some(self) -> bytes:
        """Return some bytes, b"" once the peer is done sending or gone."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send everything; raises `trio.BrokenResourceError` when the peer is gone."""
        ...

    async def aclose(self) -> None:
        """Say goodbye if possible and close; closing twice is fine."""
        ...


class TlsServerStream:
    """The server side of TLS over `transport`. Not for concurrent readers or concurrent writers."""

    __slots__ = ("_broken", "_closed", "_incoming", "_outgoing", "_tls", "_transport")

    def __init__(self, transport: trio.abc.Stream, context: ssl.SSLContext) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._broken = False
        self._closed = False

    async def handshake(self) -> str:
        """Complete the handshake and return the chosen protocol: `h2`, or `http/1.1` also when nothing was agreed.

        Raises `ssl.SSLError` for a peer that breaks TLS (the alert is sent) and `trio.BrokenResourceError`.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    await self._transport.send_all(self._outgoing.read())
                self._incoming.write(await self._receive_handshake())
            except ssl.SSLError:
                self._broken = True
                if self._outgoing.pending:
                    await self._transport.send_all(self._outgoing.read())
                raise
            else:
                break
        # A TLS 1.2 client waits for our Finished; TLS 1.3 tickets may wait for the first answer.
        if self._outgoing.pending and self._tls.version() != "TLSv1.3":
            await self._transport.send_all(self._outgoing.read())
        return self._tls.selected_alpn_protocol() or "http/1.1"

    async def _receive_handshake(self) -> bytes:
        data = await self._transport.receive_some(RECEIVE_BYTES)
        if not data:
            raise trio.BrokenResourceError("closed during the TLS handshake")
        return bytes(data)

    async def receive_some(self) -> bytes:
        """Return some decrypted bytes; b"" at the end, clean or not.

        Raises `trio.BrokenResourceError` for a reset and for bytes that are not TLS.
        """
        while True:
            try:
                return self._tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError:
                self._broken = True
                return b""
            except ssl.SSLError as error:
                self._broken = True
                raise trio.BrokenResourceError(f"not TLS: {error.reason}") from None
            data = await self._transport.receive_some(RECEIVE_BYTES)
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    async def send_all(self, data: bytes) -> None:
        """Encrypt and send `data` (any length)."""
        if not data:
            return
        if self._broken:
            raise trio.BrokenResourceError("the stream is broken")
        self._broken = True  # until all is sent: a send that was cancelled half way must not be followed by another
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"cannot send: {error.reason}") from None
        await self._transport.send_all(self._outgoing.read())
        self._broken = False

    async def aclose(self) -> None:
        """Send close-notify if the stream is sound, do not wait for the peer's, and close the transport."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._broken:
                try:
                    self._tls.unwrap()
                except (ssl.SSLError, ValueError):  # want-read is the normal case: the peer has not answered yet
                    pass
                if self._outgoing.pending:
                    await self._transport.send_all(self._outgoing.read())
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self._transport)
