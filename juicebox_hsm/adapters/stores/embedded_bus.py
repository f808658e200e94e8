"""The bus for realms without a bus service: the published outbox rows themselves (agent.md 11, operator-tools.md 6.2).

Acknowledgements are in the store; which events are out at the moment is remembered here. So a restart, or a second
process serving the same tenant, may deliver an event early a second time, and never loses one. A user's events leave in
order: while one is out, later ones of that user wait; when its time is over, it is delivered again before them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import trio

from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.event_bus import BusEvent, InvalidAcks, PublishedEvents

REDELIVER_S: Final = 10.0
"""Time to acknowledge before an event is delivered again (operator-tools.md 6.2)."""
OUT_MAX: Final = 5_000  # own: events out per tenant; a page has at most 200
SCAN_ROWS: Final = 256  # own: rows read at a time
SCANNED_MAX: Final = 10_000  # own: rows looked at per attempt, so that one busy user cannot make a pull slow
TENANTS_MAX: Final = 1_024  # own: tenants whose deliveries are remembered; forgetting only delivers early again
POLL_FIRST_S: Final = 0.1
POLL_MAX_S: Final = 1.0
_SEQ_BYTES: Final = 8
_CHECK_BYTES: Final = 8


class _Deliveries:
    """A tenant's events that are out: seq -> (user, when it is delivered again), earliest first."""

    __slots__ = ("lock", "out")

    def __init__(self) -> None:
        self.out: dict[int, tuple[str, float]] = {}
        self.lock = trio.Lock()

    def expire(self, now: float) -> None:
        """Forget deliveries whose time is over."""
        for seq, (_, until) in list(self.out.items()):
            if until > now:
                break
            del self.out[seq]


class EmbeddedBus:
    """`event_bus.EventBus` over a store's published rows. `now` is a monotonic clock in seconds."""

    def __init__(self, published: PublishedEvents, now: Callable[[], float] = trio.current_time) -> None:
        self._published = published
        self._now = now
        self._tenants: OrderedDict[tuple[RealmId, str], _Deliveries] = OrderedDict()

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Do nothing: moving the outbox cursor is what publishes here."""

    async def pull(self, realm: RealmId, tenant: str, limit: int, wait_s: float) -> list[BusEvent]:
        """Return up to `limit` deliverable events, asking the store again until `wait_s` is over."""
        deadline = self._now() + wait_s
        pause_s = POLL_FIRST_S
        while True:
            events = await self._take(realm, tenant, limit)
            left_s = deadline - self._now()
            if events or left_s <= 0:
                return events
            await trio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_MAX_S)

    async def acknowledge(self, realm: RealmId, tenant: str, acks: Sequence[str]) -> None:
        """Mark the events in the store, then forget that they are out."""
        seqs = [_read_ack(realm, tenant, ack) for ack in acks]
        if not seqs:
            return
        deliveries = self._deliveries(realm, tenant)
        async with deliveries.lock:
            await self._published.mark_acknowledged(realm, tenant, seqs)
            for seq in seqs:
                deliveries.out.pop(seq, None)

    async def _take(self, realm: RealmId, tenant: str, limit: int) -> list[BusEvent]:
        deliveries = self._deliveries(realm, tenant)
        async with deliveries.lock:
            deliveries.expire(self._now())
            out = deliveries.out
            waiting_users = {user for user, _ in out.values()}
            taken: list[OutboxEvent] = []
            limit = min(limit, OUT_MAX - len(out))
            after = scanned = 0
            while len(taken) < limit and scanned < SCANNED_MAX:
                page = await self._published.unacknowledged(realm, tenant, after, SCAN_ROWS)
                free = [row for row in page if row.new.user not in waiting_users]
                taken += free[: limit - len(taken)]
                if len(page) < SCAN_ROWS:
                    break
                scanned += len(page)
                after = page[-1].seq
            until = self._now() + REDELIVER_S
            for row in taken:
                out[row.seq] = (row.new.user, until)
            return [_delivery(realm, tenant, row) for row in taken]

    def _deliveries(self, realm: RealmId, tenant: str) -> _Deliveries:
        found = self._tenants.get((realm, tenant))
        if found is None:
            found = self._tenants[realm, tenant] = _Deliveries()
            while len(self._tenants) > TENANTS_MAX:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end((realm, tenant))
        return found


def _delivery(realm: RealmId, tenant: str, row: OutboxEvent) -> BusEvent:
    new = row.new
    return BusEvent(
        id=str(row.seq),
        ack=_make_ack(realm, tenant, row.seq),
        seq=row.seq,
        ref=f"{new.group.hex()}:{new.index}",
        when_ms=new.when_ms,
        user=new.user,
        body=new.event or {},
    )


def _digest(realm: RealmId, tenant: str, seq: bytes) -> bytes:
    """Return a check value that tells an acknowledgement of this bus from junk or another tenant's; no secret."""
    return hashlib.blake2s(realm + seq + tenant.encode(), digest_size=_CHECK_BYTES).digest()


def _make_ack(realm: RealmId, tenant: str, seq: int) -> str:
    packed = seq.to_bytes(_SEQ_BYTES, "big")
    return base64.urlsafe_b64encode(packed + _digest(realm, tenant, packed)).rstrip(b"=").decode()


def _read_ack(realm: RealmId, tenant: str, ack: str) -> int:
    try:
        raw = base64.urlsafe_b64decode(ack.encode("ascii") + b"==")
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != _SEQ_BYTES + _CHECK_BYTES or _digest(realm, tenant, raw[:_SEQ_BYTES]) != raw[_SEQ_BYTES:]:
        raise InvalidAcks("not an acknowledgement of this tenant's events")
    return int.from_bytes(raw[:_SEQ_BYTES], "big")
