"""The ports behind the tenant event log: a bus of published events (operator-tools.md 6; agent.md 11).

Apart from the other ports because only the dispatcher and the tenant log use them. `EventBus` is what both speak to;
a back end without a bus service of its own keeps published events in its outbox, offers them as `PublishedEvents`,
and `adapters.embedded_bus` makes a bus of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import RealmId

if TYPE_CHECKING:
    from juicebox_hsm.host.events import OutboxEvent


class InvalidAcks(RealmError):
    """Acknowledgements that this bus never gave to this tenant; none of the request was taken."""


@dataclass(frozen=True, slots=True)
class BusEvent:
    """One delivery of a published event.

    `id` names the event within its realm and tenant and `ack` this delivery; `seq` is the same for every delivery and
    orders a tenant's events; `ref` is `<group hex>:<log index>`; `body` is the event without the user, who is a hash
    of 64 hex digits; `when_ms` is Unix milliseconds.
    """

    id: str
    ack: str
    seq: int
    ref: str
    when_ms: int
    user: str
    body: Mapping[str, str | int]


class EventBus(Protocol):
    """Delivers published events to their tenant at least once, in order per user, until they are acknowledged.

    What is not acknowledged within 10 s is delivered again; while an event of a user is out, later ones of that user
    wait. Events are kept for at least 7 days after publication. Every method may raise `StoreUnavailable`.
    """

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Publish rows that have an event, in order. A row published twice is one event delivered twice."""
        ...

    async def pull(self, realm: RealmId, tenant: str, limit: int, wait_s: float) -> list[BusEvent]:
        """Return up to `limit` events; waits up to `wait_s` for the first. Cancelling loses nothing."""
        ...

    async def acknowledge(self, realm: RealmId, tenant: str, acks: Sequence[str]) -> None:
        """Take events off the bus. Repeats are harmless. Raises `InvalidAcks`."""
        ...


class PublishedEvents(Protocol):
    """The published rows of an outbox with their acknowledgements. Every method may raise `StoreUnavailable`."""

    async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
        """Return published, unacknowledged rows with an event and seq > after_seq, in order."""
        ...

    async def mark_acknowledged(self, realm: RealmId, tenant: str, seqs: Sequence[int]) -> None:
        """Mark published rows as acknowledged, durably; others and absent ones are passed over. Idempotent."""
        ...
