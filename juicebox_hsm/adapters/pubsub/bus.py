"""`event_bus.EventBus` on Pub/Sub (agent.md 11; operator-tools.md 6.2).

The sequence is the outbox's: a repeated publication is a second message with the same `seq`. Messages carry the user as
ordering key, so subscriptions made here deliver a user's events in order; a request carries one user's messages only,
as the service demands, and one user's requests follow each other.

A topic without a subscription would swallow events. So before a process publishes for a tenant for the first time it
sees to the subscription, and not only, as for the topic, when a publication finds nothing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import trio

from juicebox_hsm.adapters.bigtable.driver import CallFailed
from juicebox_hsm.adapters.google.calls import Access, GoogleCalls, Service, open_calls, scopes
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.pubsub import codec
from juicebox_hsm.adapters.pubsub.codec import Names
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.events import EVENT_KEPT_MS, OutboxEvent
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.event_bus import BusEvent

EMULATOR_VARIABLE: Final = "PUBSUB_EMULATOR_HOST"
HOST: Final = "pubsub.googleapis.com"
PUBSUB: Final = Service(
    "pubsub",
    f"{HOST}:443",
    tuple(scopes("pubsub")),
    ", or PUBSUB_EMULATOR_HOST for the emulator",
    {codec.CREATE_TOPIC: "pubsub.create_topic", codec.CREATE_SUBSCRIPTION: "pubsub.create_subscription"},
)

RETRY: Final = RetryProfile(first_s=0.05, spread=0.2)
READ_RETRY: Final = RetryProfile(first_s=0.05, cap_s=1.0, attempts_max=8, total_s=5.0, spread=0.2)
"""Own: who reads has its own client waiting, and asks again."""
BATCH_MAX: Final = 100
"""Messages per request (operator-tools.md 6.1)."""
PUBLISHING_MAX: Final = 16  # own: users whose events are on the way at once
PULL_MAX: Final = 100
"""Own: the service's ids are long, and a reader must be able to acknowledge a page in one request of 32 KiB."""
KEPT_S: Final = EVENT_KEPT_MS // 1000
MISSING_MAX: Final = 3  # own: how often one request may find nothing although it was just made

_log = get_logger("pubsub")


