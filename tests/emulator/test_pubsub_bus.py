"""The Pub/Sub bus keeps the contract of the event bus on the real emulator, and what only Pub/Sub has."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from google.pubsub_v1.types import pubsub as messages

from juicebox_hsm.adapters.bigtable.driver import CallFailed, Metadata
from juicebox_hsm.adapters.google.calls import Access, GoogleCalls, open_calls
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.pubsub import codec
from juicebox_hsm.adapters.pubsub.bus import PUBSUB, PubSubBus, open_pubsub
from juicebox_hsm.adapters.pubsub.codec import Names
from juicebox_hsm.adapters.sqlite.backend import open_sqlite
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable
from juicebox_hsm.ports.event_bus import BusEvent
from juicebox_hsm.ports.store import Store
from roles.tools.demo.pubsub import PubSubEmulator
from tests.emulator import contract
from tests.emulator.contract_bus import GUESS, BusContract, publish, pull, user_event
from tests.emulator.realm_data import GROUP, REALM
from tests.patience import HANGS_S

pytestmark = pytest.mark.emulator
store = contract.store
DAY_S = 86_400
_projects = itertools.count(1)
QUICK = RetryProfile(first_s=0.01, cap_s=0.05, attempts_max=3, total_s=2.0)
_GetSubscription: Any = messages.GetSubscriptionRequest.pb()
_Subscription: Any = messages.Subscription.pb()
_Topic: Any = messages.Topic.pb()


class PubSubBackend:
    """An outbox in a file, published to a project of its own on the emulator."""

    def __init__(self, path: Path, access: Access) -> None:
        self.path = path
        self.access = access

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Store]:
        """Open both."""
        async with open_sqlite(self.path) as store, open_pubsub(self.access) as bus:
            yield replace(store, bus=bus)


@pytest.fixture
def access(pubsub_emulator: str) -> Access:
    """Name a project that has no topics yet."""
    return Access(f"test-{os.getpid()}-{next(_projects)}", pubsub_emulator)


@pytest.fixture
def backend(tmp_path: Path, access: Access) -> PubSubBackend:
    """Give each test its own outbox and project."""
    return PubSubBackend(tmp_path / "realm.db", access)


class TestBus(BusContract):
    """What the embedded bus promises, Pub/Sub keeps."""

    orders_users = False
    redelivery_s = float(codec.ACK_DEADLINE_S)

    async def test_a_user_is_out_once(self, store: Store) -> None:
        """While an event of a user waits for its acknowledgement later ones of that user stay, others go on."""
        await publish(store, [user_event(1, 1), user_event(2, 1)])
        (first,) = await pull(store, 1)
        await publish(store, [user_event(3, 2), user_event(4, 1)])
        assert [each.seq for each in await pull(store, 1)] == [3]
        assert store.bus is not None
        assert await store.bus.pull(REALM, "acme", 10, 0) == []
        await store.bus.acknowledge(REALM, "acme", [first.ack])
        assert [each.seq for each in await pull(store, 2)] == [2, 4]


def row(seq: int, user: int = 1, tenant: str = "acme") -> OutboxEvent:
    """Return one row of an outbox."""
    return OutboxEvent(seq, user_event(seq, user, tenant))


async def drain(bus: PubSubBus, count: int, tenant: str = "acme") -> list[BusEvent]:
    """Pull and acknowledge `count` events."""
    found: list[BusEvent] = []
    with trio.fail_after(HANGS_S):
        while len(found) < count:
            page = await bus.pull(REALM, tenant, 100, 5.0)
            await bus.acknowledge(REALM, tenant, [event.ack for event in page])
            found += page
    return found


async def test_resources_have_the_specified_names_and_settings(access: Access) -> None:
    """The first publication makes topic and subscription: names, labels, deadline, order, exactly once, no expiry."""
    async with open_calls(PUBSUB, access) as calls:
        await PubSubBus(calls, access.project).publish(REALM, "test-Acme", [row(1, tenant="test-Acme")])
        name = f"projects/{access.project}/subscriptions/tenant-test-Acme-{REALM.hex()}-sub"
        answer = await calls.unary(
            "/google.pubsub.v1.Subscriber/GetSubscription",
            _GetSubscription(subscription=name).SerializeToString(),
            ("subscription", name),
            QUICK,
        )
        found = _Subscription.FromString(answer)
    assert found.topic == f"projects/{access.project}/topics/tenant-test-Acme-{REALM.hex()}"
    assert dict(found.labels) == {"realm": REALM.hex(), "tenant": "test-acme"}
    assert found.ack_deadline_seconds == 10
    assert found.enable_message_ordering
    assert found.enable_exactly_once_delivery
    assert found.message_retention_duration.seconds == 7 * DAY_S


async def retention_s(access: Access) -> int:
    """Return for how long the service keeps a tenant's messages, in seconds."""
    names = Names(access.project, REALM, "acme")
    async with open_calls(PUBSUB, access) as calls:
        routing = ("subscription", names.subscription)
        return codec.decode_kept_s(await calls.unary(codec.GET_SUBSCRIPTION, codec.encode_get(names), routing, QUICK))


