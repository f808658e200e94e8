"""A fresh Bigtable instance per test on one emulator, and transports that lose requests or answers (own)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from google.cloud.bigtable_v2.types.bigtable import CheckAndMutateRowResponse

from juicebox_hsm.adapters.bigtable.backend import Tuning, open_bigtable
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Metadata, Transport
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.store import Store

_instances = itertools.count(1)
QUICK_RETRY = RetryProfile(first_s=0.001, cap_s=0.01, attempts_max=6, total_s=5.0)


class BigtableBackend:
    """One instance that nobody else uses."""

    def __init__(self, emulator: str) -> None:
        self.rest = f"test/i{os.getpid()}-{next(_instances)}?emulator={emulator}"
        self.tuning = Tuning(deletion_delay_s=0.02)

    def open(self, tuning: Tuning | None = None) -> AbstractAsyncContextManager[Store]:
        """Open the instance."""
        return open_bigtable(self.rest, tuning=tuning or self.tuning)

    def open_with(self, faults: Faults, deletion_delay_s: float = 0.02) -> AbstractAsyncContextManager[Store]:
        """Open the instance through a transport that misbehaves as told."""
        return self.open(Tuning(deletion_delay_s=deletion_delay_s, retry=QUICK_RETRY, wrap=faults.wrap))


@dataclass
class Faults:
    """What goes wrong: each rule is asked with the method's name before a call; the first that answers is used up.

    `lose_request` fails the call before it is sent, `lose_answer` after it was carried out. `between` runs after
    an answer was lost and before the failure is reported. `decision` is what all conditional writes answer.
    """

    lose_request: list[str] = field(default_factory=list)
    lose_answer: list[str] = field(default_factory=list)
    cut_stream_after: list[int] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    code: str = "UNAVAILABLE"
    decision: bool | None = None
    between: Callable[[], object] | None = None
    calls: list[str] = field(default_factory=list)

    def wrap(self, transport: Transport) -> Transport:
        """Return a transport that follows the rules."""
        return _Faulty(self, transport)

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return self.calls.count(method)

    def take(self, rules: list[str], method: str) -> bool:
        """Use up a rule for `method`."""
        if method in rules:
            rules.remove(method)
            return True
        return False

    async def after_answer(self) -> None:
        """Do what happens meanwhile."""
        if self.between is not None:
            act, self.between = self.between, None
            result = act()
            if hasattr(result, "__await__"):
                await result


class _Faulty:
    """A transport between the store and the emulator."""

    def __init__(self, faults: Faults, inner: Transport) -> None:
        self._faults = faults
        self._inner = inner

    def _before(self, method: str) -> None:
        faults = self._faults
        faults.calls.append(method)
        if method in faults.dead or faults.take(faults.lose_request, method):
            raise CallFailed(faults.code, "lost on the way there")

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Send, unless a rule says otherwise."""
        name, faults = method.rpartition("/")[2], self._faults
        self._before(name)
        answer = await self._inner.unary(method, request, metadata, timeout_s)
        if faults.take(faults.lose_answer, name):
            await faults.after_answer()
            raise CallFailed(faults.code, "lost on the way back")
        if name == "CheckAndMutateRow" and faults.decision is not None:
            answer = CheckAndMutateRowResponse.serialize(CheckAndMutateRowResponse(predicate_matched=faults.decision))
        return answer

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        """Send, unless a rule says otherwise."""
        name, faults = method.rpartition("/")[2], self._faults
        self._before(name)
        messages = await self._inner.stream(method, request, metadata, timeout_s)
        if faults.take(faults.lose_answer, name):
            await faults.after_answer()
            raise CallFailed(faults.code, "lost on the way back")
        if name == "ReadRows" and faults.cut_stream_after and messages:
            raise CallFailed(faults.code, "cut", messages[: faults.cut_stream_after.pop(0)])
        return messages
