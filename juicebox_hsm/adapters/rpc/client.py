"""The caller's end of one stream of the internal RPC (agent.md 2).

A call queues one frame and parks its task; the stream's reader wakes it with the reply. Deadlines are looked after by
the stream's ticker. Cancelling a caller never harms the stream: a request that was not handed to it is withdrawn,
otherwise its place in flight stays taken until the reply or the deadline, because there is no cancel frame and the
server still counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.adapters.rpc.errors import RpcError, RpcFailed, RpcUnreachable
from juicebox_hsm.adapters.rpc.streams import QUEUE_BYTES_HIGH, FramedStream
from juicebox_hsm.adapters.tls.streams import ByteStream
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.wire.methods import Method, Reply, Request
from juicebox_hsm.wire.rpc import PeerRole, RpcCode

IN_FLIGHT_MAX: Final = 1024  # agent.md 2: per stream; more callers wait


class _Call:
    """A request in flight; `task` is None once its caller has gone."""

    __slots__ = ("deadline", "error", "number", "reply", "task")

    def __init__(self, task: trio.lowlevel.Task, deadline: float) -> None:
        self.task: trio.lowlevel.Task | None = task
        self.deadline = deadline
        self.number = 0
        self.reply: msgspec.Raw | None = None
        self.error: RpcError | None = None


class RpcConnection:
    """Calls over one stream. `run` must be running; `greeted` is set when the peer has introduced itself."""

    def __init__(
        self, stream: ByteStream | trio.abc.Stream, *, peer: str, role: PeerRole | None, build: str = ""
    ) -> None:
        self.peer = peer
        self.role = role
        self.greeted = trio.Event()
        self.stream = FramedStream(stream, self, build)
        self._calls: dict[int, _Call] = {}
        self._next_id = 0
        self._turns = trio.lowlevel.ParkingLot()
        self._decoders: dict[str, frames.BodyDecoder] = {}

    @property
    def open(self) -> bool:
        """Tell whether calls may still succeed."""
        return self.stream.open

    async def run(self) -> None:
        """Work until the stream ends; then every call in flight fails. Raises nothing but `Cancelled`."""
        try:
            await self.stream.run()
        finally:
            self.greeted.set()
            self._turns.unpark_all()
            for call in self._calls.values():
                self._resume(call, self._lost(maybe_delivered=not self.stream.withdraw(call.number)))
            self._calls.clear()

    async def call(
        self, method: Method[Request, Reply], body: Request, *, timeout_s: float, trace: str | None = None
    ) -> Reply:
        """Call `method` and return its reply, an instance of `method.reply`.

        Raises `RpcFailed` with the peer's code or, after `timeout_s`, `DEADLINE_EXCEEDED`; `RpcUnreachable` when the
        stream ends first. Both say whether the peer may have got the request.
        """
        stream = self.stream
        if not stream.open:
            raise self._lost(maybe_delivered=False)
        deadline = trio.current_time() + timeout_s
        if len(self._calls) >= IN_FLIGHT_MAX or stream.queued_bytes > QUEUE_BYTES_HIGH:
            await self._wait_turn(deadline)
            timeout_s = deadline - trio.current_time()
        timeout_ms = min(max(1, math.ceil(timeout_s * 1000)), frames.TIMEOUT_MS_MAX)
        call_id = self._next_id
        frame = frames.encode_request(call_id, method.name, timeout_ms, trace, body)
        self._next_id = call_id + 1
        call = _Call(trio.lowlevel.current_task(), deadline)
        self._calls[call_id] = call
        call.number = stream.send(frame)
        stream.wake_at(deadline)

        def abort(_raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            call.task = None
            if stream.withdraw(call.number):
                self._free(call_id)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if call.error is not None:
            raise call.error
        decode = self._decoders.get(method.name)
        if decode is None:
            decode = self._decoders[method.name] = frames.BodyDecoder(method.reply)
        try:
            reply: Reply = decode(call.reply)  # type: ignore[arg-type]  # set whenever error is not
        except DecodingError as error:
            stream.stop(f"reply of {method.name}: {error}")
            raise self._lost(maybe_delivered=True) from None
        return reply

    def on_hello(self, hello: frames.Hello) -> None:  # noqa: ARG002  # the build is for people who read the log
        """Let callers begin."""
        self.greeted.set()

    def on_frame(self, frame: frames.Request | frames.Reply | frames.Failure) -> None:
        """Hand a reply to its caller; a late one has none."""
        if type(frame) is frames.Request or frame.id >= self._next_id:
            self.stream.stop("peer answers what it was not asked")
            return
        call = self._free(frame.id)
        if call is None or call.task is None:
            return
        if type(frame) is frames.Reply:
            call.reply = frame.body
            task, call.task = call.task, None
            trio.lowlevel.reschedule(task)
        elif type(frame) is frames.Failure:
            self._resume(call, RpcFailed(frame.code, f"from {self.peer}"))

    def on_tick(self, now: float) -> float:
        """Give up the calls whose deadline has passed."""
        if not self._calls:
            return math.inf
        for call_id in [call_id for call_id, call in self._calls.items() if call.deadline <= now]:
            call = self._free(call_id)
            if call is not None:
                unsent = self.stream.withdraw(call.number)
                self._resume(call, self._late(maybe_delivered=not unsent))
        return min((call.deadline for call in self._calls.values()), default=math.inf)

    async def _wait_turn(self, deadline: float) -> None:
        with trio.move_on_at(deadline):
            while self.stream.open:
                if len(self._calls) >= IN_FLIGHT_MAX:
                    await self._turns.park()
                elif self.stream.queued_bytes > QUEUE_BYTES_HIGH:
                    await self.stream.wait_writable()
                else:
                    return
            raise self._lost(maybe_delivered=False)
        raise self._late(maybe_delivered=False)

    def _free(self, call_id: int) -> _Call | None:
        call = self._calls.pop(call_id, None)
        if self._turns:
            self._turns.unpark()
        return call

    def _resume(self, call: _Call, error: RpcError) -> None:
        task, call.task = call.task, None
        if task is not None:
            call.error = error
            trio.lowlevel.reschedule(task)

    def _lost(self, *, maybe_delivered: bool) -> RpcUnreachable:
        return RpcUnreachable(f"{self.peer}: {self.stream.reason}", maybe_delivered=maybe_delivered)

    def _late(self, *, maybe_delivered: bool) -> RpcFailed:
        return RpcFailed(RpcCode.DEADLINE_EXCEEDED, f"no reply from {self.peer}", maybe_delivered=maybe_delivered)
