"""What checks of a store share, whatever the back end: the report, and the rules of logs, ranges and trees.

A log is checked against its chain of MACs and, with a realm's MAC key, against the MACs themselves; the trees against
the roots that the logs name, node by node (operator-tools.md 5; hsm.md 4; merkle.md 2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Final

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import ZERO_MAC, Certificate, LogEntry, Partition, TransferringOut
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import (
    GroupId,
    HsmId,
    OwnedRange,
    RealmId,
    uncovered,
)
from juicebox_hsm.merkle.kernel import node_hash
from juicebox_hsm.merkle.nodes import HASH_BYTES, KEY_BITS, BadEncoding

SLICE_BITS: Final = 7
SLICES: Final = 1 << SLICE_BITS
"""Trees are checked in slices of record ids by their first bits: what is done after each of them can be kept. Seven
bits are a byte of a row key on Bigtable (storage.md 2.2)."""
FINDINGS_MAX: Final = 1_000
"""Findings that are kept; a destroyed store has millions, and the first tell enough."""
_LEFT: Final = 1
_RIGHT: Final = 2

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
    tails: list[LogTail] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Keep a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(f"{where}: {what}")
        else:
            self.more_findings += 1

    def counts(self) -> dict[str, int]:
        """Return the numbers without the findings."""
        return {name: getattr(self, name) for name in _COUNTS}

    def take(self, other: Report) -> None:
        """Add what another report counted and found."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        room = FINDINGS_MAX - len(self.findings)
        self.findings += other.findings[:room]
        self.more_findings += max(0, len(other.findings) - room)


_COUNTS: Final = tuple(each.name for each in fields(Report) if each.type == "int")


@dataclass(frozen=True, slots=True)
class LogTail:
    """Where a group's log ends in a store, the MACs of the entries that are there, and the HSMs that wrote those."""

    realm: RealmId
    group: GroupId
    last: int
    macs: dict[int, bytes]
    writers: frozenset[HsmId]


def tail_of(realm: RealmId, group: GroupId, entries: Iterable[LogEntry]) -> LogTail:
    """Return what a restore, or an HSM's word, is compared with; `entries` in order, perhaps none."""
    kept = list(entries)
    macs = {entry.index: entry.entry_mac for entry in kept}
    return LogTail(realm, group, max(macs, default=0), macs, frozenset(entry.hsm for entry in kept))