async def test_messages_are_kept_as_long_as_told(access: Access) -> None:
    """A publisher's retention holds for the subscription it makes and for one that exists; a reader changes none.

    The emulator knows no more than 7 days; the service has 31.
    """
    for number, days in enumerate((3, 7, 5), 1):
        async with open_pubsub(access, kept_s=days * DAY_S) as writer, open_pubsub(access) as reader:
            await writer.publish(REALM, "acme", [row(number)])
            assert [event.seq for event in await drain(reader, 1)] == [number]
            assert await retention_s(access) == days * DAY_S
    async with open_pubsub(access) as reader:
        await reader.publish(REALM, "acme", [row(4)])
        assert await retention_s(access) == 5 * DAY_S


async def test_a_message_has_the_specified_form(access: Access) -> None:
    """The body is the user with the event, seq and ref are attributes, the ordering key is the user."""
    async with open_calls(PUBSUB, access) as calls:
        names = Names(access.project, REALM, "acme")
        await PubSubBus(calls, access.project).publish(REALM, "acme", [row(7, user=3)])
        answer = await calls.unary(
            codec.PULL, codec.encode_pull(names, 5, at_once=False), ("subscription", names.subscription), QUICK
        )
    (received,) = messages.PullResponse.deserialize(answer).received_messages
    user = f"{3:064x}"
    assert received.message.data.decode() == (
        f'{{"user": "{user}", "event": "guess_used", "num_guesses": 5, "guess_count": 1}}'
    )
    assert received.message.attributes["seq"] == "7"
    assert received.message.attributes["ref"] == f"{GROUP.hex()}:7"
    assert received.message.ordering_key == user


async def test_repeated_publication_keeps_seq_and_order(access: Access) -> None:
    """Rows published twice come twice with the same seq, and each user's first deliveries are in order."""
    rows = [row(seq, user=seq % 3) for seq in range(1, 151)]
    async with open_pubsub(access) as bus:
        await bus.publish(REALM, "acme", rows)
        await bus.publish(REALM, "acme", rows)
        found = await drain(bus, 300)
    assert sorted(event.seq for event in found) == sorted([*range(1, 151), *range(1, 151)])
    assert len({event.id for event in found}) == 300
    for user in range(3):
        first = list(dict.fromkeys(event.seq for event in found if event.user == f"{user:064x}"))
        assert first == sorted(first)
    assert {event.when_ms for event in found} == {1_700_000_000_000}
    assert all(dict(event.body) == GUESS for event in found)


async def test_other_programs_messages(access: Access) -> None:
    """Messages without attributes are delivered with the bus's time; those that are no events are passed over."""
    names = Names(access.project, REALM, "acme")
    async with open_calls(PUBSUB, access) as calls:
        bus = PubSubBus(calls, access.project)
        await bus.pull(REALM, "acme", 1, 0)
        for data in (b"not JSON", b'{"user": 5, "event": "deleted"}', b'{"user": "u", "event": "deleted"}'):
            request = messages.PublishRequest(topic=names.topic, messages=[messages.PubsubMessage(data=data)])
            await calls.unary(codec.PUBLISH, messages.PublishRequest.serialize(request), ("topic", names.topic), QUICK)
        (only,) = await drain(bus, 1)
    assert (only.seq, only.ref, only.user, dict(only.body)) == (0, "", "u", {"event": "deleted"})
    assert only.when_ms > 1_700_000_000_000


