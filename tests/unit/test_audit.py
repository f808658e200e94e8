"""The audit trail: nothing changes without a record, and the record never says more than is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from juicebox_hsm.adapters.sqlite.schema import connect
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.ca_trail import FILE_NAME, CaTrail
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.audit import (
    ARGUMENTS_MAX,
    ORDERS,
    TEXT_CHARS_MAX,
    UNREADABLE,
    AuditEntry,
    Phase,
    Result,
    arguments_of,
    changes,
    decode,
    encode,
    make_entry,
)
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire import rpc
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS
from juicebox_hsm.wire.rpc import Done, Empty, PeerRole, Refusal, Refused
from roles.audit import NotRecorded, Recorder, recorded_orders
from tests.emulator.contract_audit import NOW_MS, audit_entry


class Trail:
    """Entries in memory; the additions whose number is in `lost` fail."""

    def __init__(self, *lost: int) -> None:
        self.entries: list[AuditEntry] = []
        self.lost = lost
        self.asked = 0

    async def add(self, entry: AuditEntry) -> None:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.asked in self.lost:
            raise StoreUnavailable("the store is down")
        self.entries.append(entry)

    async def read(self, since_ms: int, entries_max: int) -> list[AuditEntry]:
        return self.entries


@dataclass(frozen=True)
class Caller:
    """Who calls, as handlers see it."""

    role: PeerRole | None
    name: str = "operator/me 127.0.0.1:9"


def _recorder(trail: Trail, said: list[str] | None = None) -> Recorder:
    told = [] if said is None else said
    return Recorder(trail, "m1", lambda: NOW_MS, structlog.get_logger(), lambda: told.append("unknown"))


def _results(trail: Trail) -> list[Result]:
    return [change.result for change in changes(trail.entries)]


def test_changes_pair_their_entries() -> None:
    """A change without a second entry is unknown; one whose first entry was cut off is still told."""
    lone, first, cut = (audit_entry(number, NOW_MS + number) for number in range(3))
    entries = [lone, first, first.ended(NOW_MS + 9, failed=False), cut.ended(NOW_MS + 10, failed=True, detail="why")]
    told = changes(entries)
    assert [change.result for change in told] == [Result.UNKNOWN, Result.DONE, Result.FAILED]
    assert [change.began_ms for change in told] == [NOW_MS, NOW_MS + 1, None]
    assert [change.ended_ms for change in told] == [None, NOW_MS + 9, NOW_MS + 10]
    assert told[2].entry.detail == "why"


def test_entries_are_bounded() -> None:
    """Whatever is ordered and said, an entry stays small; it is read as it was written."""
    long = "\u20ac" * 10_000
    entry = make_entry(
        bytes(16), 1, who=long, origin=long, recorded_by=long, action=long,
        arguments=tuple((f"{number}{long}", long) for number in range(1000)),
    ).ended(2, failed=True, detail=long)  # fmt: skip
    assert len(entry.arguments) == ARGUMENTS_MAX
    assert all(len(text) <= TEXT_CHARS_MAX for pair in entry.arguments for text in pair)
    assert len(encode(entry)) < 100_000
    assert decode(entry.change, entry.phase.value, entry.when_ms, encode(entry)) == entry


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"who":1}', b"[" * 100_000])
def test_damage_hides_nothing_else(data: bytes) -> None:
    """An entry that cannot be read is shown as that."""
    assert decode(bytes(16), "done", 5, data).action == UNREADABLE
    assert decode(bytes(16), "nonsense", 5, encode(audit_entry(1))).action == UNREADABLE


def test_every_order_is_known() -> None:
    """What only operators may call and changes something is recorded; a new method must be decided about."""
    operators = {
        name
        for name, method in (AGENT_METHODS | MANAGER_METHODS).items()
        if PeerRole.OPERATOR in method.callers and name != "status"
    }
    assert operators - {"tenants/reload"} == set(ORDERS)


def test_orders_name_what_they_are_about() -> None:
    """The arguments of an order are its ids and its range, and no statement or key."""
    ids = {name: bytes([number]) * 16 for number, name in enumerate(("realm", "source", "destination"), 1)}
    moved = rpc.TransferPrepare(**ids, range=rpc.Range(bytes(32), b"\x7f" + b"\xff" * 31))
    assert arguments_of(moved) == (
        *((name, value.hex()) for name, value in ids.items()), ("range", "[0x00...-0x7fff...]"),
    )  # fmt: skip
    assert arguments_of(rpc.StepdownOrder(hsm=b"h" * 16)) == (("hsm", "68" * 16),)
    made = rpc.GroupNew(b"r" * 16, [(b"a" * 16, b"S" * 99), (b"b" * 16, b"T" * 99)])
    assert arguments_of(made) == (("realm", "72" * 16), ("hsms", f"{'61' * 16} {'62' * 16}"))
    assert arguments_of(Empty()) == ()


async def test_an_order_is_recorded_before_and_after() -> None:
    """The first entry is there when the work begins, with the certificate's name; the second tells what came of it."""
    trail = Trail()
    seen: list[int] = []

    async def stepdown(body: Any, caller: Any) -> Done | Refused:
        seen.append(len(trail.entries))
        return Done() if len(seen) == 1 else Refused(Refusal.NOT_LEADER, detail="of g")

    handlers = recorded_orders({"stepdown": stepdown, "status": stepdown}, _recorder(trail))
    assert handlers["status"] is stepdown
    order = rpc.GroupCall(b"r" * 16, b"g" * 16)
    assert await handlers["stepdown"](order, Caller(PeerRole.OPERATOR)) == Done()
    assert isinstance(await handlers["stepdown"](order, Caller(PeerRole.OPERATOR)), Refused)
    assert seen == [1, 3]
    done, failed = changes(trail.entries)
    assert (done.result, done.entry.who, done.entry.origin) == (Result.DONE, "operator/me", "127.0.0.1:9")
    assert (failed.result, failed.entry.detail) == (Result.FAILED, "NotLeader: of g")
    await handlers["stepdown"](order, Caller(PeerRole.MANAGER, "manager/m1 127.0.0.1:8"))
    assert len(trail.entries) == 4, "a service's own work is no order"


