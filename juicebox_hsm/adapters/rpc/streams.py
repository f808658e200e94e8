"""One framed stream: a reader, a writer and a ticker, the same at both ends (agent.md 2, own: the rest).

Theory of operation. `send` only queues; the writer joins whatever is queued into one `send_all`, so that frames
queued in the same scheduler pass share one system call and one TLS record. The reader hands every frame of one
`receive_some` to a synchronous callback. The ticker is the stream's only timer: it pings, gives up on a silent or
stuck peer, and lets the owner look after its deadlines, so that a call costs no timer of its own.

Silence is counted in ticker passes, not read off the clock: a process that was stopped for a while must not
conclude that its peers were.

Memory is bounded by: one incomplete frame, the queue up to `QUEUE_BYTES_HIGH` (above it nothing more is read from
this peer, so a peer that does not read its replies gets no new ones), and `QUEUE_BYTES_MAX`, which ends the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import trio

from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.adapters.tls.streams import ByteStream, aclose_forcefully
from juicebox_hsm.adapters.tls.wording import reason_of

PING_AFTER_S: Final = 0.25  # agent.md 2
SILENT_TICKS_MAX: Final = 4  # agent.md 2: closed after 1 s, that is four passes, without a frame
SEND_S: Final = 5.0  # own: one batch of at most BATCH_BYTES, or one frame, must be taken in this time
CLOSE_S: Final = 1.0  # own: a polite goodbye is not worth more
RECEIVE_BYTES: Final = 1 << 16
BATCH_BYTES: Final = 1 << 18  # own: large enough to amortise a call, small enough to time
QUEUE_BYTES_HIGH: Final = 1 << 22  # own: four of the largest frames
QUEUE_BYTES_MAX: Final = 1 << 26  # own: the replies of all 1024 calls in flight, if of usual size
TICK_MIN_S: Final = 0.005  # own: deadlines are met this exactly, and a flood of them costs no more passes


class StreamOwner(Protocol):
    """The end that a stream belongs to. All methods are synchronous and must not raise."""

    def on_hello(self, hello: frames.Hello) -> None:
        """Take note that the peer introduced itself; frames follow."""

    def on_frame(self, frame: frames.Request | frames.Reply | frames.Failure) -> None:
        """Handle one frame that is neither ping nor pong."""

    def on_tick(self, now: float) -> float:
        """Give up what is due; return the next deadline (Trio's clock), infinity for none."""


class FramedStream:
    """Frames over a byte stream. `run` does all the work; `send` and `stop` may be called from anywhere."""

    __slots__ = (
        "_base",
        "_batch_since",
        "_drained",
        "_heard_at",
        "_hello_seen",
        "_owner",
        "_parked",
        "_pong_due",
        "_queue",
        "_reader",
        "_scope",
        "_stream",
        "_tick_at",
        "_tick_scope",
        "open",
        "queued_bytes",
        "reason",
    )

    def __init__(self, stream: ByteStream | trio.abc.Stream, owner: StreamOwner, build: str) -> None:
        self._stream = stream
        self._owner = owner
        self._reader = frames.FrameReader()
        self._hello_seen = False
        self._queue: list[bytes] = [frames.encode_hello(build)]
        self._base = 0  # number of the queue's first frame; every frame of a stream has a number
        self.queued_bytes = len(self._queue[0])
        self._parked: trio.lowlevel.Task | None = None
        self._drained: trio.Event | None = None
        self._pong_due = False
        self._scope = trio.CancelScope()
        self._tick_scope: trio.CancelScope | None = None
        self._tick_at = -1.0
        self._heard_at = 0.0
        self._batch_since: float | None = None
        self.open = True
        self.reason = ""

    def send(self, frame: bytes) -> int:
        """Queue a frame and return its number, for `withdraw`. On a stopped stream nothing happens."""
        number = self._base + len(self._queue)
        if not self.open:
            return number
        self._queue.append(frame)
        self.queued_bytes += len(frame)
        if self.queued_bytes > QUEUE_BYTES_MAX:
            self.stop(f"peer left {self.queued_bytes} bytes unread")
        elif self._parked is not None:
            self._wake_writer()
        return number

    def withdraw(self, number: int) -> bool:
        """Take frame `number` back; False when it, or a part of it, was already handed to the stream."""
        index = number - self._base
        if index < 0:
            return False
        if index < len(self._queue):
            self.queued_bytes -= len(self._queue[index])
            self._queue[index] = b""
        return True

    def stop(self, reason: str) -> None:
        """End the stream at once; the first reason stays."""
        if self.open:
            self.open = False
            self.reason = reason
            self._scope.cancel()
            if self._drained is not None:
                self._drained.set()

    def wake_at(self, deadline: float) -> None:
        """Make sure that `on_tick` runs at `deadline` (Trio's clock) or soon after."""
        if deadline < self._tick_at and self._tick_scope is not None:
            self._tick_at = deadline
            self._tick_scope.deadline = deadline

    async def wait_writable(self) -> None:
        """Wait until less than `QUEUE_BYTES_HIGH` is queued, or the stream has ended."""
        while self.open and self.queued_bytes > QUEUE_BYTES_HIGH:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()

    async def flush(self) -> None:
        """Wait until everything queued so far was handed to the byte stream, or the stream has ended."""
        while self.open and (self._queue or self._batch_since is not None):
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()

    async def run(self) -> None:
        """Work until the stream ends, whoever ends it; `reason` says why. Closes the byte stream.

        Raises nothing but `Cancelled`.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._tick)
                    await self._read()
        finally:
            self.stop("cancelled")
            with trio.move_on_after(CLOSE_S, shield=True):
                await aclose_forcefully(self._stream)

    async def _read(self) -> None:
        receive = self._stream.receive_some
        self._heard_at = trio.current_time()
        while self.open:
            try:
                data = await receive(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.stop(f"stream broke: {reason_of(error)}")
                return
            if not data:
                self.stop("peer closed the stream")
                return
            try:
                received = self._reader.feed(data)
            except frames.FrameError as error:
                self.stop(str(error))
                return
            if not self._hello_seen and self._reader.hello is not None:
                self._hello_seen = True
                self._heard_at = trio.current_time()
                self._owner.on_hello(self._reader.hello)
            if received:
                self._heard_at = trio.current_time()
                self._dispatch(received)
            if self.queued_bytes > QUEUE_BYTES_HIGH:
                await self.wait_writable()

    def _dispatch(self, received: list[frames.Frame]) -> None:
        for frame in received:
            kind = type(frame)
            if kind is frames.Ping:
                # One pong answers all pings since the last batch, so that a flood of pings queues nothing.
                self._pong_due = True
                if self._parked is not None:
                    self._wake_writer()
            elif kind is not frames.Pong:
                self._owner.on_frame(frame)  # type: ignore[arg-type]  # `is` does not narrow the union
            if not self.open:
                return

    async def _write(self) -> None:
        send_all = self._stream.send_all
        while True:
            if not self._queue and not self._pong_due:
                self._parked = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._unpark)
                continue
            data = self._next_batch()
            self._batch_since = trio.current_time()
            try:
                await send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.stop(f"stream broke: {reason_of(error)}")
                return
            self._batch_since = None
            if self._drained is not None and (not self._queue or self.queued_bytes <= QUEUE_BYTES_HIGH):
                self._drained.set()
                self._drained = None

    def _next_batch(self) -> bytes:
        queue = self._queue
        if self.queued_bytes <= BATCH_BYTES:
            taken = len(queue)
            self._queue = []
        else:
            size = taken = 0
            while taken < len(queue) and (taken == 0 or size + len(queue[taken]) <= BATCH_BYTES):
                size += len(queue[taken])
                taken += 1
            self._queue = queue[taken:]
            queue = queue[:taken]
        self._base += taken
        if self._pong_due:
            self._pong_due = False
            queue.append(frames.PONG)
            self.queued_bytes += len(frames.PONG)
        data = queue[0] if len(queue) == 1 else b"".join(queue)
        self.queued_bytes -= len(data)
        return data

    def _unpark(self, _raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        self._parked = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_writer(self) -> None:
        task, self._parked = self._parked, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def _tick(self) -> None:
        silent = 0
        heard_at = pinged_at = trio.current_time()
        while True:
            now = trio.current_time()
            if heard_at != self._heard_at:
                heard_at = self._heard_at
                silent = 0
            if heard_at + PING_AFTER_S > now:
                quiet_at = heard_at + PING_AFTER_S
            elif pinged_at + PING_AFTER_S > now:
                quiet_at = pinged_at + PING_AFTER_S
            else:
                silent += 1
                if silent >= SILENT_TICKS_MAX:
                    self.stop("peer is silent")
                    return
                self.send(frames.PING)
                pinged_at = now
                quiet_at = now + PING_AFTER_S
            if self._batch_since is not None and now - self._batch_since > SEND_S:
                self.stop("peer does not read")
                return
            due = max(self._owner.on_tick(now), now + TICK_MIN_S)
            self._tick_at = min(quiet_at, due)
            with trio.CancelScope(deadline=self._tick_at) as self._tick_scope:
                await trio.sleep_forever()
            self._tick_scope = None
            if not self.open:
                return