async def test_an_emulator_that_forgot_everything(tmp_path: Path, pubsub_emulator: str) -> None:
    """Topics and subscriptions that are gone are made again, by publisher and by reader."""
    emulator = PubSubEmulator()
    access = Access("again", emulator.address)
    try:
        emulator.wait_started()
        async with open_pubsub(access) as writer, open_pubsub(access) as reader:
            await writer.publish(REALM, "acme", [row(1)])
            assert [event.seq for event in await drain(reader, 1)] == [1]
            emulator.stop()
            emulator = PubSubEmulator(emulator.port)
            emulator.wait_started()
            await writer.publish(REALM, "acme", [row(2)])
            assert [event.seq for event in await drain(reader, 1)] == [2]
    finally:
        emulator.stop()


async def test_nobody_listens() -> None:
    """Without a service a publication fails as unavailable after its retries, and a pull within its own."""
    calls, metrics = Refusing("UNAVAILABLE"), Metrics()
    bus = PubSubBus(GoogleCalls(PUBSUB, calls, NoToken(), 1.0, metrics), "p", QUICK)
    with pytest.raises(StoreUnavailable):
        await bus.publish(REALM, "acme", [row(1)])
    assert calls.methods == ["CreateSubscription"] * 3
    assert metrics.counter("pubsub.create_subscription.retryable_errors").value == 3
    assert metrics.counter("pubsub.create_subscription.exhausted_errors").value == 1


async def test_what_the_service_refuses_is_not_repeated() -> None:
    """A request the service will never take fails at once."""
    calls = Refusing("INVALID_ARGUMENT")
    with pytest.raises(StoreInvalid):
        await PubSubBus(GoogleCalls(PUBSUB, calls, NoToken(), 1.0), "p", QUICK).publish(REALM, "acme", [row(1)])
    assert len(calls.methods) == 1


async def test_resources_made_by_the_operator() -> None:
    """Without the right to create, events go to the topic that must exist; late acknowledgements are passed over."""
    calls, metrics = Refusing("PERMISSION_DENIED", only="CreateSubscription"), Metrics()
    bus = PubSubBus(GoogleCalls(PUBSUB, calls, NoToken(), 1.0, metrics), "p", QUICK)
    await bus.publish(REALM, "acme", [row(1, 1), row(2, 2), row(3, 1)])
    await bus.publish(REALM, "acme", [row(4, 1)])
    assert calls.methods == ["CreateSubscription", "Publish", "Publish", "Publish"]
    assert metrics.timer("pubsub.create_subscription.time", result="ok").count == 1, "a refusal that is an answer"
    keys = [{message.ordering_key for message in each.messages} for each in calls.published]
    assert all(len(users) == 1 for users in keys), "a request has messages of one ordering key"
    calls = Existing("PERMISSION_DENIED", only="GetSubscription")
    bus = PubSubBus(GoogleCalls(PUBSUB, calls, NoToken(), 1.0), "p", QUICK, kept_s=20 * DAY_S)
    await bus.publish(REALM, "acme", [row(1)])
    await bus.publish(REALM, "acme", [row(2)])
    assert calls.methods == ["CreateSubscription", "GetSubscription", "Publish", "Publish"]
    late = PubSubBus(GoogleCalls(PUBSUB, Refusing("FAILED_PRECONDITION"), NoToken(), 1.0), "p", QUICK)
    await late.acknowledge(REALM, "acme", [codec.make_ack(Names("p", REALM, "acme"), "old")])


class NoToken:
    """No authorization."""

    def metadata(self) -> Metadata:
        """Return no headers."""
        return ()

    async def renew(self) -> bool:
        """Tell that nothing helps."""
        return False

    async def keep_fresh(self) -> None:
        """Do nothing."""


class Refusing:
    """A transport that answers every call, or those of one method, with one status."""

    def __init__(self, code: str, only: str = "") -> None:
        self._code = code
        self._only = only
        self.methods: list[str] = []
        self.published: list[Any] = []

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Refuse, or answer with an empty message."""
        await trio.lowlevel.checkpoint()
        name = method.rpartition("/")[2]
        self.methods.append(name)
        if self._only in {"", name}:
            raise CallFailed(self._code, "as told")
        if name == "Publish":
            self.published.append(messages.PublishRequest.deserialize(request))
        return b""

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        """Refuse."""
        raise CallFailed("UNIMPLEMENTED", "no streams here")


class Existing(Refusing):
    """The same, where the subscription exists."""

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Answer that it exists, or as the other does."""
        answer = await super().unary(method, request, metadata, timeout_s)
        if method == codec.CREATE_SUBSCRIPTION:
            raise CallFailed("ALREADY_EXISTS", "as told")
        return answer
