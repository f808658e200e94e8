"""Logs, trees and ranges as they lie in the store: one chain, every node accounted for, every record owned once.

A log may only hold what an HSM made, an HSM may only capture what is in its log, and what is committed is there. The
trees that the logs' last entries name are whole, and nothing else is kept but what is on its way out.
"""

from __future__ import annotations

from collections.abc import Sequence

from juicebox_hsm.adapters.stores.check import (
    GroupTail,
    Report,
    branches,
    check_certificate,
    check_link,
    check_ranges,
    is_intact,
    trees_of,
)
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry, Partition
from juicebox_hsm.host.log import Intent
from juicebox_hsm.ids import GroupId, OwnedRange
from juicebox_hsm.merkle.nodes import KEY_BITS
from roles.tools.simulate.judge_commits import Commits
from roles.tools.simulate.judge_ledger import Ledger
from roles.tools.simulate.judge_rules import require
from roles.tools.simulate.store_data import GroupLog, RealmData, StoreData


class StoreJudge:
    """Watches the store. `logged`: group -> index -> mac of everything that was ever appended."""

    def __init__(self, data: StoreData, ledger: Ledger, commits: Commits, macs: Macs) -> None:
        self._data = data
        self._ledger = ledger
        self._commits = commits
        self._macs = macs
        self.logged: dict[GroupId, dict[int, bytes]] = {}
        self.intents: dict[tuple[GroupId, int, bytes], Intent] = {}
        self._linked: dict[GroupId, int] = {}

    def appended(self, group: GroupId, entries: Sequence[LogEntry], intents: Sequence[Intent | None]) -> None:
        """Check a batch at the moment it is in the log."""
        made, log = self._ledger.entries.get(group, {}), self.logged.setdefault(group, {})
        for entry, intent in zip(entries, intents, strict=True):
            where = f"entry {entry.index} of {group.hex()}"
            require("chain", made.get(entry.entry_mac) == entry, f"{where} was made by no HSM")
            require("chain", entry.index not in log, f"{where} was appended twice")
            log[entry.index] = entry.entry_mac
            asked = [record for record, _ in self._ledger.touched.get(entry.entry_mac, ())]
            right = not asked if intent is None else intent.record_id in asked
            require("events", right, f"{where} has a wrong intent")
            if intent is not None:
                self.intents[group, entry.index, entry.entry_mac] = intent

    def captured(self, name: str, group: GroupId, index: int, mac: bytes) -> None:
        """Check a head that an HSM captured: only what the store acknowledged goes to members (agent.md 7)."""
        logged = self.logged.get(group, {}).get(index)
        require("chain", logged == mac, f"HSM {name} captured entry {index} of {group.hex()}, which is not in the log")

    def committed(self, group: GroupId, entries: Sequence[LogEntry]) -> None:
        """Check that what is committed is in the log."""
        log = self.logged.get(group, {})
        for entry in entries:
            there = log.get(entry.index) == entry.entry_mac
            require("chain", there, f"entry {entry.index} of {group.hex()} is committed and not in the log")

    # --- looks at the whole -----------------------------------------------------------------------------

    def check_logs(self) -> None:
        """Check chains (what is new since the last look), certificates, and who owns which records."""
        for realm_id, realm in self._data.realms.items():
            report = Report()
            tails = self._tails(realm)
            for group, tail in tails.items():
                self._check_chain(group, realm.groups[group], tail, report)
            require("chain", not report.findings, lambda found=report: found.findings[0])  # type: ignore[misc]
            if tails:
                check_ranges(realm_id, tails, report)
                require("ranges", not report.findings, lambda found=report: found.findings[0])  # type: ignore[misc]

    def _tails(self, realm: RealmData) -> dict[GroupId, GroupTail]:
        found = {}
        for group, log in realm.groups.items():
            last = log.last
            if last is not None:
                first = next(row.first for row in log.rows if row.entries)
                found[group] = GroupTail(first, last)
        return found

    def _check_chain(self, group: GroupId, log: GroupLog, tail: GroupTail, report: Report) -> None:
        where = f"log of {group.hex()}"
        before: LogEntry | None = None
        seen = self._linked.get(group, 0)
        for row in log.rows[log.position(seen) :]:
            for entry in row.entries:
                if before is not None or entry.index == 1:
                    check_link(where, before, entry, report)
                before = entry
        self._linked[group] = tail.entry.index
        compacted = self._compacted(log)
        certificates = log.certificates.now
        require("chain", not compacted or certificates, f"{where} is compacted and has no certificate")
        if certificates:
            newest = certificates[max(certificates)]
            chain = self._commits.chains.get(group, {})
            proven = newest.index in chain
            require("chain", proven, f"{where} has a certificate of {newest.index}, which is not committed")
            if compacted:
                check_certificate(where, newest, tail, self.logged[group].get, self._macs, report)

    def _compacted(self, log: GroupLog) -> bool:
        return not log.rows[0].entries or log.rows[0].first > 1

    def check_trees(self) -> None:
        """Check that the trees are whole and that nothing else is stored but what is on its way out."""
        self._data.settle()
        for realm in self._data.realms.values():
            tails = self._tails(realm)
            reached: dict[bytes, None] = {}
            for group, tail in tails.items():
                for partition, what in trees_of(group, tail, tails):
                    _walk(realm, partition, f"{what} of {group.hex()}", reached)
            leaving = {node: written for _, node, written in realm.doomed}
            for node, (_, written) in realm.nodes.items():
                kept = node in reached or leaving.get(node) == written
                require("tree", kept, f"node {node.hex()} is stored and no tree leads to it")


def _walk(realm: RealmData, partition: Partition, what: str, reached: dict[bytes, None]) -> None:
    """Visit a tree's nodes and compare each with the hash that leads to it."""
    waiting: list[tuple[bytes, int, int]] = [(partition.root_hash, 0, 0)]
    while waiting:
        node, record, nbits = waiting.pop()
        found = realm.nodes.get(node)
        if found is None:
            require("tree", condition=False, detail=f"a node of the {what} at depth {nbits} is missing")
            return
        reached[node] = None
        bounds: OwnedRange | None = None if nbits else partition.range
        key = record.to_bytes(KEY_BITS // 8, "big") if nbits == KEY_BITS else b""
        require("tree", is_intact(found[0], node, key, bounds), f"a node of the {what} at depth {nbits} is altered")
        if nbits < KEY_BITS:
            waiting += [(child, prefix, below) for prefix, below, child in branches(found[0], record, nbits)]
