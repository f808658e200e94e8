"""What checks of a store share, whatever the back end: the report, and the rules of logs, ranges and trees.

A log is checked against its chain of MACs and, with a realm's MAC key, against the MACs themselves; the trees against
the roots that the logs name, node by node (operator-tools.md 5; hsm.md 4; merkle.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Final

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import ZERO_MAC, Certificate, LogEntry, Partition, TransferringOut
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId
from juicebox_hsm.merkle.kernel import node_hash
from juicebox_hsm.merkle.nodes import BadEncoding

FINDINGS_MAX: Final = 1_000
"""Findings that are kept; a destroyed store has millions, and the first tell enough."""
HASH_BYTES: Final = 32
LEAF_BITS: Final = 256
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

    def add(self, where: str, what: str) -> None:
        """Keep a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(f"{where}: {what}")
        else:
            self.more_findings += 1

    def counts(self) -> dict[str, int]:
        """Return the numbers without the findings."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


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
    """Check that no two groups own the same records."""
    owned = sorted(
        ((tail.entry.partition.range, group) for group, tail in tails.items() if tail.entry.partition is not None),
        key=lambda item: item[0].start,
    )
    for (first, one), (second, other) in pairwise(owned):
        if first.overlaps(second):
            report.add(f"realm {realm.hex()}", f"groups {one.hex()} and {other.hex()} own overlapping ranges")


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
        found.append((record | prefix << (LEAF_BITS - below), below, encoding[end : end + HASH_BYTES]))
        at = end + HASH_BYTES
    return found[::-1]


def node_name(record: int, nbits: int) -> str:
    """Return what findings call a node: its record, or the bits above it in hex and their number."""
    key = record.to_bytes(LEAF_BITS // 8, "big").hex()
    return f"record {key}" if nbits == LEAF_BITS else f"node 0x{key[: (nbits + 3) // 4]}/{nbits}"
