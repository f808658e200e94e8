"""The HTTP/1.1 loop of the edge, around the sans-IO parser h11 (load-balancer.md 3 and 5).

A connection is always in one of four stages, and its deadline belongs to the stage:

    idle ---first bytes---> head ---complete---> handler [body: deadline] ---answer---> write ---> idle
    idle_timeout            header_timeout       none                                  write_timeout

While the handler runs there is no deadline and nobody cancels it: a request handed to an agent runs to its end even if
the client is gone (load-balancer.md 5.1). Stopping closes at once in `idle` and `head`, and after the answer otherwise.
"""

from __future__ import annotations

import math
import time
from typing import Final

import h11
import trio

from juicebox_hsm.adapters.edge.connection import Connection
from juicebox_hsm.adapters.edge.exchange import REASONS, BodyTooLarge, Disconnected, Handler, Request, Response
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.tls.streams import ByteStream

# What h11 is told of every answer: only framing and persistence matter to its state, never status or content, and 4xx
# means "not switching protocols". We write the bytes ourselves, which takes half the time.
_TOLD_KEEP: Final = h11.Response(status_code=400, headers=[(b"content-length", b"0")])
_TOLD_CLOSE: Final = h11.Response(status_code=400, headers=[(b"content-length", b"0"), (b"connection", b"close")])
_TOLD_END: Final = h11.EndOfMessage()


class _H1Request(Request):
    """A request whose body is read from its session."""

    __slots__ = ("_session",)

    def __init__(self, session: H1Session, event: h11.Request) -> None:
        # h11's own header list walks through an abstract sequence: slower than lowering the names again.
        headers = [(name.lower(), value) for name, value in event.headers.raw_items()]
        super().__init__(event.method.decode("ascii"), event.target, headers)
        self._session = session

    async def body(self, limit: int) -> bytes:
        """Read the body; see `Request.body`."""
        declared = self.declared_length()
        if declared is not None and declared > limit:
            raise BodyTooLarge
        return await self._session.read_body(limit)


def _is_ambiguous(request: _H1Request, version: bytes) -> bool:
    """Tell whether a proxy before us may have seen another end of this request than we do (RFC 9112 6.1).

    h11 refuses lengths that differ and encodings other than chunked, but takes the chunks where both are given.
    """
    if request.header(b"transfer-encoding") is None:
        return False
    return version != b"1.1" or request.header(b"content-length") is not None


