"""Check a whole file: logs, trees, certificates, outbox, and SQLite's own structure (operator-tools.md 5).

Everything is read in one snapshot beside running agents. What the trees hold is checked against the roots in the logs,
node by node; a log against its chain of MACs and against checksums that find damage, and with a realm's MAC key against
the MACs themselves, which find forgery. Without the key somebody who writes checksums too can alter an entry unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.check_logs import check_log
from juicebox_hsm.adapters.sqlite.check_outbox import check_outbox
from juicebox_hsm.adapters.sqlite.check_trees import TreeWalk
from juicebox_hsm.adapters.sqlite.layout import rows_of_realm
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import entries_size
from juicebox_hsm.adapters.sqlite.schema import INDEX_BITS
from juicebox_hsm.adapters.sqlite.snapshot import open_snapshot
from juicebox_hsm.adapters.stores.check import (
    SLICES,
    Checkpoint,
    GroupTail,
    Progress,
    Report,
    check_ranges,
    trees_of,
)
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.ids import GroupId, RealmId

_STRAY_LOG_ROWS: Final = "SELECT count(*) FROM log WHERE id >> ? NOT IN (SELECT number FROM groups)"


def check_file(
    path: Path,
    macs: Mapping[RealmId, Macs],
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    *,
    is_backup: bool = False,
) -> Report:
    """Check the file; blocks for about 20 us per log entry and 15 us per tree node.

    `macs` are the MAC keys of the realms whose entries and certificates are to be verified. With a `checkpoint` of a
    stopped check, the slices of the trees that it looked at are not looked at again; all else is. `is_backup` opens a
    file that nobody else uses, read-only. Raises `LocalError` and `StoreUnavailable` when the file cannot be read at
    all.
    """
    checkpoint = checkpoint or Checkpoint()
    report = Report()
    with open_snapshot(path, is_backup=is_backup) as db:
        progress("file", 0, 0)
        try:
            for (line,) in db.execute("PRAGMA quick_check(20)"):
                if line != "ok":
                    report.add("file", str(line))
            for number, realm in fetch(db, "SELECT number, realm FROM realms ORDER BY realm"):
                report.realms += 1
                _check_realm(db, number, RealmId(realm), macs.get(RealmId(realm)), report, progress, checkpoint)
            _check_strays(db, report)
        except apsw.CorruptError as error:
            report.add("file", f"damaged, the rest was not checked: {error}")
    report.take(checkpoint.trees)
    return report


def _check_realm(
    db: apsw.Connection,
    number: int,
    realm: RealmId,
    macs: Macs | None,
    report: Report,
    progress: Progress,
    checkpoint: Checkpoint,
) -> None:
    tails: dict[GroupId, GroupTail] = {}
    groups = fetch(db, "SELECT number, grp FROM groups WHERE realm = ? ORDER BY grp", (number,))
    for group_number, group in groups:
        tail = check_log(db, realm, GroupId(group), group_number, macs, report, progress)
        report.groups += 1
        if tail is not None:
            tails[GroupId(group)] = tail
    check_ranges(realm, tails, report)
    trees = [
        (f"realm {realm.hex()}, group {group.hex()}, {kind}", partition)
        for group, tail in tails.items()
        for partition, kind in trees_of(group, tail, tails)
    ]
    _check_trees(db, number, realm, trees, progress, checkpoint)
    check_outbox(db, number, realm, {grp: num for num, grp in groups}, report, progress)


def _check_trees(
    db: apsw.Connection,
    number: int,
    realm: RealmId,
    trees: Sequence[tuple[str, Partition]],
    progress: Progress,
    checkpoint: Checkpoint,
) -> None:
    walk = TreeWalk(db, number, checkpoint.trees)
    for at in range(SLICES):
        if checkpoint.is_done(realm, at):
            continue
        if at == 0:
            checkpoint.nodes = 0
        progress(f"trees of realm {realm.hex()[:8]}", at, SLICES)
        before = checkpoint.trees.nodes
        for where, partition in trees:
            walk.check(where, partition, at)
        checkpoint.nodes += checkpoint.trees.nodes - before
        if at == SLICES - 1:
            checkpoint.trees.garbage += max(0, _stored_nodes(db, number) - checkpoint.nodes)
        checkpoint.done(realm, at)


def _check_strays(db: apsw.Connection, report: Report) -> None:
    """Look for rows that belong to no group or realm: then a group's or a realm's own row is gone."""
    groups = fetch_one(db, "SELECT count(*) FROM groups WHERE realm NOT IN (SELECT number FROM realms)")
    if groups:
        report.add("file", f"{groups} groups are of a realm that is missing")
    rows = fetch_one(db, _STRAY_LOG_ROWS, (INDEX_BITS,))
    if rows:
        report.add("file", f"{rows} rows of logs are of a group that is missing")
    tenants = fetch_one(db, "SELECT count(*) FROM outbox_tenants WHERE realm NOT IN (SELECT number FROM realms)")
    if tenants:
        report.add("file", f"the outboxes of {tenants} tenants are of a realm that is missing")
    pages = fetch_one(db, "SELECT count(*) FROM tree")
    for (number,) in fetch(db, "SELECT number FROM realms"):
        pages -= fetch_one(db, "SELECT count(*) FROM tree WHERE id BETWEEN ? AND ?", rows_of_realm(number))
    if pages:
        report.add("file", f"{pages} pages of trees are of a realm that is missing")


def _stored_nodes(db: apsw.Connection, realm: int) -> int:
    """Count the nodes that are stored; pages that cannot be read count for nothing."""
    total: int = fetch_one(db, "SELECT count(*) FROM roots WHERE realm = ?", (realm,))
    for (head,) in db.execute("SELECT substr(data, 1, 5) FROM tree WHERE id BETWEEN ? AND ?", rows_of_realm(realm)):
        total += entries_size(head) or 0
    return total
