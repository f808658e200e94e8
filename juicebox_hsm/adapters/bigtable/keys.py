"""Name rows: log, certificates, users, discovery, leases, outbox (storage.md 2). Tree rows: merkle.md 3.4.

Indexes and sequence numbers are stored *downward*, as 2^64-1 minus the number: then the newest comes first in key
order, and no scan ever has to go backwards.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.adapters.bigtable.codec import KeyRange
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.events import TENANT_BYTES_MAX, is_recordable
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import ID_BYTES, GroupId, RealmId, RecordId
from juicebox_hsm.ports.errors import StoreInvalid

TOP: Final = 2**64 - 1
LOG_KEY_BYTES: Final = ID_BYTES + 8
_CERTIFICATE_MARK: Final = b"\xff" * 8
_EVENTS: Final = b"\x00"
_CURSOR: Final = b"\x01"
_SETTLED: Final = b"\x02"
_ACKNOWLEDGED: Final = b"\x03"
_BEHIND: Final = b"\x04"
_USERS_PREFIX_BYTES: Final = 65  # ":" and 64 hex digits, counted from the right


def downward(number: int) -> bytes:
    """Return the 8 bytes under which index or sequence `number` (0..2^64-1) sorts before smaller ones."""
    return (TOP - number).to_bytes(8, "big")


def upward(stored: bytes) -> int:
    """Return the number that `downward` stored."""
    if len(stored) != 8:
        raise StoreInvalid(f"a stored index has {len(stored)} bytes instead of 8")
    return TOP - int.from_bytes(stored, "big")


# --- log ---------------------------------------------------------------------------------------------


def log_key(group: GroupId, index: int) -> bytes:
    """Return the key of the log row whose first entry is `index`."""
    return group + downward(index)


def log_index(key: bytes) -> int:
    """Return the first index of a log row."""
    return upward(key[ID_BYTES:])


def log_range(group: GroupId, newest: int, oldest: int, *, newest_open: bool = False) -> KeyRange:
    """Return the rows that start at `newest` down to `oldest`; both saturate at the ends of the numbers."""
    return KeyRange(log_key(group, min(newest, TOP)), log_key(group, max(oldest, 0)), newest_open)


def certificate_key(group: GroupId, index: int) -> bytes:
    """Return the key of the certificate of index `index`: after every entry row of the group."""
    return group + _CERTIFICATE_MARK + downward(index)


def certificate_range(group: GroupId, below: int | None = None) -> KeyRange:
    """Return all certificates of a group, or those of an index smaller than `below`."""
    end = certificate_key(group, 0)
    return KeyRange(certificate_key(group, TOP if below is None else below), end, start_open=below is not None)


# --- users -------------------------------------------------------------------------------------------


def check_tenant(tenant: str) -> bytes:
    """Return the tenant's name as bytes. Raises `LocalError` for one that no row key can carry."""
    if not is_recordable(tenant):
        raise LocalError(f"a tenant name has 1..{TENANT_BYTES_MAX} bytes and no control characters: {tenant[:40]!r}")
    return tenant.encode()


def user_key(tenant: str, record: RecordId) -> bytes:
    """Return the key of a record's accounting row."""
    return check_tenant(tenant) + b":" + record.hex().encode()


def user_tenant(key: bytes) -> str:
    """Return the tenant of an accounting row; names may contain colons, so it is parsed from the right."""
    if len(key) <= _USERS_PREFIX_BYTES or key[-_USERS_PREFIX_BYTES] != ord(":"):
        raise StoreInvalid(f"a row of the users table has a strange key of {len(key)} bytes")
    return key[:-_USERS_PREFIX_BYTES].decode()


# --- cluster -----------------------------------------------------------------------------------------


def address_key(kind: ServiceKind, url: str) -> bytes:
    """Return the key of a registration."""
    return kind.value.encode() + url.encode()


def address_range(kind: ServiceKind) -> KeyRange:
    """Return all registrations of a kind."""
    start = kind.value.encode()
    return KeyRange(start, bytes((start[0] + 1,)), end_open=True)


def audit_key(when_ms: int, change: bytes, phase: str) -> bytes:
    """Return the key of an entry of the audit trail."""
    return downward(when_ms) + change + phase.encode()


def audit_range(since_ms: int) -> KeyRange:
    """Return the entries of a moment (Unix ms) and later."""
    return KeyRange(b"\x00", downward(since_ms) + b"\xff" * 32)


def whole_table() -> KeyRange:
    """Return a range that holds every key we write: none begins with 0xff but those of group ids, which go on."""
    return KeyRange(b"\x00", b"\xff" * 64)


# --- outbox ------------------------------------------------------------------------------------------


def event_key(tenant: bytes, seq: int) -> bytes:
    """Return the key of the outbox row whose first event is `seq`."""
    return tenant + _EVENTS + downward(seq)


def event_range(tenant: bytes, newest: int, oldest: int) -> KeyRange:
    """Return the outbox rows that start at `newest` down to `oldest`."""
    return KeyRange(event_key(tenant, min(newest, TOP)), event_key(tenant, max(oldest, 0)))


def cursor_key(tenant: bytes) -> bytes:
    """Return the key of a tenant's cursor row, which follows its events."""
    return tenant + _CURSOR


def after_tenant(tenant: bytes) -> bytes:
    """Return the first key behind all rows of a tenant."""
    return tenant + _BEHIND


def acknowledged_key(tenant: bytes, block: int) -> bytes:
    """Return the key of the acknowledgements of a block of sequence numbers."""
    return tenant + _ACKNOWLEDGED + block.to_bytes(8, "big")


def acknowledged_range(tenant: bytes, below: int) -> KeyRange:
    """Return the acknowledgements of the blocks below one."""
    return KeyRange(acknowledged_key(tenant, 0), acknowledged_key(tenant, below), end_open=True)


def tenant_of(key: bytes) -> bytes:
    """Return the tenant of an event or cursor row."""
    for at, byte in enumerate(key):
        if byte < 0x20:
            return key[:at]
    raise StoreInvalid("a row of the outbox has no tenant")


def settled_key(group: GroupId) -> bytes:
    """Return the key of a group's settled index."""
    return _SETTLED + group


def settled_range() -> KeyRange:
    """Return all settled indexes."""
    return KeyRange(_SETTLED, b"\x03", end_open=True)


# --- tables ------------------------------------------------------------------------------------------


def realm_tables(realm: RealmId) -> tuple[str, str, str, str]:
    """Return the names of a realm's log, merkle, users and outbox tables."""
    name = realm.hex()
    return f"{name}-log", f"{name}-merkle", f"{name}-users", f"{name}-outbox"
