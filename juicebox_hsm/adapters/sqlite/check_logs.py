"""Check groups' logs and certificates: rows, chain, checksums, MACs (hsm.md 4, agent.md 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import apsw

from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import checksum, decode_certificate, decode_entries, decode_intents
from juicebox_hsm.adapters.sqlite.schema import INDEX_BITS, INDEX_MAX
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import ZERO_MAC, LogEntry
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports import StoreInvalid

PROGRESS_ROWS: Final = 500
_ROWS: Final = "SELECT id, last, mac, entries, intents, sum FROM log WHERE id BETWEEN ? AND ? ORDER BY id"
_ROW_OF: Final = "SELECT entries FROM log WHERE id BETWEEN ? AND ? AND last >= ? ORDER BY id LIMIT 1"


class LogReport(Protocol):
    """A part of `check.Report`."""

    entries: int
    verified_macs: int

    def add(self, where: str, what: str) -> None:
        """Keep a finding."""
        ...


@dataclass(frozen=True, slots=True)
class GroupTail:
    """Where a group's log begins and ends: the first index still there, and the last entry."""

    first: int
    entry: LogEntry


def group_bounds(number: int) -> tuple[int, int]:
    """Return the smallest and the largest row id of a group's log."""
    return number << INDEX_BITS, (number << INDEX_BITS) + INDEX_MAX


def check_log(
    db: apsw.Connection,
    realm: RealmId,
    group: GroupId,
    number: int,
    macs: Macs | None,
    report: LogReport,
    progress: Callable[[str, int, int], None],
) -> GroupTail | None:
    """Check one group's log and certificate; return its ends, None when it has no readable entry."""
    where = f"realm {realm.hex()}, group {group.hex()}"
    low, high = group_bounds(number)
    rows = fetch_one(db, "SELECT count(*) FROM log WHERE id BETWEEN ? AND ?", (low, high))
    first: LogEntry | None = None
    before: LogEntry | None = None
    for at, (row, last, mac, packed, intents, total) in enumerate(db.execute(_ROWS, (low, high))):
        if at % PROGRESS_ROWS == 0:
            progress(f"log of group {group.hex()[:8]}", at, rows)
        try:
            entries = decode_entries(packed)
            asked = None if intents is None else decode_intents(intents)
        except StoreInvalid as error:
            report.add(where, f"the row of entries {row & INDEX_MAX} to {last} is damaged: {error}")
            continue
        if total is not None and total != checksum(packed, intents):
            report.add(where, f"the row of entries {row & INDEX_MAX} to {last} was altered: wrong checksum")
        if not entries or (entries[0].index, entries[-1].index, entries[-1].entry_mac) != (row & INDEX_MAX, last, mac):
            report.add(where, f"the row of entries {row & INDEX_MAX} to {last} holds other entries than it says")
        if asked is not None and len(asked) != len(entries):
            report.add(where, f"the row of entries {row & INDEX_MAX} to {last} has {len(asked)} intents")
        for entry in entries:
            _check_link(where, before, entry, report)
            if macs is not None:
                report.verified_macs += 1
                if not macs.verify_log_entry(realm, group, entry):
                    report.add(where, f"entry {entry.index} was altered: its MAC is not that of its content")
            before = entry
            first = first or entry
        report.entries += len(entries)
    if first is None or before is None:
        if rows or fetch_one(db, "SELECT count(*) FROM settled WHERE grp = ? AND idx > 0", (number,)):
            report.add(where, "no entry of the log is left")
        return None
    tail = GroupTail(first.index, before)
    _check_certificate(db, where, realm, group, number, tail, macs, report)
    settled = fetch_one(db, "SELECT idx FROM settled WHERE grp = ?", (number,)) or 0
    recorded = fetch_one(db, "SELECT max(idx) FROM outbox WHERE grp = ?", (number,)) or 0
    if max(settled, recorded) > before.index:
        report.add(where, f"entries {before.index + 1} to {max(settled, recorded)} are missing: their events are there")
    return tail


def _check_link(where: str, before: LogEntry | None, entry: LogEntry, report: LogReport) -> None:
    """Check that an entry follows the one before it; before the first readable one stands the certificate."""
    if before is None:
        if entry.index == 1 and entry.prev_mac != ZERO_MAC:
            report.add(where, "entry 1 was altered: it follows something")
    elif entry.index != before.index + 1:
        report.add(where, f"entries {before.index + 1} to {entry.index - 1} are missing")
    elif entry.prev_mac != before.entry_mac:
        report.add(where, f"entry {entry.index} does not follow entry {before.index}: one of them was altered")


def _check_certificate(
    db: apsw.Connection,
    where: str,
    realm: RealmId,
    group: GroupId,
    number: int,
    tail: GroupTail,
    macs: Macs | None,
    report: LogReport,
) -> None:
    """Check the newest certificate: it covers what was compacted and speaks of entries that are there."""
    newest = fetch(db, "SELECT idx, data FROM certificates WHERE grp = ? ORDER BY idx DESC LIMIT 1", (number,))
    if not newest:
        if tail.first > 1:
            report.add(where, f"entries 1 to {tail.first - 1} are missing and there is no commit certificate")
        return
    index, data = newest[0]
    try:
        certificate = decode_certificate(data, index, realm, group)
    except StoreInvalid as error:
        report.add(where, f"the commit certificate at {index} is damaged: {error}")
        return
    if index < tail.first:
        report.add(where, f"entries {index} to {tail.first - 1} are missing: the commit certificate is at {index}")
    if not certificate.captures or len({captured.hsm for captured in certificate.captures}) < len(certificate.captures):
        report.add(where, f"the commit certificate at {index} does not name different HSMs")
    for captured in certificate.captures:
        if captured.index < index:
            report.add(where, f"the commit certificate at {index} has a capture at {captured.index}")
        elif captured.index > tail.entry.index:
            lost = f"entries {tail.entry.index + 1} to {captured.index} are missing"
            report.add(where, f"{lost}: HSM {captured.hsm.hex()} captured them")
        elif captured.mac != (_mac_at(db, number, captured.index) or captured.mac):
            report.add(where, f"entry {captured.index} is not the one that HSM {captured.hsm.hex()} captured")
        if macs is not None and not macs.verify_captured(captured):
            report.add(where, f"the commit certificate at {index} has a forged capture of HSM {captured.hsm.hex()}")


def _mac_at(db: apsw.Connection, number: int, index: int) -> bytes | None:
    """Return the MAC of the entry at `index`, None when it is not there."""
    low, _ = group_bounds(number)
    packed = fetch_one(db, _ROW_OF, (low, low + index, index))
    try:
        entries = [] if packed is None else decode_entries(packed)
    except StoreInvalid:
        return None
    return next((entry.entry_mac for entry in entries if entry.index == index), None)
