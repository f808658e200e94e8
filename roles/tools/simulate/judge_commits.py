"""What commits: one history per group, guesses counted once, replies released once, ranges owned once (I1 to I5, I12).

The committed entries of all groups, applied in the order in which they are known to be committed, are the one true
history of every record. Each released reply, each abandoned mac and each owner is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator

from juicebox_hsm.consensus.types import LogEntry, TransferringOut
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import ResultKind
from juicebox_hsm.hsm.records import NOT_REGISTERED, Record, Registered
from juicebox_hsm.hsm.state import WitnessState
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RecordId
from juicebox_hsm.wire.client import encode_noise_response
from roles.tools.simulate.judge_ledger import Leadership, Ledger, state_of
from roles.tools.simulate.judge_rules import require


class Commits:
    """The committed history. `chains`: group -> index -> mac; `histories`: record -> its entries' macs in order."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.chains: dict[GroupId, dict[int, bytes]] = {}
        self.heads: dict[GroupId, LogEntry] = {}
        self.histories: dict[RecordId, list[bytes]] = {}
        self.current: dict[RecordId, Record] = {}
        self.replies: dict[bytes, tuple[GroupId, int, bytes]] = {}
        """Released replies as they travel, and the entries that they belong to."""
        self._spent: dict[RecordId, int] = {}

    def observe(self, name: str, hsm: Hsm, request: m.Commit, response: m.CommitOk) -> list[LogEntry]:
        """Take in a commit; return the entries that are known to be committed only now, oldest first."""
        ledger, group = self._ledger, request.group
        leadership = ledger.leaderships.get((name, group))
        if leadership is None:
            require("I3", condition=False, detail=f"HSM {name} committed without leading")
            return []
        rises = response.committed >= leadership.committed
        require("I11", rises, f"HSM {name} fell from {leadership.committed} to {response.committed}")
        leadership.committed = response.committed
        configuration = state_of(hsm).groups[group].configuration
        head = self._head(hsm, request, response, configuration)
        fresh = self._extend(group, head)
        self._check_ownership()
        for mac, reply, result in response.responses:
            self._check_release(name, leadership, mac, result, request, configuration)
            self.replies[encode_noise_response(reply)] = (group, ledger.entries[group][mac].index, mac)
        self._check_abandoned(name, group, leadership, response, fresh)
        return fresh

    def _head(self, hsm: Hsm, request: m.Commit, response: m.CommitOk, members: tuple[HsmId, ...]) -> LogEntry:
        """Return the entry that a commit speaks of: the first of the log, or what the votes prove."""
        role = state_of(hsm).groups[request.group].role
        known = self._ledger.entries[request.group]
        if not isinstance(role, WitnessState):
            element = role.log.get(role.log.first)
            is_first = element is not None and role.log.first == response.committed
            require("I9", is_first, "the first entry of a log is not the committed one")
            if element is not None:
                return element.entry
        heads: dict[bytes, LogEntry] = {}
        for vote in request.captures:
            entry = known.get(vote.mac) if vote.group == request.group and vote in self._ledger.statements else None
            while entry is not None and entry.index > response.committed:
                entry = known.get(entry.prev_mac)
            if entry is not None and entry.index == response.committed and self._proven(request, entry, members):
                heads[entry.entry_mac] = entry
        require("I3", len(heads) == 1, f"the commit of {response.committed} is not proven by its votes")
        return next(iter(heads.values()))

    def _proven(self, request: m.Commit, entry: LogEntry, members: tuple[HsmId, ...]) -> bool:
        ledger = self._ledger
        voters = {
            vote.hsm
            for vote in request.captures
            if vote.group == request.group
            and vote.hsm in members
            and vote in ledger.statements
            and ledger.is_ancestor(request.group, (entry.index, entry.entry_mac), vote.mac)
        }
        return 2 * len(voters) > len(members)

    def _extend(self, group: GroupId, head: LogEntry) -> list[LogEntry]:
        """Add what is new up to `head` to the group's history and apply it."""
        chain, known = self.chains.setdefault(group, {}), self._ledger.entries[group]
        fresh: list[LogEntry] = []
        entry: LogEntry | None = head
        while entry is not None and entry.index not in chain:
            fresh.append(entry)
            entry = known.get(entry.prev_mac)
        if entry is not None:
            same = chain[entry.index] == entry.entry_mac
            require("I2", same, f"two entries {entry.index} of {group.hex()} are committed")
        fresh.reverse()
        for entry in fresh:
            chain[entry.index] = entry.entry_mac
            self._apply(known.get(entry.prev_mac), entry)
        if fresh and head.index >= self.heads.get(group, head).index:
            self.heads[group] = head
        return fresh

    def _apply(self, parent: LogEntry | None, entry: LogEntry) -> None:
        """Run one committed entry against the one true state of the records (I1, I5)."""
        nodes, partition = self._ledger.nodes, entry.partition
        if partition is None:
            return
        owned = None if parent is None or parent.partition is None else parent.partition
        for record in self._arriving(None if owned is None else owned.range, partition.range):
            arrived = nodes.record(partition, record) == self.current[record]
            require("I5", arrived, f"record {record.hex()} arrived with a range in a state it no longer had")
        touched = self._ledger.touched.get(entry.entry_mac)
        if touched is None or owned is None:
            return
        record, result = touched[0]  # of several requests none changed anything
        before, after = nodes.record(owned, record), nodes.record(partition, record)
        current = self.current.get(record, NOT_REGISTERED)
        require("I5", before == current, f"a request of record {record.hex()} ran on a state that was not the last")
        self._count(record, before, after, result)
        self.current[record] = after
        self.histories.setdefault(record, []).append(entry.entry_mac)

    def _arriving(self, before: OwnedRange | None, after: OwnedRange) -> Iterator[RecordId]:
        """Return the known records that an entry brings into its group's range."""
        if before == after:
            return
        for record in self.current:
            if after.contains(record) and not (before is not None and before.contains(record)):
                yield record

    def _count(self, record: RecordId, before: Record, after: Record, result: m.ResultType) -> None:
        if result.kind is ResultKind.REGISTER2 or (result.kind is ResultKind.RECOVER3 and result.recovered):
            self._spent[record] = 0
        elif result.kind is ResultKind.RECOVER2 and result.guess_count is not None:
            counted = (
                isinstance(before, Registered)
                and isinstance(after, Registered)
                and after.guess_count == before.guess_count + 1 == result.guess_count
            )
            require("I1", counted, f"a guess at record {record.hex()} was not counted")
            self._spent[record] = self._spent.get(record, 0) + 1
            left = isinstance(before, Registered) and self._spent[record] <= before.limit
            require("I1", left, f"record {record.hex()} had more guesses than its limit")
        else:
            kept = not isinstance(before, Registered) or not isinstance(after, Registered) or before == after
            require("I1", kept, f"{result.kind.value} changed record {record.hex()}")

    def _check_ownership(self) -> None:
        """I4: every record has at most one owner, and none while its range is in flight."""
        owned = [(group, head.partition.range) for group, head in self.heads.items() if head.partition is not None]
        for at, (group, own) in enumerate(owned):
            for other, theirs in owned[at + 1 :]:
                require("I4", not own.overlaps(theirs), f"{group.hex()} and {other.hex()} own the same records")
        for source, head in self.heads.items():
            marker = head.transferring
            if not isinstance(marker, TransferringOut):
                continue
            taken = self.heads.get(marker.destination)
            if taken is None or dict(taken.consumed).get(source, 0) < marker.at:
                free = not any(theirs.overlaps(marker.partition.range) for _, theirs in owned)
                require("I4", free, f"a range on its way from {source.hex()} is owned by a group")

    def _check_release(
        self,
        name: str,
        leadership: Leadership,
        mac: bytes,
        result: m.ResultType,
        request: m.Commit,
        members: tuple[HsmId, ...],
    ) -> None:
        entry = self._ledger.entries[request.group].get(mac)
        if entry is None or self.chains[request.group].get(entry.index) != mac:
            require("I3", condition=False, detail=f"HSM {name} released a reply that is not committed")
            return
        require("I3", self._proven(request, entry, members), f"HSM {name} released {entry.index} without a majority")
        fate = leadership.fates.get(mac)
        require("I12", fate == "pending", f"HSM {name} released the reply of {entry.index}, which was {fate}")
        require("I3", leadership.results[mac] == result, f"HSM {name} released another result than it made")
        leadership.fates[mac] = "released"

    def _check_abandoned(
        self, name: str, group: GroupId, leadership: Leadership, response: m.CommitOk, fresh: list[LogEntry]
    ) -> None:
        known, chain = self._ledger.entries[group], self.chains[group]
        for mac in response.abandoned:
            once = leadership.fates.get(mac, "pending") == "pending" and mac not in leadership.abandoned
            require("I12", once, f"HSM {name} abandoned an entry twice, or after its reply went out")
            if mac in leadership.fates:
                leadership.fates[mac] = "abandoned"
            leadership.abandoned.add(mac)
        for mac in leadership.fates:
            index = known[mac].index
            true = index > response.committed or chain[index] == mac
            require("I12", true, f"HSM {name} counts entry {index} as committed, which is a rival's")
        alive = not any(entry.entry_mac in leadership.abandoned for entry in fresh)
        require("I12", alive, f"HSM {name} committed what it had abandoned")