class Checkpoint:
    """What was checked of the trees so far, kept in a file after each slice so that a stopped check can go on.

    `trees` is the report of the slices that are done, `nodes` how many nodes of the present realm they have. Without
    a path nothing is kept. Raises `LocalError` for a file that cannot be read or written, or is of another store.
    """

    def __init__(self, path: Path | None = None, store: str = "") -> None:
        self._path = path
        self._store = store
        self._at: tuple[str, int] = ("", -1)
        self.trees = Report()
        self.nodes = 0
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._at = (str(kept["realm"]), int(kept["slice"]))
            self.nodes = int(kept["nodes"])
            for name in _COUNTS:
                setattr(self.trees, name, int(kept["counts"][name]))
            self.trees.findings = [str(line) for line in kept["findings"]]
            store = str(kept["store"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LocalError(f"{path}: not the position of a check ({error}); remove it to begin anew") from None
        if store != self._store:
            raise LocalError(f"{path}: is the position of a check of {store}; remove it to begin anew")

    @property
    def is_resumed(self) -> bool:
        """Tell whether an earlier check left something."""
        return self._at[1] >= 0

    def is_done(self, realm: RealmId, number: int) -> bool:
        """Tell whether a slice of a realm was checked; realms MUST come in order of their ids."""
        return (realm.hex(), number) <= self._at

    def done(self, realm: RealmId, number: int) -> None:
        """Keep that a slice was checked."""
        self._at = (realm.hex(), number)
        if self._path is None:
            return
        kept = {
            "store": self._store,
            "realm": realm.hex(),
            "slice": number,
            "nodes": self.nodes,
            "counts": self.trees.counts(),
            "findings": self.trees.findings,
        }
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            part.write_text(json.dumps(kept), encoding="utf-8")
            part.replace(self._path)
        except OSError as error:
            raise LocalError(f"{self._path}: cannot be written: {error.strerror}") from None

    def finish(self) -> None:
        """Remove the file: the check got to its end."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def slice_of(number: int) -> tuple[int, int]:
    """Return the first and the last record id of a slice, as integers."""
    first = number << (KEY_BITS - SLICE_BITS)
    return first, first + (1 << (KEY_BITS - SLICE_BITS)) - 1


@dataclass(frozen=True, slots=True)
class GroupTail:
    """Where a group's log begins and ends: the first index still there, and the last entry."""

    first: int
    entry: LogEntry


# --- logs --------------------------------------------------------------------------------------------


def check_link(where: str, before: LogEntry | None, entry: LogEntry, report: Report) -> None:
    """Check that an entry follows the one before it; before the first readable one stands the certificate."""
    if before is None:
        if entry.index == 1 and entry.prev_mac != ZERO_MAC:
            report.add(where, "entry 1 was altered: it follows something")
    elif entry.index != before.index + 1:
        report.add(where, f"entries {before.index + 1} to {entry.index - 1} are missing")
    elif entry.prev_mac != before.entry_mac:
        report.add(where, f"entry {entry.index} does not follow entry {before.index}: one of them was altered")


def check_certificate(
    where: str,
    certificate: Certificate,
    tail: GroupTail,
    mac_at: Callable[[int], bytes | None],
    macs: Macs | None,
    report: Report,
) -> None:
    """Check the newest certificate: it covers what was compacted and speaks of entries that are there.

    `mac_at` returns the MAC of the entry at an index, None when it is not there.
    """
    index = certificate.index
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
        elif captured.mac != (mac_at(captured.index) or captured.mac):
            report.add(where, f"entry {captured.index} is not the one that HSM {captured.hsm.hex()} captured")
        if macs is not None and not macs.verify_captured(captured):
            report.add(where, f"the commit certificate at {index} has a forged capture of HSM {captured.hsm.hex()}")


def check_ranges(realm: RealmId, tails: Mapping[GroupId, GroupTail], report: Report) -> None:
    """Check that every record has one owner: a group, or a transfer that is on its way."""
    where = f"realm {realm.hex()}"
    owned = [(tail.entry.partition.range, group) for group, tail in tails.items() if tail.entry.partition is not None]
    owned.sort(key=lambda item: item[0].start)
    for (first, one), (second, other) in pairwise(owned):
        if first.overlaps(second):
            report.add(where, f"groups {one.hex()} and {other.hex()} own overlapping ranges")
    trees = [partition.range for group, tail in tails.items() for partition, _ in trees_of(group, tail, tails)]
    for gap in uncovered(trees):
        report.add(where, f"no group owns the records from {gap.start.hex()} to {gap.end.hex()}")


# --- trees -------------------------------------------------------------------------------------------


def trees_of(group: GroupId, tail: GroupTail, tails: Mapping[GroupId, GroupTail]) -> list[tuple[Partition, str]]:
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


def is_intact(encoding: bytes, expected: bytes, key: bytes, bounds: OwnedRange | None) -> bool:
    """Tell whether a node (encoding) has the hash that the node above it, or the log, names.

    `key` is the 32-byte record id of a leaf, else b""; `bounds` the tree's range of a root, else None.
    """
    try:
        return node_hash(encoding, key, bounds) == expected
    except BadEncoding:
        return False


def branches(encoding: bytes, record: int, nbits: int) -> list[tuple[int, int, bytes]]:
    """Return (bits so far as an integer of 256, their number, hash) of the children of an intact node, right first."""
    found = []
    at = 2
    for flag in (_LEFT, _RIGHT):
        if not encoding[1] & flag:
            continue
        length = encoding[at] << 8 | encoding[at + 1]
        end = at + 2 + ((length + 7) >> 3)
        prefix = int.from_bytes(encoding[at + 2 : end], "big") >> (-length & 7)
        below = nbits + length
        found.append((record | prefix << (KEY_BITS - below), below, encoding[end : end + HASH_BYTES]))
        at = end + HASH_BYTES
    return found[::-1]


def node_name(record: int, nbits: int) -> str:
    """Return what findings call a node: its record, or the bits above it in hex and their number."""
    key = record.to_bytes(KEY_BITS // 8, "big").hex()
    return f"record {key}" if nbits == KEY_BITS else f"node 0x{key[: (nbits + 3) // 4]}/{nbits}"
