"""Check tenants' outboxes: no event lost, every checksum right, counters equal to the cursor (agent.md 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import checksum, decode_event
from juicebox_hsm.adapters.stores.check import Progress, Report
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.ports.errors import StoreInvalid

PROGRESS_ROWS: Final = 5_000
_TENANTS: Final = "SELECT number, tenant, tail, published, removed FROM outbox_tenants WHERE realm = ? ORDER BY tenant"
_ROWS: Final = "SELECT seq, grp, idx, when_ms, bare, data, sum FROM outbox WHERE tenant = ? ORDER BY seq"


def check_outbox(
    db: apsw.Connection,
    realm_number: int,
    realm: RealmId,
    groups: Mapping[bytes, int],
    report: Report,
    progress: Progress,
) -> None:
    """Check all tenants of a realm. `groups` maps the realm's groups to their numbers."""
    by_number = {number: GroupId(group) for group, number in groups.items()}
    for number, tenant, tail, published, removed in fetch(db, _TENANTS, (realm_number,)):
        where = f"realm {realm.hex()}, tenant {tenant}"
        if not 0 <= published <= tail:
            report.add(where, f"the outbox cursor is at {published}, the sequence ends at {tail}")
        expected = published + 1
        rows = lost = 0
        for seq, grp, index, when_ms, bare, data, total in db.execute(_ROWS, (number,)):
            rows += 1
            report.events += 1
            if rows % PROGRESS_ROWS == 0:
                progress(f"events of {tenant}", rows, tail - removed)
            if seq > published:
                if seq != expected:
                    lost += seq - expected
                    report.add(where, f"events {expected} to {seq - 1} are missing from the outbox")
                expected = seq + 1
            if seq > tail:
                report.add(where, f"event {seq} lies behind the end of the sequence at {tail}")
            _check_row(where, tenant, seq, by_number.get(grp), index, when_ms, bare, data, total, report)
        if expected <= tail:
            lost += tail + 1 - expected
            report.add(where, f"events {expected} to {tail} are missing from the outbox")
        gone = tail - removed - rows - lost
        if gone > 0:
            report.add(where, f"{gone} published events are missing from the outbox")
        elif gone < 0:
            report.add(where, f"the outbox has {-gone} more events than its sequence")
        counted = fetch_one(db, "SELECT coalesce(sum(count), 0) FROM counters WHERE tenant = ?", (number,))
        if counted != published:
            report.add(where, f"the counters tell {counted} requests, the cursor {published}")


def _check_row(
    where: str,
    tenant: str,
    seq: int,
    group: GroupId | None,
    index: int,
    when_ms: int,
    bare: int,
    data: bytes,
    total: int | None,
    report: Report,
) -> None:
    if group is None:
        report.add(where, f"event {seq} is of a group that is not in this realm")
        return
    if total is not None and total != checksum(data):
        report.add(where, f"event {seq} was altered: wrong checksum")
        return
    try:
        event = decode_event(data, tenant, group, index, when_ms)
    except (StoreInvalid, ValueError):
        report.add(where, f"event {seq} is damaged")
        return
    if (event.event is None) != bool(bare):
        report.add(where, f"event {seq} was altered: it does not have the body its row says")
