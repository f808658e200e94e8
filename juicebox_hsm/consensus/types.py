"""Log entries, captures and roles: the values every part of a realm exchanges (hsm.md 1).

Plain data; the CBOR forms live in `consensus.codec`, the MACs over them in `consensus.macs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId

MAC_BYTES: Final = 32
ZERO_MAC: Final = bytes(MAC_BYTES)
GROUP_MEMBERS_MAX: Final = 9
GROUPS_PER_HSM_MAX: Final = 16
CONSUMED_SOURCES_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Partition:
    """A key range and the root hash (32 bytes) of the tree over it."""

    range: OwnedRange
    root_hash: bytes


@dataclass(frozen=True, slots=True)
class TransferringIn:
    """The marker of a destination that prepared; `at` is the index of the entry where it first appeared."""

    source: GroupId
    range: OwnedRange
    at: int


@dataclass(frozen=True, slots=True)
class TransferringOut:
    """The marker of a source that gave `partition` away; `at` is the index where it first appeared."""

    destination: GroupId
    partition: Partition
    at: int


Transferring = TransferringIn | TransferringOut


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of a group's log. `index` starts at 1; `prev_mac` of entry 1 is 32 zero bytes.

    `consumed` maps source groups to the highest source index whose transfer was taken in (H2), sorted by group.
    `retired` ends the log: no HSM makes an entry after one that has it (I20).
    """

    index: int
    partition: Partition | None
    transferring: Transferring | None
    prev_mac: bytes
    entry_mac: bytes
    hsm: HsmId
    consumed: tuple[tuple[GroupId, int], ...] = ()
    retired: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """A signed statement that `hsm` persisted (`index`, `mac`) as the head of the group's log it follows."""

    hsm: HsmId
    realm: RealmId
    group: GroupId
    index: int
    mac: bytes
    statement: bytes


@dataclass(frozen=True, slots=True)
class Leader:
    """Leading; `starting` is the first index this leadership may create."""

    starting: int


@dataclass(frozen=True, slots=True)
class SteppingDown:
    """Releasing what was created, accepting nothing new."""

    leader_starting: int


@dataclass(frozen=True, slots=True)
class Witness:
    """Capturing only."""


Role = Leader | SteppingDown | Witness


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """A role and the role clock at which it was entered (hsm.md 6.3)."""

    role: Role
    at: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """Captures of a strict majority that prove a commit at `index` (agent.md 10)."""

    index: int
    captures: tuple[Captured, ...]
