"""Run gRPC calls for Trio on one dedicated asyncio thread (storage.md 9.2, variant A).

Trio hands a coroutine over with `call_soon_threadsafe`; the thread that finishes it puts it on a deque and asks Trio
once, however many finished, to wake their tasks. Requests and responses cross as bytes: encoding and parsing happen in
the Trio thread, so that the two threads rarely want the interpreter lock at the same time. Cancelling a waiting task
cancels its call and returns at once; what the server makes of a cancelled write is unknown.

`Transport` is the seam: two methods, so that another way of driving calls, or one that injects faults, can stand in.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import outcome
import trio

from juicebox_hsm.adapters.process.threads import in_thread_or_here, thread_needed

START_S: Final = 10.0
STOP_S: Final = 5.0

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class CallFailed(Exception):
    """A call ended without an OK status. `code` is the status name; `received` what a stream gave before it broke."""

    def __init__(self, code: str, details: str, received: Sequence[bytes] = ()) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details
        self.received = received


class Transport(Protocol):
    """How serialised requests reach the service. Both methods raise `CallFailed`; `method` is a gRPC path."""

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Send a request and return its one response."""
        ...

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        """Send a request and return all messages of the response; a failure carries those received so far."""
        ...


class _Job(Generic[T]):
    """One coroutine under way on the other thread."""

    __slots__ = ("abandoned", "make", "result", "task", "waiter")

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]], waiter: trio.lowlevel.Task) -> None:
        self.make = make
        self.waiter = waiter
        self.task: asyncio.Task[T] | None = None
        self.result: outcome.Outcome[T] | None = None
        self.abandoned = False


class Driver:
    """One asyncio loop on one thread, for one Trio run."""

    def __init__(self, name: str = "bigtable") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._finished: deque[_Job[Any]] = deque()
        self._started = threading.Event()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._started.set)
        try:
            self._loop.run_forever()
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    async def start(self) -> None:
        """Start the thread; MUST be called in the Trio run that uses the driver."""
        self._token = trio.lowlevel.current_trio_token()
        with thread_needed():
            self._thread.start()
        await in_thread_or_here(self._started.wait, START_S)

    async def stop(self) -> None:
        """End the loop and the thread; no call may be under way any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        with trio.CancelScope(shield=True):
            await in_thread_or_here(self._thread.join, STOP_S)

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `make` returns (called on the other thread) and return or raise what it does."""
        await trio.lowlevel.checkpoint_if_cancelled()
        job: _Job[T] = _Job(make, trio.lowlevel.current_task())

        def abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            job.abandoned = True
            self._loop.call_soon_threadsafe(self._cancel, job)
            return trio.lowlevel.Abort.SUCCEEDED

        self._loop.call_soon_threadsafe(self._begin, job)
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    # --- on the asyncio thread -------------------------------------------------------------------

    def _begin(self, job: _Job[Any]) -> None:
        if not job.abandoned:
            job.task = self._loop.create_task(job.make())
            job.task.add_done_callback(lambda task: self._end(job, task))

    def _cancel(self, job: _Job[Any]) -> None:
        if job.task is not None:
            job.task.cancel()

    def _end(self, job: _Job[Any], task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            job.result = outcome.Error(CallFailed("CANCELLED", "the call was cancelled on this side"))
        else:
            error = task.exception()  # taken also for abandoned jobs, or asyncio complains
            job.result = outcome.Value(task.result()) if error is None else outcome.Error(error)
        if job.abandoned:
            return
        self._finished.append(job)
        if self._token is not None:
            try:
                self._token.run_sync_soon(self._wake, idempotent=True)
            except trio.RunFinishedError:
                pass  # nobody is left to wake

    # --- on the Trio thread ----------------------------------------------------------------------

    def _wake(self) -> None:
        """Wake every task whose job has finished."""
        while self._finished:
            job = self._finished.popleft()
            if not job.abandoned and job.result is not None:
                trio.lowlevel.reschedule(job.waiter, job.result)
