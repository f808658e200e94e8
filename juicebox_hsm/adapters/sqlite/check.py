"""Check a whole file: logs, trees, certificates, outbox, and SQLite's own structure (operator-tools.md 5).

Everything is read in one snapshot beside running agents. What the trees hold is checked against the roots in the logs,
node by node; a log against its chain of MACs and against checksums that find damage, and with a realm's MAC key against
the MACs themselves, which find forgery. Without the key somebody who writes checksums too can alter an entry unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import apsw

from juicebox_hsm.adapters.sqlite.check_logs import check_log
from juicebox_hsm.adapters.sqlite.check_outbox import check_outbox
from juicebox_hsm.adapters.sqlite.check_trees import TreeWalk
from juicebox_hsm.adapters.sqlite.layout import rows_of_realm
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import entries_size
from juicebox_hsm.adapters.sqlite.snapshot import open_snapshot
from juicebox_hsm.adapters.store_check import GroupTail, Progress, Report, check_ranges, trees_of
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.ids import GroupId, RealmId


def check_file(path: Path, macs: Mapping[RealmId, Macs], progress: Progress) -> Report:
    """Check the file; blocks for about 20 us per log entry and 15 us per tree node.

    `macs` are the MAC keys of the realms whose entries and certificates are to be verified. Raises `LocalError` and
    `StoreUnavailable` when the file cannot be read at all.
    """
    report = Report()
    with open_snapshot(path) as db:
        progress("file", 0, 0)
        try:
            for (line,) in db.execute("PRAGMA quick_check(20)"):
                if line != "ok":
                    report.add("file", str(line))
            for number, realm in fetch(db, "SELECT number, realm FROM realms"):
                report.realms += 1
                _check_realm(db, number, RealmId(realm), macs.get(RealmId(realm)), report, progress)
        except apsw.CorruptError as error:
            report.add("file", f"damaged, the rest was not checked: {error}")
    return report


def _check_realm(
    db: apsw.Connection, number: int, realm: RealmId, macs: Macs | None, report: Report, progress: Progress
) -> None:
    tails: dict[GroupId, GroupTail] = {}
    groups = fetch(db, "SELECT number, grp FROM groups WHERE realm = ? ORDER BY grp", (number,))
    for group_number, group in groups:
        tail = check_log(db, realm, GroupId(group), group_number, macs, report, progress)
        report.groups += 1
        if tail is not None:
            tails[GroupId(group)] = tail
    check_ranges(realm, tails, report)
    walk = TreeWalk(db, number, report, progress)
    before = report.nodes
    for group, tail in tails.items():
        for partition, kind in trees_of(group, tail, tails):
            walk.check(f"realm {realm.hex()}, group {group.hex()}, {kind}", partition)
    stored = _stored_nodes(db, number)
    report.garbage += max(0, stored - (report.nodes - before))
    check_outbox(db, number, realm, {grp: num for num, grp in groups}, report, progress)


def _stored_nodes(db: apsw.Connection, realm: int) -> int:
    """Count the nodes that are stored; pages that cannot be read count for nothing."""
    total: int = fetch_one(db, "SELECT count(*) FROM roots WHERE realm = ?", (realm,))
    for (head,) in db.execute("SELECT substr(data, 1, 5) FROM tree WHERE id BETWEEN ? AND ?", rows_of_realm(realm)):
        total += entries_size(head) or 0
    return total