class PubSubBus:
    """Publishes to a topic per (realm, tenant) and reads its subscription.

    `kept_s` is for how long subscriptions keep messages; who only reads gives None and changes none that exists.
    """

    def __init__(
        self, calls: GoogleCalls, project: str, retry: RetryProfile = RETRY, *, kept_s: int | None = None
    ) -> None:
        self._calls = calls
        self._project = project
        self._retry = retry
        self._kept_s = kept_s
        self._ready: dict[Names, int] = {}
        self._making = trio.Lock()

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Publish all rows, each user's in order; raises when not all of them are known to be published."""
        names = Names(self._project, realm, tenant)
        users: dict[str, list[OutboxEvent]] = {}
        for row in rows:
            users.setdefault(row.new.user, []).append(row)
        await self._make(names, self._ready.get(names, 0))
        left = iter(users.values())
        failures: list[RealmError] = []
        async with trio.open_nursery() as nursery:
            for _ in range(min(PUBLISHING_MAX, len(users))):
                nursery.start_soon(self._publish_users, names, left, failures)
        if failures:
            raise failures[0]

    async def _publish_users(self, names: Names, left: Iterator[list[OutboxEvent]], failures: list[RealmError]) -> None:
        """Publish user after user until none is left or anybody failed."""
        for rows in left:
            for at in range(0, len(rows), BATCH_MAX):
                if failures:
                    return
                request = codec.encode_publish(names, rows[at : at + BATCH_MAX])
                try:
                    await self._call(names, codec.PUBLISH, request, ("topic", names.topic), self._retry)
                except RealmError as error:
                    failures.append(error)

    async def pull(self, realm: RealmId, tenant: str, limit: int, wait_s: float) -> list[BusEvent]:
        """Return what the subscription delivers. What is lost with a cancelled call comes again after 10 s."""
        names, limit = Names(self._project, realm, tenant), min(limit, PULL_MAX)
        deadline = trio.current_time() + wait_s
        while True:
            left_s = deadline - trio.current_time()
            request = codec.encode_pull(names, limit, at_once=left_s <= 0)
            routing = ("subscription", names.subscription)
            try:
                # The service ends a wait on its own; our time-out is for one that it does not.
                with trio.move_on_after(left_s) if left_s > 0 else trio.CancelScope():
                    answer = await self._call(names, codec.PULL, request, routing, READ_RETRY, ("DEADLINE_EXCEEDED",))
                    events, strange = codec.decode_pull(names, answer)
                    if strange:
                        _log.warning("messages that are no events", subscription=names.subscription, found=strange[:3])
                    if events or left_s <= 0:
                        return events
            except CallFailed:
                pass  # the wait was longer than a call may be
            if deadline - trio.current_time() <= 0:
                return []
            await trio.sleep(0.05)

    async def acknowledge(self, realm: RealmId, tenant: str, acks: Sequence[str]) -> None:
        """Acknowledge at the service. One that is too late is passed over: its event comes again."""
        names = Names(self._project, realm, tenant)
        ids = [codec.read_ack(names, ack) for ack in acks]
        if not ids:
            return
        request = codec.encode_acknowledge(names, ids)
        try:
            await self._call(
                names,
                codec.ACKNOWLEDGE,
                request,
                ("subscription", names.subscription),
                READ_RETRY,
                ("FAILED_PRECONDITION", "INVALID_ARGUMENT"),
            )
        except CallFailed as failure:
            _log.info("late acknowledgements", subscription=names.subscription, reason=failure.details)

    async def _call(
        self,
        names: Names,
        method: str,
        request: bytes,
        routing: tuple[str, str],
        retry: RetryProfile,
        passed: tuple[str, ...] = (),
    ) -> bytes:
        """Call; what is missing is made, then the call repeated."""
        for _ in range(MISSING_MAX):
            made = self._ready.get(names, 0)
            try:
                return await self._calls.unary(method, request, routing, retry, passed=("NOT_FOUND", *passed))
            except CallFailed as failure:
                if failure.code != "NOT_FOUND":
                    raise
            await self._make(names, made, again=True)
        raise StoreUnavailable(f"{names.topic} or its subscription disappears as soon as it is made")

    async def _make(self, names: Names, made: int, *, again: bool = False) -> None:
        """Make sure of topic and subscription, once per process unless one was missing; `made` is what the caller saw.

        An operator may have made them and keep the right to make more for itself: then there is nothing to do.
        """
        if made and not again:
            return
        async with self._making:
            if self._ready.get(names, 0) != made:
                return  # somebody else did meanwhile
            if not await self._create_subscription(names):
                await self._create(codec.CREATE_TOPIC, codec.encode_topic(names), names.topic)
                await self._create_subscription(names)
            self._ready[names] = made + 1

    async def _create_subscription(self, names: Names) -> bool:
        """Create the subscription, or let one that exists keep messages as long; False when there is no topic."""
        request = codec.encode_subscription(names, self._kept_s or KEPT_S)
        outcome = await self._create(codec.CREATE_SUBSCRIPTION, request, names.subscription)
        if outcome == "ALREADY_EXISTS" and self._kept_s is not None:
            await self._keep(names, self._kept_s)
        return outcome != "NOT_FOUND"

    async def _keep(self, names: Names, kept_s: int) -> None:
        """Set for how long an existing subscription keeps messages, if it is another time and we may."""
        routing = ("subscription", names.subscription)
        passed = ("NOT_FOUND", "PERMISSION_DENIED")
        try:
            found = await self._calls.unary(
                codec.GET_SUBSCRIPTION, codec.encode_get(names), routing, self._retry, passed=passed
            )
            if codec.decode_kept_s(found) == kept_s:
                return
            change, routing = codec.encode_keep(names, kept_s), ("subscription.name", names.subscription)
            await self._calls.unary(codec.UPDATE_SUBSCRIPTION, change, routing, self._retry, passed=passed)
        except CallFailed as failure:
            _log.warning("retention not changed", name=names.subscription, kept_s=kept_s, reason=failure.details)
        else:
            _log.info("retention changed", name=names.subscription, kept_s=kept_s)

    async def _create(self, method: str, request: bytes, name: str) -> str:
        """Create what may exist; return "" or the status that was passed over."""
        try:
            passed = ("ALREADY_EXISTS", "NOT_FOUND", "PERMISSION_DENIED")
            await self._calls.unary(method, request, ("name", name), self._retry, passed=passed)
        except CallFailed as failure:
            if failure.code == "PERMISSION_DENIED":
                _log.warning("not allowed to create; it must exist", name=name, reason=failure.details)
            return failure.code
        _log.info("created", name=name)
        return ""


@asynccontextmanager
async def open_pubsub(
    access: Access, metrics: Metrics | None = None, *, kept_s: int | None = None
) -> AsyncIterator[PubSubBus]:
    """Open the bus of one project. PUBSUB_EMULATOR_HOST counts where no address is given."""
    if not access.emulator:
        access = replace(access, emulator=os.environ.get(EMULATOR_VARIABLE, ""))
    async with open_calls(PUBSUB, access, metrics) as calls:
        yield PubSubBus(calls, access.project, kept_s=kept_s)