async def test_what_cannot_be_recorded_is_not_done() -> None:
    """A service refuses an order, and a tool its change, when the first entry is not written."""
    begun: list[str] = []

    async def handler(body: Any, caller: Any) -> Done:
        begun.append("order")
        return Done()

    handlers = recorded_orders({"rebalance": handler}, _recorder(Trail(1)))
    reply = await handlers["rebalance"](Empty(), Caller(PeerRole.OPERATOR))
    assert isinstance(reply, Refused)
    assert reply.outcome is Refusal.NO_STORE
    assert "cannot be recorded: the store is down" in reply.detail
    with pytest.raises(NotRecorded, match="the store is down"):
        async with _recorder(Trail(1)).recorded("", "", "drain"):
            begun.append("tool")
    assert begun == []


async def test_a_result_that_is_lost_is_unknown_and_said() -> None:
    """What was done stays done; the trail says unknown, and so does the program."""
    trail, said = Trail(2), list[str]()
    async with _recorder(trail, said).recorded("", "", "drain"):
        pass
    assert said == ["unknown"]
    assert _results(trail) == [Result.UNKNOWN]


async def test_how_a_body_ends_is_how_the_change_ends() -> None:
    """An error fails it, with its words; breaking it off leaves it unknown."""
    trail = Trail()
    with pytest.raises(LocalError):
        async with _recorder(trail).recorded("", "", "drain"):
            raise LocalError("no such HSM")
    with trio.move_on_after(0.0):
        async with _recorder(trail).recorded("", "", "drain"):
            pytest.fail("cancelled before it began")
    with trio.CancelScope() as scope:
        async with _recorder(trail).recorded("", "", "drain"):
            scope.cancel()
            await trio.sleep_forever()
    assert _results(trail) == [Result.FAILED, Result.UNKNOWN]
    assert trail.entries[1].detail == "no such HSM"


async def test_a_note_never_stops_anybody(autojump_clock: trio.testing.MockClock) -> None:
    """What a manager did unasked is one entry; a trail that fails or hangs is no reason to stop."""
    trail = Trail()
    await _recorder(trail).note("manager/m1", "appoint", (("hsm", "aa"),))
    assert [(entry.phase, entry.who) for entry in trail.entries] == [(Phase.DONE, "manager/m1")]
    await _recorder(Trail(1)).note("manager/m1", "appoint")

    class Hanging(Trail):
        async def add(self, entry: AuditEntry) -> None:
            await trio.sleep_forever()

    began = trio.current_time()
    await _recorder(Hanging()).note("manager/m1", "appoint")
    assert trio.current_time() - began < 5


async def test_the_file_refuses_changes(tmp_path: Path) -> None:
    """In an SQLite store neither update nor deletion of an entry is possible, from any program."""
    path = tmp_path / "s.db"
    async with open_store(f"sqlite:{path}") as store:
        await store.audit.add(audit_entry(1))
    db = connect(path, 100)
    for statement in ("DELETE FROM audit", "UPDATE audit SET data = ''"):
        with pytest.raises(Exception, match="only added to"):
            db.execute(statement)
    assert db.execute("SELECT count(*) FROM audit").get == 1
    db.close()


async def test_a_certificate_authority_keeps_its_own(tmp_path: Path) -> None:
    """A CA's directory has a trail of its own, unreadable to others; a damaged line hides no other."""
    trail = CaTrail(tmp_path)
    assert await trail.read(0, 10) == []
    entries = [audit_entry(1), audit_entry(1).ended(NOW_MS + 1, failed=False), audit_entry(2, NOW_MS + 2)]
    for entry in (*entries, entries[0]):
        await trail.add(entry)
    assert await trail.read(0, 10) == entries
    assert await trail.read(NOW_MS + 1, 1) == entries[-1:]
    file = tmp_path / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(file.read_bytes() + b"garbage\n")
    assert [entry.action for entry in await trail.read(NOW_MS + 2, 10)] == [UNREADABLE, "stepdown"]
    assert (await trail.read(0, 10))[1:] == entries
    with pytest.raises(LocalError, match="cannot be written"):
        await CaTrail(tmp_path / "nowhere").add(entries[0])
