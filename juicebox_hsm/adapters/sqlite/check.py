"""Check a whole file: logs, trees, certificates, outbox, and SQLite's own structure (operator-tools.md 5).

Everything is read in one snapshot beside running agents. What the trees hold is checked against the roots in the logs,
node by node; a log against its chain of MACs and against checksums that find damage, and with a realm's MAC key against
the MACs themselves, which find forgery. Without the key somebody who writes checksums too can alter an entry unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import apsw

from juicebox_hsm.adapters.sqlite.check_logs import GroupTail, check_log
from juicebox_hsm.adapters.sqlite.check_outbox import check_outbox
from juicebox_hsm.adapters.sqlite.check_trees import TreeWalk
from juicebox_hsm.adapters.sqlite.layout import rows_of_realm
from juicebox_hsm.adapters.sqlite.reads import fetch, fetch_one
from juicebox_hsm.adapters.sqlite.rows import entries_size
from juicebox_hsm.adapters.sqlite.snapshot import open_snapshot
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import Partition, TransferringOut
from juicebox_hsm.ids import GroupId, RealmId

FINDINGS_MAX: Final = 1_000
"""Findings that are kept; a destroyed file has millions, and the first tell enough."""

Progress = Callable[[str, int, int], None]
"""Called now and then with the phase, how much of it is done, and the whole (0: unknown)."""


@dataclass(slots=True)
class Report:
    """What was looked at and what is wrong. `garbage` counts nodes that no root leads to: harmless, only space."""

    realms: int = 0
    groups: int = 0
    entries: int = 0
    verified_macs: int = 0
    records: int = 0
    nodes: int = 0
    garbage: int = 0
    events: int = 0
    findings: list[str] = field(default_factory=list)
    more_findings: int = 0

    def add(self, where: str, what: str) -> None:
        """Keep a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(f"{where}: {what}")
        else:
            self.more_findings += 1

    def counts(self) -> dict[str, int]:
        """Return the numbers without the findings."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


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
    _check_ranges(realm, tails, report)
    walk = TreeWalk(db, number, report, progress)
    before = report.nodes
    for group, tail in tails.items():
        for partition, kind in _trees(group, tail, tails):
            walk.check(f"realm {realm.hex()}, group {group.hex()}, {kind}", partition)
    stored = _stored_nodes(db, number)
    report.garbage += max(0, stored - (report.nodes - before))
    check_outbox(db, number, realm, {grp: num for num, grp in groups}, report, progress)


def _trees(group: GroupId, tail: GroupTail, tails: Mapping[GroupId, GroupTail]) -> list[tuple[Partition, str]]:
    """Return the trees that a group's last entry answers for: what it owns, and what it gave and nobody took yet."""
    trees = []
    entry = tail.entry
    if entry.partition is not None:
        trees.append((entry.partition, "owned tree"))
    marker = entry.transferring
    if isinstance(marker, TransferringOut):
        taken = tails.get(marker.destination)
        consumed = dict(taken.entry.consumed) if taken is not None else {}
        if consumed.get(group, 0) < marker.at:
            trees.append((marker.partition, f"tree on its way to group {marker.destination.hex()}"))
    return trees


def _check_ranges(realm: RealmId, tails: Mapping[GroupId, GroupTail], report: Report) -> None:
    owned = sorted(
        ((tail.entry.partition.range, group) for group, tail in tails.items() if tail.entry.partition is not None),
        key=lambda item: item[0].start,
    )
    for (first, one), (second, other) in pairwise(owned):
        if first.overlaps(second):
            report.add(f"realm {realm.hex()}", f"groups {one.hex()} and {other.hex()} own overlapping ranges")


def _stored_nodes(db: apsw.Connection, realm: int) -> int:
    """Count the nodes that are stored; pages that cannot be read count for nothing."""
    total: int = fetch_one(db, "SELECT count(*) FROM roots WHERE realm = ?", (realm,))
    for (head,) in db.execute("SELECT substr(data, 1, 5) FROM tree WHERE id BETWEEN ? AND ?", rows_of_realm(realm)):
        total += entries_size(head) or 0
    return total
