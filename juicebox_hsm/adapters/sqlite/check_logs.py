"""Check groups' logs and certificates: rows, chain, checksums, MACs (hsm.md 4, agent.md 10)."""

from __future__ import annotations

from collections import deque
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import checksum, decode_certificate, decode_entries, decode_intents
from juicebox_hsm.adapters.sqlite.schema import INDEX_BITS, INDEX_MAX
from juicebox_hsm.adapters.stores.check import (
    GroupTail,
    Progress,
    Report,
    check_certificate,
    check_link,
    tail_of,
)
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreInvalid

PROGRESS_ROWS: Final = 500
RECENT_ENTRIES: Final = 100_000
"""Entries of a log's end that captures are compared with; older ones are compacted as a rule."""
_ROWS: Final = "SELECT id, last, mac, entries, intents, sum FROM log WHERE id BETWEEN ? AND ? ORDER BY id"
_ROW_OF: Final = "SELECT entries FROM log WHERE id BETWEEN ? AND ? AND last >= ? ORDER BY id LIMIT 1"


def group_bounds(number: int) -> tuple[int, int]:
    """Return the smallest and the largest row id of a group's log."""
    return number << INDEX_BITS, (number << INDEX_BITS) + INDEX_MAX


def check_log(
    db: apsw.Connection,
    realm: RealmId,
    group: GroupId,
    number: int,
    macs: Macs | None,
    report: Report,
    progress: Progress,
) -> GroupTail | None:
    """Check one group's log and certificate; return its ends, None when it has no readable entry."""
    where = f"realm {realm.hex()}, group {group.hex()}"
    low, high = group_bounds(number)
    rows = fetch_one(db, "SELECT count(*) FROM log WHERE id BETWEEN ? AND ?", (low, high))
    first: LogEntry | None = None
    before: LogEntry | None = None
    recent: deque[LogEntry] = deque(maxlen=RECENT_ENTRIES)
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
            check_link(where, before, entry, report)
            if macs is not None:
                report.verified_macs += 1
                if not macs.verify_log_entry(realm, group, entry):
                    report.add(where, f"entry {entry.index} was altered: its MAC is not that of its content")
            before = entry
            first = first or entry
            recent.append(entry)
        report.entries += len(entries)
    report.tails.append(tail_of(realm, group, recent))
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


def _check_certificate(
    db: apsw.Connection,
    where: str,
    realm: RealmId,
    group: GroupId,
    number: int,
    tail: GroupTail,
    macs: Macs | None,
    report: Report,
) -> None:
    """Check the newest certificate; there is one if anything was compacted."""
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
    check_certificate(where, certificate, tail, lambda at: _mac_at(db, number, at), macs, report)


def _mac_at(db: apsw.Connection, number: int, index: int) -> bytes | None:
    """Return the MAC of the entry at `index`, None when it is not there."""
    low, _ = group_bounds(number)
    packed = fetch_one(db, _ROW_OF, (low, low + index, index))
    try:
        entries = [] if packed is None else decode_entries(packed)
    except StoreInvalid:
        return None
    return next((entry.entry_mac for entry in entries if entry.index == index), None)
