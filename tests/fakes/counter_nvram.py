"""NVRAM with a counter in hardware (hardware.md 2.2): the host owns the files, but neither their key nor the counter.

The host may keep every envelope it ever saw, put any of them back, of any HSM, and cut the power between any two steps.
What it cannot do is to turn the counter back. `RewindablePlatform` and `UnsealedPlatform` are what goes wrong without
the counter and without the re-sealing at a start; tests show that the difference is seen.
"""

from __future__ import annotations

import hashlib

from juicebox_hsm.crypto.sealing import KEY_BYTES, NONCE_BYTES, SealError, open_sealed, seal
from juicebox_hsm.errors import RealmError
from juicebox_hsm.hsm.keys import RealmKeys
from tests.fakes.hsm import MemoryPlatform

_COUNTER_BYTES = 8


class RollbackRefused(RealmError):
    """No file carries the hardware's count: an old image, another HSM's, a damaged one, or none. No start."""


class PowerCut(Exception):
    """The machine stopped between two steps of a write or of a start."""


class CounterPlatform(MemoryPlatform):
    """One HSM's platform. `files` is what lies on the host's disk, `envelopes` everything that ever did.

    `cut_after` is how many steps (a file written, the counter advanced) succeed before the power fails.
    """

    reseals = True

    def __init__(self, keys: RealmKeys, seed: object = 0, *, clock_start: int = 1) -> None:
        super().__init__(keys, seed, clock_start=clock_start)
        self.counter = 0
        self.files: list[bytes] = []
        self.envelopes: list[bytes] = []
        self.cut_after: int | None = None
        self._key = hashlib.blake2s(f"wrapping{seed}".encode(), digest_size=KEY_BYTES).digest()

    # steps --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Let one step pass, or fail it."""
        if self.cut_after is not None:
            if self.cut_after == 0:
                raise PowerCut
            self.cut_after -= 1

    def _prepare(self, counter: int, payload: bytes) -> None:
        self._step()
        envelope = seal(self._key, self.random(NONCE_BYTES), counter.to_bytes(_COUNTER_BYTES, "big") + payload)
        self.envelopes.append(envelope)
        self.files = [*self.files[-1:], envelope]

    def _advance(self) -> None:
        self._step()
        self.counter += 1

    def _open(self, envelope: bytes) -> tuple[int, bytes] | None:
        try:
            content = open_sealed(self._key, envelope)
        except SealError:
            return None
        return int.from_bytes(content[:_COUNTER_BYTES], "big"), content[_COUNTER_BYTES:]

    # the platform -------------------------------------------------------------------------------------------

    def nvram_write(self, content: bytes) -> None:
        self._prepare(self.counter + 1, content)
        self._advance()
        self._step()  # the power may also fail before the caller hears of it
        self.nvram = content
        self.history.append(content)

    def nvram_read(self) -> bytes:
        """Start: choose the file, make every other one useless, and only then serve. Raises `RollbackRefused`."""
        counter, payload = self.choose([found for file in self.files if (found := self._open(file)) is not None])
        if counter == self.counter + 1:  # the power failed between the two steps of a write
            self._advance()
        if self.reseals:
            self._prepare(self.counter + 2, payload)
            self._advance()
            self._advance()
        self.nvram = payload
        if payload and payload not in self.history:
            self.history.append(payload)
        return payload

    def choose(self, found: list[tuple[int, bytes]]) -> tuple[int, bytes]:
        """Return (count, payload) of the newest file that the hardware's count admits."""
        if not self.envelopes and self.counter == 0:
            return 0, b""  # the very first start
        admitted = [file for file in found if self.counter <= file[0] <= self.counter + 1]
        if not admitted:
            raise RollbackRefused(f"no file carries the count {self.counter}")
        return max(admitted)


class UnsealedPlatform(CounterPlatform):
    """A platform that does not re-seal at a start: a write that the power interrupted stays usable beside the next."""

    reseals = False


class RewindablePlatform(CounterPlatform):
    """A platform without freshness, as the file backend is: it starts from whatever file it is shown."""

    def choose(self, found: list[tuple[int, bytes]]) -> tuple[int, bytes]:
        """Return the last file that opens."""
        if not found and not self.envelopes:
            return 0, b""
        if not found:
            raise RollbackRefused("no file is of this HSM")
        return self.counter, found[-1][1]
