"""A realm of HSMs and its honest host, with a simulated store and the judge beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.events import NewEvent
from juicebox_hsm.host.log import AppendOutcome, Intent
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import Request, Response
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RecordId
from roles.tools.simulate.judge import Judge, Violation
from roles.tools.simulate.judge_events import expected_event
from roles.tools.simulate.store import SimulatedStore
from roles.tools.simulate.store_data import RealmData
from tests.fakes.hsm import Client, MemoryPlatform, World, realm_keys

LOWER = OwnedRange(FULL_RANGE.start, RecordId(b"\x7f" + b"\xff" * 31))
UPPER = OwnedRange(RecordId(b"\x80" + bytes(31)), FULL_RANGE.end)
RECORD = RecordId(b"\x20" * 32)
TENANT = "acme"
USER = "ab" * 32
NO_CHANGE = b"\x01\x50" + bytes(8)
NOW_MS = 1_700_000_000_000


class Broken(BaseException):
    """The judge found a broken rule; the test goes no further. No `except Exception` of an HSM holds it up."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.rule = violation.rule


def broken(rule: str, run: Callable[[], object]) -> None:
    """Expect that the judge stops the run with this rule."""
    with pytest.raises(Broken) as found:
        run()
    assert found.value.rule == rule, found.value


def stop(violation: Violation) -> None:
    """End the test at the first broken rule."""
    raise Broken(violation)


@dataclass
class JudgedWorld(World):
    """`stops`: broken rules end the test; otherwise they are only kept in `judge.violations`."""

    judge: Judge = field(init=False)
    shared: SimulatedStore = field(init=False)
    stops: bool = True

    def __post_init__(self) -> None:
        keys = realm_keys()
        self.shared = SimulatedStore(random.Random(0), now=lambda: 0.0)
        macs = Macs(keys.mac_key.expose())
        self.judge = judge = Judge(
            self.shared, keys.record_key.expose(), macs, lambda: 0.0, stop if self.stops else lambda _: None
        )

        class Told(MemoryPlatform):
            """A platform whose writes the judge sees."""

            def __init__(self, keys: RealmKeys, seed: tuple[object, int]) -> None:
                super().__init__(keys, seed)
                self.name = str(seed[1])

            def nvram_write(self, content: bytes) -> None:
                super().nvram_write(content)
                judge.hsm_wrote(self.name, content)

        self.platform = Told
        super().__post_init__()

    def send(self, number: int, request: Request) -> Response:
        return self.judge.hsm_handle(str(number), self.hsms[number], request)

    def crash(self, number: int) -> None:
        self.judge.hsm_crashed(str(number))
        super().crash(number)
        self.judge.hsm_started(str(number), self.hsms[number])

    def store(self, group: GroupId, entry: LogEntry | None, delta: bytes | None = None) -> None:
        super().store(group, entry, delta)
        if entry is not None:
            assert self.append(group, [entry], delta or NO_CHANGE) is AppendOutcome.APPENDED

    def append(self, group: GroupId, entries: Sequence[LogEntry], delta: bytes = NO_CHANGE) -> AppendOutcome:
        """Append to the simulated store with the intents that an agent would write."""
        if self.realm not in self.shared.data.realms:
            self.shared.data.realms[self.realm] = RealmData()
        touched = [self.judge.ledger.touched.get(entry.entry_mac) for entry in entries]
        intents = [None if each is None else Intent(TENANT, USER, each[0][0], 1) for each in touched]
        return self.shared.data.append(self.realm, group, entries, intents, delta)

    def event(self, group: GroupId, entry: LogEntry) -> NewEvent:
        """Return the true event of a client's entry."""
        record, result = self.judge.ledger.touched[entry.entry_mac][0]
        kind, body, accounting = expected_event(result)
        return NewEvent(
            TENANT, group, entry.index, entry.entry_mac, record, USER, kind, body, accounting, NOW_MS + entry.index
        )

    def record_events(self, group: GroupId, *entries: LogEntry) -> None:
        """Write the true rows of these entries."""
        events = [self.event(group, entry) for entry in entries]
        self.shared.data.record(self.realm, TENANT, events, None)

    def user(self) -> Client:
        """Return a client of the one record that tests use."""
        return self.client(RECORD)

    def grouped(self) -> GroupId:
        """Make a group of all HSMs, led by HSM 0, that owns everything."""
        group = self.new_group(list(range(self.size)), 0)
        self.move(self.first, 0, group, 0, FULL_RANGE)
        return group


@pytest.fixture
def world() -> JudgedWorld:
    """Return three HSMs of one realm."""
    return JudgedWorld(3)
