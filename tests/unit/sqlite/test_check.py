"""The check of a whole file: silent on a good one, and each planted fault is found and named."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from juicebox_hsm.adapters.sqlite.check import check_file
from juicebox_hsm.adapters.sqlite.layout import leaf_id
from juicebox_hsm.adapters.sqlite.rows import checksum, decode_entries, encode_entries
from juicebox_hsm.adapters.stores.check import Report
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import Captured, Certificate, LogEntry, Partition
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.ids import FULL_RANGE, HsmId, RecordId
from juicebox_hsm.merkle.kernel import empty_root
from tests.emulator.realm_data import GROUP, HSM, NO_CHANGE, REALM, Grown, append, certificate, event
from tests.patience import HANGS_S

MACS = Macs(b"m" * 32)
RECORDS = 60
EMPTY_ROOT, EMPTY_TREE = empty_root(FULL_RANGE.start, FULL_RANGE.end)


def check(path: Path, *, macs: Macs | None = None) -> Report:
    """Check a file."""
    return check_file(path, {} if macs is None else {REALM: macs}, lambda phase, done, whole: None)


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Make a file with a log of several rows, a tree, a certificate and an outbox that is published in part."""
    rng = random.Random(5)
    file = tmp_path / "realm.db"
    async with open_store(f"sqlite:{file}") as store:
        await store.realms.create_realm(REALM)
        grown = await Grown.start(store)
        for _ in range(RECORDS // 5):
            await grown.write({RecordId(rng.randbytes(32)): rng.randbytes(40) for _ in range(5)})
        rows = await store.log.list_rows(REALM, GROUP, 4)
        await store.log.write_certificate(REALM, GROUP, certificate(6))
        await store.log.compact(REALM, GROUP, rows)
        body: dict[str, str | int] = {"event": "deleted"}
        await store.outbox.record(REALM, [event(n, body=body if n % 2 else None) for n in range(1, 11)], {GROUP: 10})
        await store.outbox.advance(REALM, "acme", 0, 6, "20231114", {EventKind.RECOVER2: 6})
        await store.outbox.remove_published(REALM, 0, 100)
    return file


def test_findings_are_limited() -> None:
    """A destroyed file fills no memory: the first 1,000 findings are kept, the others counted."""
    report = Report()
    for number in range(1_234):
        report.add("group aa", f"entry {number} is missing")
    assert len(report.findings) == 1_000
    assert report.findings[-1] == "group aa: entry 999 is missing"
    assert report.more_findings == report.counts()["more_findings"] == 234


def alter(path: Path, statement: str, *values: Any) -> None:
    """Change the file behind the program's back."""
    connection = apsw.Connection(str(path))
    connection.execute(statement, values)
    assert connection.changes() > 0
    connection.close()


async def test_a_good_file_has_no_findings(path: Path) -> None:
    """Nothing is wrong with what the store wrote, and everything was looked at."""
    report = check(path)
    assert report.findings == []
    assert (report.realms, report.groups, report.records, report.garbage) == (1, 1, RECORDS, 0)
    assert report.entries == 1 + RECORDS // 5 - 3
    assert report.events == 7
    assert report.nodes > RECORDS


def _alter_entry(path: Path) -> str:
    connection = apsw.Connection(str(path))
    row, packed = connection.execute("SELECT id, entries FROM log ORDER BY id LIMIT 1 OFFSET 3").fetchone() or (0, b"")
    (old,) = decode_entries(packed)
    assert old.partition is not None
    new = replace(old, partition=replace(old.partition, root_hash=b"\x66" * 32))
    connection.execute("UPDATE log SET entries = ? WHERE id = ?", (encode_entries([new]), row))
    connection.close()
    return f"entries {old.index} to {old.index} was altered"


def _alter_leaf(path: Path) -> str:
    connection = apsw.Connection(str(path))
    row, data = connection.execute("SELECT id, data FROM tree WHERE id & 15 = 15 LIMIT 1 OFFSET 7").fetchone() or (
        0,
        b"",
    )
    ((place, piece),) = msgspec.msgpack.decode(data).items()
    altered = {place: piece[:-1] + bytes([piece[-1] ^ 1])}
    connection.execute("UPDATE tree SET data = ? WHERE id = ?", (msgspec.msgpack.encode(altered), row))
    connection.close()
    assert row == leaf_id(1, int.from_bytes(place, "big"))
    return f"record {place.hex()} was altered"


def _simple(statement: str, says: str) -> Callable[[Path], str]:
    def plant(path: Path) -> str:
        alter(path, statement)
        return says

    return plant


FAULTS = {
    "altered entry": _alter_entry,
    "altered intents": _simple("UPDATE log SET intents = x'91c0' WHERE id & 0xffff = 8", "wrong checksum"),
    "missing entry": _simple("DELETE FROM log WHERE id & 0xffff = 8", "entries 8 to 8 are missing"),
    "missing first entries": _simple("DELETE FROM log WHERE id & 0xffff < 8", "entries 6 to 7 are missing"),
    "missing last entry": _simple("DELETE FROM log WHERE id & 0xffff >= 9", "entries 9 to 10 are missing"),
    "missing group": _simple("DELETE FROM log; DELETE FROM groups", "no group owns the records from 0000"),
    "group without its row": _simple("DELETE FROM groups", "rows of logs are of a group that is missing"),
    "missing realm": _simple("DELETE FROM realms", "groups are of a realm that is missing"),
    "trees without a realm": _simple("DELETE FROM realms; DELETE FROM groups; DELETE FROM log", "pages of trees"),
    "missing log": _simple("DELETE FROM log", "no entry of the log is left"),
    "missing certificate": _simple("DELETE FROM certificates", "entries 1 to 3 are missing"),
    "altered certificate": _simple("UPDATE certificates SET data = x'90'", "does not name different HSMs"),
    "garbled row": _simple("UPDATE log SET entries = x'00' WHERE id & 0xffff = 8", "is damaged"),
    "altered leaf": _alter_leaf,
    "missing leaf": _simple(
        "DELETE FROM tree WHERE id = (SELECT id FROM tree WHERE id & 15 = 15 LIMIT 1)", "is missing"
    ),
    "missing page": _simple("DELETE FROM tree WHERE id = (SELECT min(id) FROM tree)", "node 0x0/1 is missing"),
    "garbled page": _simple("UPDATE tree SET data = x'c0' WHERE id = (SELECT min(id) FROM tree)", "is damaged"),
    "missing root": _simple("DELETE FROM roots", "the root node"),
    "lost waiting event": _simple("DELETE FROM outbox WHERE seq = 8", "events 8 to 8 are missing"),
    "lost last event": _simple("DELETE FROM outbox WHERE seq = 10", "events 10 to 10 are missing"),
    "lost published event": _simple("DELETE FROM outbox WHERE seq = 3", "1 published events are missing"),
    "altered event": _simple("UPDATE outbox SET data = x'00' WHERE seq = 3", "event 3 was altered"),
    "hidden event": _simple("UPDATE outbox SET bare = 1 WHERE seq = 3", "event 3 was altered"),
    "altered cursor": _simple("UPDATE outbox_tenants SET published = 7", "the counters tell 6 requests, the cursor 7"),
    "altered counters": _simple("UPDATE counters SET count = 5", "the counters tell 5 requests"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_planted_faults_are_found(path: Path, name: str) -> None:
    """Each fault is found and said where it is."""
    says = FAULTS[name](path)
    assert [line for line in check(path).findings if says in line], check(path).findings


async def test_unreachable_nodes_are_counted_not_blamed(path: Path) -> None:
    """Nodes no root leads to are garbage: counted, no finding."""
    alter(path, "INSERT INTO roots VALUES (1, x'01', x'02')")
    report = check(path)
    assert (report.findings, report.garbage) == ([], 1)


def _signed(index: int, before: LogEntry | None) -> LogEntry:
    blank = LogEntry(
        index, Partition(FULL_RANGE, EMPTY_ROOT), None, bytes(32) if before is None else before.entry_mac, b"", HSM
    )
    return replace(blank, entry_mac=MACS.log_entry(REALM, GROUP, blank))


async def test_the_key_finds_forgery(tmp_path: Path) -> None:
    """With the MAC key an entry rewritten with its checksum is found, and so is a forged capture."""
    file = tmp_path / "realm.db"
    entries: list[LogEntry] = []
    for index in range(1, 5):
        entries.append(_signed(index, entries[-1] if entries else None))
    mac = entries[-1].entry_mac
    captures = tuple(
        Captured(
            HsmId(bytes([n]) * 16), REALM, GROUP, 4, mac, MACS.captured(HsmId(bytes([n]) * 16), REALM, GROUP, 4, mac)
        )
        for n in (1, 2)
    )
    async with open_store(f"sqlite:{file}") as store:
        await store.realms.create_realm(REALM)
        for entry in entries:
            await append(store, [entry], delta=EMPTY_TREE if entry.index == 1 else NO_CHANGE)
        await store.log.write_certificate(REALM, GROUP, Certificate(3, captures))
    assert check(file, macs=MACS).findings == []
    assert check(file, macs=MACS).verified_macs == 4
    packed = encode_entries([replace(entries[1], hsm=HsmId(b"\x99" * 16))])
    alter(file, "UPDATE log SET entries = ?, sum = ? WHERE id & 0xffff = 2", packed, checksum(packed, None))
    assert check(file).findings == [], "only the key can tell"
    (found,) = check(file, macs=MACS).findings
    assert "entry 2 was altered" in found
    assert any("forged capture" in line for line in check(file, macs=Macs(b"x" * 32)).findings)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """A missing file and a foreign one are an operator's error, not a finding, and nothing is made."""
    foreign = tmp_path / "foreign.db"
    foreign.write_bytes(b"hello" * 200)
    for file in (tmp_path / "missing.db", foreign):
        with pytest.raises(LocalError, match=file.name):
            check(file)
    assert list(tmp_path.iterdir()) == [foreign]


def _overwrite_pages(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    for at in range(8 * 4096, len(raw), 4096):
        raw[at : at + 64] = b"\xee" * 64
    path.write_bytes(raw)


async def test_a_damaged_file_is_a_finding(path: Path) -> None:
    """Pages overwritten on disk are reported, whatever else can still be read."""
    _overwrite_pages(path)
    assert check(path).findings


async def test_beside_a_writer(path: Path) -> None:
    """A check sees one state while the store is written, and disturbs nothing."""
    async with open_store(f"sqlite:{path}") as store:
        began = time.monotonic()
        last = await store.log.read_last(REALM, GROUP)
        assert last is not None
        assert check(path).findings == []
        await store.outbox.record(REALM, [event(3)], {})
        assert time.monotonic() - began < HANGS_S
