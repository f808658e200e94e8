"""Tenant events and accounting on their way from commit to publication (agent.md 11, storage.md 2.7)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.ids import RECORD_ID_BYTES, GroupId, RecordId
from juicebox_hsm.tenant_keys import is_event_user_id, is_tenant_name
from juicebox_hsm.wire.rpc import App

TENANT_BYTES_MAX: Final = 256
"""What a row key takes of a tenant's name. Names that pass at the doors are shorter; this is for what is stored."""


SESSION_ID_MAX: Final = 2**32 - 1


def is_well_formed(request: App) -> bool:
    """Tell whether a client's request may reach the HSM at all.

    With its entry goes an intent, with the commit an event: what no row can carry must not become an entry.
    """
    return (
        len(request.record_id) == RECORD_ID_BYTES
        and 0 <= request.session_id <= SESSION_ID_MAX
        and is_tenant_name(request.tenant)
        and is_event_user_id(request.user)
    )


def is_recordable(tenant: str) -> bool:
    """Tell whether the outbox of every store can carry a row for `tenant`."""
    try:
        raw = tenant.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(raw) <= TENANT_BYTES_MAX and all(byte >= 0x20 for byte in raw)


class EventKind(enum.Enum):
    """What an outbox row records: the request type, or `UNKNOWN` for an unconfirmed outcome."""

    REGISTER1 = "register1"
    REGISTER2 = "register2"
    RECOVER1 = "recover1"
    RECOVER2 = "recover2"
    RECOVER3 = "recover3"
    DELETE = "delete"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One committed request, before it has a sequence number.

    `event` is the tenant event's JSON body without the user, as a mapping, or None; `accounting` is
    "registered", "deleted" or None; `when_ms` is Unix milliseconds.
    """

    tenant: str
    group: GroupId
    index: int
    mac: bytes
    record_id: RecordId
    user: str
    kind: EventKind
    event: Mapping[str, str | int] | None
    accounting: str | None
    when_ms: int


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """A recorded event with its dense sequence number (from 1 per realm and tenant)."""

    seq: int
    new: NewEvent


@dataclass(frozen=True, slots=True)
class TenantCursor:
    """How far a tenant's events are published. `published` and `tail` are sequence numbers, 0 for none."""

    tenant: str
    published: int
    tail: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unpublished rows of a realm; `oldest_ms` is the Unix time in ms of the oldest, None when empty."""

    rows: int
    oldest_ms: int | None


EVENT_KEPT_MS: Final = 7 * DAY_MS
"""How long published rows with an event stay at least, for readers of the embedded bus and auditors who come late."""


class AccountingEvent(NamedTuple):
    """A record came or went: `seq` is the event's number in the tenant's outbox, `when_ms` says the UTC day."""

    tenant: str
    record: RecordId
    seq: int
    when_ms: int
    registered: bool