class H1Session:
    """One HTTP/1.1 connection."""

    def __init__(self, connection: Connection, stream: ByteStream, handler: Handler, limits: EdgeLimits) -> None:
        self._connection = connection
        self._stream = stream
        self._handler = handler
        self._limits = limits
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes_max)
        self._processing = False
        self._body_complete = True

    def stop(self) -> None:
        """Close now if no request is in progress, else after its answer."""
        if not self._processing:
            self._connection.scope.cancel()

    def expire(self, now: float) -> None:  # noqa: ARG002  # the deadline is that of the current stage
        """Close: every stage that has a deadline may be cancelled."""
        self._connection.deadline = math.inf
        self._connection.scope.cancel()

    async def run(self) -> None:
        """Serve requests until the client, a deadline or `stop` ends the connection."""
        with self._connection.scope:
            while await self._exchange():
                self._parser.start_next_cycle()

    async def _exchange(self) -> bool:
        """Serve one request; False when the connection is to be closed."""
        try:
            head = await self._next_head()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            return False
        if head is None or self._connection.scope.cancel_called:
            return False
        self._processing = True
        self._body_complete = False
        request = _H1Request(self, head)
        if _is_ambiguous(request, head.http_version):
            await self._refuse(400)
            return False
        began_ns = time.perf_counter_ns()
        try:
            response = await self._handler(request)
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            return False
        except Disconnected:
            return False
        return await self._answer(request, response, time.perf_counter_ns() - began_ns)

    async def _next_head(self) -> h11.Request | None:
        """Return the next request head, or None when the client is done."""
        connection, parser, limits = self._connection, self._parser, self._limits
        self._processing = False
        now = trio.current_time()
        connection.deadline = now + limits.idle_timeout_s
        connection.set_idle(now)
        if connection.stopping:
            return None
        reads = 0
        size_bytes = len(parser.trailing_data[0])
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                if reads == 1:  # some bytes, but not a whole head: the usual head comes in one piece
                    connection.deadline = trio.current_time() + limits.header_timeout_s
                reads += 1
                data = await self._stream.receive_some()
                size_bytes += len(data)
                parser.receive_data(data)
            elif isinstance(event, h11.Request):
                # the parser bounds heads that come in pieces; one that is complete at once it takes at any size
                if size_bytes - len(parser.trailing_data[0]) > limits.header_bytes_max:
                    raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
                connection.set_busy()
                connection.deadline = math.inf
                if reads == 0:  # pipelined: others get their turn before the next of what may be hundreds
                    await trio.lowlevel.checkpoint()
                return event
            else:  # ConnectionClosed; PAUSED cannot follow start_next_cycle
                return None

    async def read_body(self, limit: int) -> bytes:
        """Read the body up to `limit` bytes; see `Request.body`."""
        parser, connection = self._parser, self._connection
        if parser.they_are_waiting_for_100_continue:
            await self._send(parser.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")))
        parts: list[bytes] = []
        size_bytes = 0
        timed = False
        try:
            while True:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    if not timed:
                        timed = True
                        connection.deadline = trio.current_time() + self._limits.body_timeout_s
                    parser.receive_data(await self._stream.receive_some())
                elif isinstance(event, h11.Data):
                    size_bytes += len(event.data)
                    if size_bytes > limit:
                        raise BodyTooLarge
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self._body_complete = True
                    return b"".join(parts)
                else:
                    raise Disconnected
        finally:
            if timed:
                connection.deadline = math.inf

    async def _answer(self, request: Request, response: Response, elapsed_ns: int) -> bool:
        """Send `response`; False when the connection is to be closed afterwards."""
        parser = self._parser
        keep = not self._connection.stopping and (self._body_complete or self._try_skip_body(request))
        parser.send(_TOLD_KEEP if keep else _TOLD_CLOSE)
        parser.send(_TOLD_END)
        ends = parser.our_state is not h11.DONE
        data = b"HTTP/1.1 %d %s\r\n%scontent-length: %d\r\n%s%s\r\n%s" % (
            response.status,
            REASONS.get(response.status, b""),
            b"".join([b"%s: %s\r\n" % header for header in response.headers]),
            len(response.body),
            b"x-exec-time: %d\r\n" % elapsed_ns if response.tells_time else b"",
            b"connection: close\r\n" if ends else b"",
            response.body if request.method != "HEAD" else b"",
        )
        await self._send(data)
        if parser.our_state is h11.DONE and parser.their_state is h11.DONE:
            return True
        if not self._body_complete:
            await self._discard()
            return parser.our_state is h11.DONE and parser.their_state is h11.DONE
        return False

    def _try_skip_body(self, request: Request) -> bool:
        """Tell whether the rest of an unread body is short and certain to come, so that the connection may live on."""
        if self._parser.they_are_waiting_for_100_continue:
            return False
        if request.header(b"transfer-encoding") is not None:
            return False
        return (request.declared_length() or 0) <= self._limits.discard_bytes_max

    async def _send(self, data: bytes | None) -> None:
        connection = self._connection
        connection.deadline = trio.current_time() + self._limits.write_timeout_s
        await self._stream.send_all(data or b"")
        connection.deadline = math.inf

    async def _discard(self) -> None:
        """Throw away what the client still sends, within limits.

        Closing with unread bytes would make the kernel reset the connection and could take our answer with it.
        """
        left = self._limits.discard_bytes_max
        self._connection.deadline = trio.current_time() + self._limits.close_timeout_s
        parser = self._parser
        try:
            while left > 0:
                if parser.their_state is h11.SEND_BODY:
                    event = parser.next_event()
                    if isinstance(event, h11.EndOfMessage):
                        self._body_complete = True
                        return
                    if isinstance(event, h11.Data):
                        left -= len(event.data)
                        continue
                    if event is not h11.NEED_DATA:
                        return
                data = await self._stream.receive_some()
                left -= len(data)
                if not data:
                    return
                if parser.their_state is h11.SEND_BODY:
                    parser.receive_data(data)
        except h11.RemoteProtocolError:
            return

    async def _refuse(self, status: int) -> None:
        """Answer bytes that are not HTTP with 400, or 431 for a head that is too large, and close."""
        status = 431 if status == 431 else 400
        if self._parser.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        # By hand: after a protocol error the parser may refuse to speak for us.
        await self._send(
            b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-length: 0\r\nx-exec-time: 0\r\n\r\n"
            % (status, REASONS[status])
        )
        await self._discard()
