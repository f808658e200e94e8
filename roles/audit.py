"""Record changes in the audit trail: no change without an entry before it, and one that tells how it ended.

A service records what operators order from it, by the certificate that they showed; a tool records what it writes
itself, by the certificate that it was given. What a manager does unasked is noted afterwards, and goes on without the
note if it must: a realm never waits for a log of what nobody ordered.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from juicebox_hsm.adapters.rpc import Handler
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.audit import CHANGE_BYTES, ORDERS, Arguments, AuditEntry, Phase, arguments_of, make_entry
from juicebox_hsm.ports.audit import AuditTrail
from juicebox_hsm.ports.observation import Log
from juicebox_hsm.wire.rpc import PeerRole, Refusal, Refused

RESULT_S: Final = 5.0
"""How long the entry of a result may take, also while the program is being stopped (own)."""
NOTE_S: Final = 2.0
"""How long a note may take; what it is about is done already (own)."""


class NotRecorded(RealmError):
    """A change could not be recorded, so it was not begun. The message says why."""


def _nothing() -> None:
    """Say nothing more than the log does."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """Writes entries for one program, `recorded_by`; `now_ms` is its wall clock."""

    trail: AuditTrail
    recorded_by: str
    now_ms: Callable[[], int]
    log: Log
    say_unknown: Callable[[], object] = _nothing
    """Called when a change was made and its result could not be recorded."""

    async def begin(self, who: str, origin: str, action: str, arguments: Arguments = ()) -> AuditEntry:
        """Record that a change begins. Raises `NotRecorded`, and then it must not."""
        entry = self._entry(Phase.STARTED, who, origin, action, arguments)
        try:
            await self.trail.add(entry)
        except RealmError as error:
            raise NotRecorded(f"nothing was changed, for it cannot be recorded: {error}") from None
        return entry

    async def end(self, entry: AuditEntry, *, failed: bool, detail: str = "") -> None:
        """Record how a change ended; when that fails the trail says `unknown`, and this is told and logged."""
        problem = await self._try_to_add(entry.ended(self.now_ms(), failed=failed, detail=detail), RESULT_S)
        if problem:
            self.log.warning("the result of a change is not in the audit trail", action=entry.action, error=problem)
            self.say_unknown()

    def _entry(self, phase: Phase, who: str, origin: str, action: str, arguments: Arguments) -> AuditEntry:
        """Return the first entry of a change, now."""
        return make_entry(
            os.urandom(CHANGE_BYTES),
            self.now_ms(),
            who=who,
            origin=origin,
            recorded_by=self.recorded_by,
            action=action,
            arguments=arguments,
            phase=phase,
        )

    async def _try_to_add(self, entry: AuditEntry, limit_s: float) -> str:
        """Add an entry about what is done already, also while the program is being stopped. Return what went wrong."""
        with trio.move_on_after(limit_s) as scope:
            scope.shield = True
            try:
                await self.trail.add(entry)
            except RealmError as error:
                return str(error)
            return ""
        return f"no answer within {limit_s:.0f} s"

    async def note(self, who: str, action: str, arguments: Arguments = (), *, origin: str = "") -> None:
        """Record what is done already; trouble with that is logged and nothing else."""
        problem = await self._try_to_add(self._entry(Phase.DONE, who, origin, action, arguments), NOTE_S)
        if problem:
            self.log.warning("not in the audit trail", action=action, error=problem)

    @asynccontextmanager
    async def recorded(self, who: str, origin: str, action: str, arguments: Arguments = ()) -> AsyncIterator[None]:
        """Record a change that is made by the body. Raises `NotRecorded` before it, and whatever it raises.

        A body that is broken off leaves the change `unknown`, which is what it is.
        """
        entry = await self.begin(who, origin, action, arguments)
        try:
            yield
        except Exception as error:
            await self.end(entry, failed=True, detail=_why(error))
            raise
        await self.end(entry, failed=False)


def recorded_orders(handlers: Mapping[str, Handler], recorder: Recorder) -> dict[str, Handler]:
    """Return handlers of which those that change something on an operator's order record it."""
    return {
        method: handler if method not in ORDERS else _recording(ORDERS[method], handler, recorder)
        for method, handler in handlers.items()
    }


def _recording(action: str, handler: Handler, recorder: Recorder) -> Handler:
    async def record(body: Any, caller: Any) -> Any:
        if caller.role not in (PeerRole.OPERATOR, None):
            return await handler(body, caller)  # a service that does its own work
        who, _, origin = caller.name.rpartition(" ")
        try:
            entry = await recorder.begin(who, origin, action, arguments_of(body))
        except NotRecorded as error:
            return Refused(Refusal.NO_STORE, detail=str(error))
        try:
            reply = await handler(body, caller)
        except Exception as error:
            await recorder.end(entry, failed=True, detail=_why(error))
            raise
        refused = isinstance(reply, Refused)
        await recorder.end(entry, failed=refused, detail=_came_of(reply))
        return reply

    return record


def _why(error: Exception) -> str:
    """Return the reason that a person is told: of nested groups that of the first error."""
    found: BaseException = error
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return str(getattr(found, "message", "")) or str(found) or type(found).__name__


def _came_of(reply: Any) -> str:
    """Return a refusal as code and detail, and of what was made or moved its ids."""
    if isinstance(reply, Refused):
        return str(reply)
    named = ((name, getattr(reply, name, None)) for name in ("realm", "group", "hsm", "source", "destination"))
    return " ".join(f"{name} {value.hex()}" for name, value in named if isinstance(value, bytes) and value)
