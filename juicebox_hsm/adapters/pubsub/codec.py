"""Names and messages of the Pub/Sub bus, as raw protobuf (agent.md 11; operator-tools.md 6.1, 6.2).

The only module that knows the library's message classes. Pure: a request is bytes, a response is bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.pubsub_v1.types import pubsub as _messages

from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.event_bus import BusEvent, InvalidAcks

PUBLISH: Final = "/google.pubsub.v1.Publisher/Publish"
CREATE_TOPIC: Final = "/google.pubsub.v1.Publisher/CreateTopic"
CREATE_SUBSCRIPTION: Final = "/google.pubsub.v1.Subscriber/CreateSubscription"
GET_SUBSCRIPTION: Final = "/google.pubsub.v1.Subscriber/GetSubscription"
UPDATE_SUBSCRIPTION: Final = "/google.pubsub.v1.Subscriber/UpdateSubscription"
PULL: Final = "/google.pubsub.v1.Subscriber/Pull"
ACKNOWLEDGE: Final = "/google.pubsub.v1.Subscriber/Acknowledge"

ACK_DEADLINE_S: Final = 10
LABEL_MAX: Final = 63
"""Labels are lower case and at most this long; names of topics are not limited so."""

_PublishRequest: Final[Any] = _messages.PublishRequest.pb()
_Topic: Final[Any] = _messages.Topic.pb()
_Subscription: Final[Any] = _messages.Subscription.pb()
_GetSubscriptionRequest: Final[Any] = _messages.GetSubscriptionRequest.pb()
_UpdateSubscriptionRequest: Final[Any] = _messages.UpdateSubscriptionRequest.pb()
_PullRequest: Final[Any] = _messages.PullRequest.pb()
_PullResponse: Final[Any] = _messages.PullResponse.pb()
_AcknowledgeRequest: Final[Any] = _messages.AcknowledgeRequest.pb()

_CHECK_BYTES: Final = 8
_CHECK_CHARS: Final = 11


@dataclass(frozen=True, slots=True)
class Names:
    """The resources of one tenant in one realm."""

    project: str
    realm: RealmId
    tenant: str

    @property
    def topic(self) -> str:
        """Return the topic's full name."""
        return f"projects/{self.project}/topics/tenant-{self.tenant}-{self.realm.hex()}"

    @property
    def subscription(self) -> str:
        """Return the subscription's full name."""
        return f"projects/{self.project}/subscriptions/tenant-{self.tenant}-{self.realm.hex()}-sub"

    def labels(self) -> dict[str, str]:
        """Return what both are labelled with."""
        return {"realm": self.realm.hex(), "tenant": self.tenant.lower()[:LABEL_MAX]}


def encode_publish(names: Names, rows: Sequence[OutboxEvent]) -> bytes:
    """Encode rows of ONE user: all messages of a request must have the same ordering key."""
    request = _PublishRequest(topic=names.topic)
    for row in rows:
        new = row.new
        request.messages.add(
            data=json.dumps({"user": new.user, **(new.event or {})}).encode(),
            attributes={"seq": str(row.seq), "ref": f"{new.group.hex()}:{new.index}", "when": str(new.when_ms)},
            ordering_key=new.user,
        )
    return _bytes(request)


def encode_topic(names: Names) -> bytes:
    """Encode the creation of the topic."""
    return _bytes(_Topic(name=names.topic, labels=names.labels()))


def encode_subscription(names: Names, kept_s: int) -> bytes:
    """Encode the creation of the subscription: ordered, exactly once, never expiring, messages kept for `kept_s`."""
    request = _Subscription(
        name=names.subscription,
        topic=names.topic,
        ack_deadline_seconds=ACK_DEADLINE_S,
        labels=names.labels(),
        enable_message_ordering=True,
        enable_exactly_once_delivery=True,
        message_retention_duration={"seconds": kept_s},
    )
    request.expiration_policy.SetInParent()  # present without a time: never
    return _bytes(request)


def encode_get(names: Names) -> bytes:
    """Encode a look at the subscription."""
    return _bytes(_GetSubscriptionRequest(subscription=names.subscription))


def decode_kept_s(response: bytes) -> int:
    """Return for how long the subscription that was looked at keeps messages."""
    return int(_Subscription.FromString(response).message_retention_duration.seconds)


def encode_keep(names: Names, kept_s: int) -> bytes:
    """Encode a change of how long the subscription keeps messages, and of nothing else."""
    request = _UpdateSubscriptionRequest(update_mask={"paths": ["message_retention_duration"]})
    request.subscription.name = names.subscription
    request.subscription.message_retention_duration.seconds = kept_s
    return _bytes(request)


def encode_pull(names: Names, limit: int, *, at_once: bool) -> bytes:
    """Encode a pull; `at_once` asks for what is there, otherwise the service waits for a message."""
    return _bytes(_PullRequest(subscription=names.subscription, max_messages=limit, return_immediately=at_once))


def encode_acknowledge(names: Names, ids: Sequence[str]) -> bytes:
    """Encode acknowledgements by the service's own ids."""
    return _bytes(_AcknowledgeRequest(subscription=names.subscription, ack_ids=ids))


def decode_pull(names: Names, response: bytes) -> tuple[list[BusEvent], list[str]]:
    """Return the events of a pull, and for messages that are none why not."""
    events: list[BusEvent] = []
    strange: list[str] = []
    for received in _PullResponse.FromString(response).received_messages:
        try:
            events.append(_event(names, received))
        except (ValueError, KeyError, TypeError) as error:
            strange.append(f"message {received.message.message_id}: {type(error).__name__}")
    return events, strange


def _event(names: Names, received: Any) -> BusEvent:
    message = received.message
    body = json.loads(message.data)
    user = body.pop("user")
    if not isinstance(user, str) or not isinstance(body["event"], str):
        raise TypeError("user and event are texts")
    published_ms = message.publish_time.seconds * 1000 + message.publish_time.nanos // 1_000_000
    return BusEvent(
        id=message.message_id,
        ack=make_ack(names, received.ack_id),
        seq=int(message.attributes.get("seq", "0")),  # a realm that published before this one did gives no number
        ref=message.attributes.get("ref", ""),
        when_ms=int(message.attributes.get("when", published_ms)),
        user=user,
        body=body,
    )


def make_ack(names: Names, ack_id: str) -> str:
    """Return what a reader acknowledges with: the service's id behind a check of whose it is."""
    return _check(names, ack_id) + ack_id


def read_ack(names: Names, ack: str) -> str:
    """Return the service's id. Raises `InvalidAcks` for one this bus never gave to this tenant."""
    check, ack_id = ack[:_CHECK_CHARS], ack[_CHECK_CHARS:]
    if not ack_id or not ack.isascii() or check != _check(names, ack_id):
        raise InvalidAcks("not an acknowledgement of this tenant's events")
    return ack_id


def _check(names: Names, ack_id: str) -> str:
    """Return a check value that tells an acknowledgement from junk or another tenant's; no secret."""
    digest = hashlib.blake2s(f"{names.subscription}\n{ack_id}".encode(), digest_size=_CHECK_BYTES).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _bytes(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded
