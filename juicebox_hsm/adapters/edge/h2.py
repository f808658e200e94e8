"""The HTTP/2 loop of the edge, around the sans-IO protocol of h2 (load-balancer.md 3 and 5; RFC 9113).

One task reads; each request runs in a task of its own in the connection's nursery and is never cancelled by the
client's reset or disconnect. Whoever has something to send calls `_flush`; if somebody is already sending, that one
takes the new bytes along, so frames of many streams share packets and no lock is needed.

Floods are bounded by counts per `h2_flood_window_s`: resets (CVE-2023-44487), control frames (pings, settings,
priorities, window updates, empty data), and bytes that complete no frame. Handlers that outlive their reset streams
still count as running, so a client cannot have more than `h2_streams_max` requests worked on per connection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame

from juicebox_hsm.adapters.edge.connection import Connection
from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Disconnected, Handler, Headers, Request, Response
from juicebox_hsm.adapters.edge.limits import EdgeLimits
from juicebox_hsm.adapters.tls.streams import ByteStream

LOOK_S: Final = 1.0
"""How often the deadlines of a connection with open streams are looked at."""

WINDOW_UPDATE_BYTES: Final = 16_384
"""The connection's window is given back in steps of this size."""

READ_BYTES: Final = 2048
"""Read size: about an honest request, and no more frames at a time than 5 ms of work."""

EVENTS_PER_TURN: Final = 16
"""After a read with more events than this others get their turn."""

_CONTROL_EVENTS: Final = (
    h2.events.PingReceived,
    h2.events.PingAckReceived,
    h2.events.RemoteSettingsChanged,
    h2.events.SettingsAcknowledged,
    h2.events.PriorityUpdated,
    h2.events.WindowUpdated,
    h2.events.UnknownFrameReceived,
    h2.events.AlternativeServiceAvailable,
    h2.events.TrailersReceived,
)


class _H2Request(Request):
    """One stream: its head, the body so far, and who waits for more."""

    __slots__ = ("_session", "chunks", "complete", "dead", "deadline", "size_bytes", "stream_id", "wake")

    def __init__(self, session: H2Session, stream_id: int, method: str, target: bytes, headers: Headers) -> None:
        super().__init__(method, target, headers)
        self._session = session
        self.stream_id = stream_id
        self.chunks: list[bytes] = []
        self.size_bytes = 0
        self.complete = False
        self.dead = False
        self.deadline = math.inf
        self.wake: trio.Event | None = None

    async def body(self, limit: int) -> bytes:
        """Read the body; see `Request.body`."""
        declared = self.declared_length()
        if declared is not None and declared > limit:
            raise BodyTooLarge
        if not self.complete:
            self.deadline = trio.current_time() + self._session.limits.body_timeout_s
            while not self.complete and not self.dead and self.size_bytes <= limit:
                await self.wait()
            self.deadline = math.inf
        if self.size_bytes > limit:
            raise BodyTooLarge
        if not self.complete:
            raise Disconnected
        return b"".join(self.chunks)

    async def wait(self) -> None:
        """Wait until something about this stream changed."""
        self.wake = trio.Event()
        await self.wake.wait()

    def notify(self) -> None:
        """Wake the waiter, if there is one."""
        if self.wake is not None:
            self.wake.set()

    def kill(self) -> None:
        """Note that no answer can reach the client any more."""
        self.dead = True
        self.notify()


class H2Session:
    """One HTTP/2 connection. `report` is told of unexpected errors of a handler."""

    def __init__(
        self,
        connection: Connection,
        stream: ByteStream,
        handler: Handler,
        limits: EdgeLimits,
        report: Callable[[Exception], None],
    ) -> None:
        self.limits = limits
        self._connection = connection
        self._stream = stream
        self._handler = handler
        self._report = report
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config=config)
        codes = h2.settings.SettingCodes
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: limits.h2_streams_max,
                codes.MAX_HEADER_LIST_SIZE: limits.h2_header_list_bytes_max,
            },
        )
        self._h2.decoder.max_header_list_size = limits.h2_header_list_bytes_max
        self._open: dict[int, _H2Request] = {}
        self._running = 0
        self._nursery: trio.Nursery | None = None
        self._raw = b""
        self._greeted = False
        self._active = trio.current_time()
        self._writing_since = math.inf
        self._write_scope = trio.CancelScope()
        self._ended = False
        self._lost = False
        self._unreturned_bytes = 0
        self._silent_bytes = 0
        self._window_start = self._active
        self._control_frames = 0
        self._resets = 0

    # --- called by the edge; no awaits ---

    def stop(self) -> None:
        """Send GOAWAY; end now if no request is in progress, else after the last answer."""
        self._goaway(ErrorCodes.NO_ERROR)
        if self._running == 0:
            self._connection.scope.cancel()
        elif self._nursery is not None:
            self._nursery.start_soon(self._flush)

    def expire(self, now: float) -> None:
        """Act on whatever is late, and set the time of the next look."""
        limits = self.limits
        if now - self._writing_since >= limits.write_timeout_s:
            self._write_scope.cancel()
        for request in [each for each in self._open.values() if each.deadline <= now]:
            self._reset(request.stream_id, ErrorCodes.CANCEL)
            request.kill()
        patience_s = limits.idle_timeout_s if self._greeted else limits.header_timeout_s
        if self._running == 0 and now - self._active >= patience_s:
            self._connection.deadline = math.inf
            self._connection.stop()
            return
        busy = self._running or self._writing_since < math.inf
        self._connection.deadline = now + LOOK_S if busy else self._active + patience_s

    # --- reading ---

    async def run(self) -> None:
        """Serve streams until the client, a deadline, a violation or `stop` ends the connection."""
        connection = self._connection
        connection.deadline = self._active + self.limits.header_timeout_s
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            with connection.scope:
                await self._read()
            self._ended = True
            for request in list(self._open.values()):
                request.kill()
            # Handlers may still run, but nobody is left to hear their answers: say goodbye and free the socket now.
            with trio.move_on_after(self.limits.close_timeout_s):
                await self._flush()
                self._lost = True
                await self._stream.aclose()

    async def _read(self) -> None:
        self._h2.initiate_connection()
        await self._flush()
        while not (self._connection.stopping and self._running == 0):
            data = await self._stream.receive_some(READ_BYTES)
            if not data:
                return
            try:
                events = self._h2.receive_data(data)
            except h2.exceptions.ProtocolError:
                return  # h2 has prepared the GOAWAY; `run` sends it
            for event in events:
                self._handle(event)
            if not self._within_bounds(len(data), events):
                self._goaway(ErrorCodes.ENHANCE_YOUR_CALM)
                return
            if any(isinstance(event, h2.events.ConnectionTerminated) for event in events):
                return
            await self._flush()
            if len(events) > EVENTS_PER_TURN:
                await trio.lowlevel.checkpoint()  # reading what TLS has already decrypted is none

    def _within_bounds(self, size_bytes: int, events: list[h2.events.Event]) -> bool:
        now = trio.current_time()
        if events:
            self._active = now
            self._greeted = True
            self._silent_bytes = 0
        else:
            self._silent_bytes += size_bytes
        if now - self._window_start > self.limits.h2_flood_window_s:
            self._window_start = now
            self._control_frames = self._resets = 0
        return (
            self._silent_bytes <= self.limits.h2_silent_bytes_max
            and self._resets <= self.limits.h2_resets_max
            and self._control_frames <= self.limits.h2_control_frames_max
        )

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._begin(event)
        elif isinstance(event, h2.events.DataReceived):
            self._data(event)
        elif isinstance(event, h2.events.StreamEnded):
            request = self._open.get(event.stream_id or 0)
            if request is not None:
                request.complete = True
                request.notify()
        elif isinstance(event, h2.events.StreamReset):
            self._resets += 1
            request = self._open.get(event.stream_id or 0)
            if request is not None:
                request.kill()
        elif isinstance(event, _CONTROL_EVENTS):
            self._control_frames += 1
            if isinstance(event, (h2.events.WindowUpdated, h2.events.RemoteSettingsChanged)):
                for request in self._open.values():
                    request.notify()

    def _begin(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id or 0
        if self._connection.stopping or self._running >= self.limits.h2_streams_max or self._nursery is None:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            self._resets += 1
            return
        method = target = b""
        headers: list[tuple[bytes, bytes]] = []
        for name, value in event.headers or []:
            if name == b":method":
                method = bytes(value)
            elif name == b":path":
                target = bytes(value)
            else:
                headers.append((bytes(name), bytes(value)))
        self._control_frames = max(0, self._control_frames - 10)  # an honest client sends a few with each request
        request = _H2Request(self, stream_id, method.decode("latin-1"), target, headers)
        self._open[stream_id] = request
        self._running += 1
        self._connection.set_busy()
        self._connection.deadline = min(self._connection.deadline, trio.current_time() + LOOK_S)
        self._nursery.start_soon(self._serve, request)

    def _data(self, event: h2.events.DataReceived) -> None:
        length = event.flow_controlled_length or 0
        if length == 0:
            self._control_frames += 1
        # Only the connection's window is given back: no honest body outgrows the window a stream begins with.
        self._unreturned_bytes += length
        if self._unreturned_bytes >= WINDOW_UPDATE_BYTES:
            self._h2.increment_flow_control_window(self._unreturned_bytes)
            self._unreturned_bytes = 0
        request = self._open.get(event.stream_id or 0)
        if request is None or request.dead:
            return
        data = event.data or b""
        request.size_bytes += len(data)
        if request.size_bytes <= self.limits.body_bytes_max:
            request.chunks.append(bytes(data))
        else:
            request.chunks.clear()
        request.notify()

    # --- answering ---

    async def _serve(self, request: _H2Request) -> None:
        began_ns = time.perf_counter_ns()
        try:
            response = await self._handler(request)
            if not request.dead:
                await self._answer(request, response, time.perf_counter_ns() - began_ns)
        except Disconnected:
            self._reset(request.stream_id, ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            pass  # the stream or the connection ended under us
        except Exception as error:  # noqa: BLE001  # one client's request must not end the process; reported with trace
            self._report(error)
            self._reset(request.stream_id, ErrorCodes.INTERNAL_ERROR)
        finally:
            self._open.pop(request.stream_id, None)
            self._running -= 1
        if self._running == 0:
            self._active = trio.current_time()
            if self._connection.stopping:
                await self._flush()
                self._connection.scope.cancel()
            else:
                self._connection.set_idle(self._active)
        await self._flush()

    async def _answer(self, request: _H2Request, response: Response, elapsed_ns: int) -> None:
        stream_id = request.stream_id
        headers = [
            (b":status", b"%d" % response.status),
            *response.headers,
            (b"content-length", b"%d" % len(response.body)),
        ]
        if response.tells_time:
            headers.append((b"x-exec-time", b"%d" % elapsed_ns))
        body = b"" if request.method == "HEAD" else response.body
        self._h2.send_headers(stream_id, headers, end_stream=not body)
        while body:
            room = min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size, len(body))
            if room > 0:
                self._h2.send_data(stream_id, body[:room], end_stream=room == len(body))
                body = body[room:]
                continue
            changed = request.wake = trio.Event()  # before we send: the client may open its window meanwhile
            await self._flush()
            request.deadline = trio.current_time() + self.limits.write_timeout_s
            await changed.wait()
            if request.dead:
                return
        if not request.complete:  # RFC 9113 8.1: the rest of the body is not wanted
            self._reset(stream_id, ErrorCodes.NO_ERROR)

    # --- sending ---

    async def _flush(self) -> None:
        """Send what is queued, unless somebody already does."""
        if self._writing_since < math.inf or self._lost:
            return
        try:
            with trio.CancelScope() as self._write_scope:
                while data := self._take():
                    self._writing_since = trio.current_time()
                    await self._stream.send_all(data)
            if self._write_scope.cancelled_caught:
                self._lose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose()
        finally:
            self._writing_since = math.inf

    def _take(self) -> bytes:
        data = bytes(self._h2.data_to_send()) + self._raw
        self._raw = b""
        return data

    def _lose(self) -> None:
        """The client does not read any more: give the connection up."""
        self._lost = True
        for request in self._open.values():
            request.kill()
        self._connection.scope.cancel()

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        if self._ended:
            return  # nothing follows a GOAWAY
        try:
            self._h2.reset_stream(stream_id, error_code=code)
        except h2.exceptions.ProtocolError:
            pass  # already closed

    def _goaway(self, code: ErrorCodes) -> None:
        # By hand: h2's own close_connection would forbid to answer the streams that are still open.
        frame = GoAwayFrame(0, last_stream_id=self._h2.highest_inbound_stream_id, error_code=int(code))
        self._raw += frame.serialize()
