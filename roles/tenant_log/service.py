"""The HTTP side of the tenant event log: what auditors of a tenant may ask (operator-tools.md 6.3).

POST /tenant_log takes acknowledgements first, then returns events; with none pending it waits up to 20 s. A token of
scope `audit` says which realm and tenant; nothing else in a request can reach another tenant's events.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from juicebox_hsm.adapters.observation.probes import Exchange
from juicebox_hsm.errors import DecodingError, RealmError
from juicebox_hsm.ids import RealmId, parse_id
from juicebox_hsm.ports.event_bus import BusEvent, EventBus, InvalidAcks
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.tokens import (
    KeyLookup,
    RejectionReason,
    Scope,
    TokenCache,
    TokenRejection,
    ValidToken,
    claimed_audience,
)

BODY_BYTES_MAX: Final = 32 << 10
PAGE_MAX: Final = 200
WAIT_S: Final = 20.0
BODY_S: Final = 10.0  # own: a body of 32 KiB needs no longer
WAITING_MAX: Final = 1_000  # own: calls that may wait at a time; more are answered at once
REALMS_AGAIN_S: Final = 1.0  # own: how often an unknown audience may make us look for new realms
_CORS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "86400",
}
_SHOWN: Final = frozenset(
    {
        RejectionReason.EXPIRED,
        RejectionReason.NOT_YET,
        RejectionReason.LIFETIME,
        RejectionReason.AUDIENCE,
        RejectionReason.ISSUER,
        RejectionReason.SUBJECT,
        RejectionReason.SCOPE,
    }
)
"""Reasons told to the caller: all are found behind a good signature, so they help only the owner of the key."""


class Realms:
    """The realms that are served: those given, or all of the store, new ones included."""

    def __init__(self, given: Sequence[RealmId], list_realms: Callable[[], Awaitable[list[RealmId]]]) -> None:
        self._fixed = bool(given)
        self._known = list(given)
        self._list_realms = list_realms
        self._asked_at = float("-inf")
        self._asking = trio.Lock()

    async def known(self) -> list[RealmId]:
        """Return the realms, asking the store when there are none yet. Raises `StoreUnavailable`."""
        if not self._known:
            await self._ask()
        return list(self._known)

    async def find(self, audience: str | None) -> RealmId | None:
        """Return the realm a token is for, None if it is not served here. Raises `StoreUnavailable`."""
        try:
            realm = RealmId(parse_id(audience or ""))
        except DecodingError:
            return None
        if realm not in self._known:
            await self._ask()
        return realm if realm in self._known else None

    async def _ask(self) -> None:
        async with self._asking:  # who comes meanwhile waits for the answer; only an answer spares the next question
            if not self._fixed and trio.current_time() - self._asked_at >= REALMS_AGAIN_S:
                self._known = await self._list_realms()
                self._asked_at = trio.current_time()


class BadRequest(Exception):
    """The body is not what the interface takes; the message says why."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A decoded request body."""

    acks: tuple[str, ...] = ()
    page_size: int = 1


def decode_ask(body: bytes) -> Ask:
    """Decode a body; `ack` is another name for `acks`. Raises `BadRequest`."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object")
    acks: list[str] = []
    for name in ("acks", "ack"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, list) or not all(isinstance(ack, str) for ack in given):
            raise BadRequest(f"{name} is not a list of texts")
        acks += given
    size = fields.get("page_size")
    if size is not None and type(size) is not int:
        raise BadRequest("page_size is not a whole number")
    return Ask(tuple(acks), min(max(size or 1, 1), PAGE_MAX))


def encode_event(event: BusEvent) -> dict[str, Any]:
    """Return an event as clients get it."""
    when = dt.datetime.fromtimestamp(event.when_ms / 1000, dt.UTC)
    document: dict[str, Any] = {
        "id": event.id,
        "ack": event.ack,
        "when": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "user_id": event.user,
        **event.body,
        "seq": event.seq,
        "ref": event.ref,
    }
    return document


class TenantLogService:
    """Answers the three routes. `stop` releases waiting calls; they return what they have."""

    def __init__(
        self,
        bus: EventBus,
        realms: Realms,
        keys: KeyLookup,
        *,
        now_s: Callable[[], float],
        metrics: Meter,
        log: Log,
        wait_s: float = WAIT_S,
    ) -> None:
        self._bus = bus
        self._realms = realms
        self._keys = keys
        self._now_s = now_s
        self._metrics = metrics
        self._log = log
        self._wait_s = wait_s
        self._tokens = TokenCache()
        self._closing = trio.Event()
        self._waiting = trio.CapacityLimiter(WAITING_MAX)

    def stop(self) -> None:
        """Let waiting calls return; later ones do not wait."""
        self._closing.set()

    def make_app(self) -> QuartTrio:
        """Return the ASGI application."""
        app = QuartTrio(__name__, static_folder=None)
        app.asgi_http_class = Exchange
        app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
        app.config["BODY_TIMEOUT"] = BODY_S
        app.config["RESPONSE_TIMEOUT"] = 3 * self._wait_s
        app.add_url_rule("/", view_func=self._get_index, endpoint="index")
        app.add_url_rule("/tenant_log", view_func=self._post_pull, endpoint="pull", methods=["POST"])
        app.add_url_rule("/tenant_log/ack", view_func=self._post_ack, endpoint="ack", methods=["POST"])
        app.register_error_handler(HTTPException, _http_error)
        app.after_request(_open_cors)
        return app

    async def _get_index(self) -> Response:
        try:
            realms = [realm.hex() for realm in await self._realms.known()]
        except RealmError as error:
            return self._unavailable(error)
        # one realm is what existing clients expect; the list is for instances with several
        return _answer(200, {"realmID": realms[0] if realms else None, "realmIDs": realms})

    async def _post_pull(self) -> Response:
        return await self._guarded("/tenant_log", self._pull)

    async def _post_ack(self) -> Response:
        return await self._guarded("/tenant_log/ack", self._ack)

    async def _guarded(self, path: str, answer: Callable[[RealmId, str, Ask], Awaitable[Response]]) -> Response:
        """Authenticate, decode, count, and turn failures into their statuses."""
        try:
            found = await self._authenticate()
            if isinstance(found, str):
                return _answer(401, {"message": found})
            realm, token = found
            body = await request.get_data(as_text=False)
            ask = decode_ask(body if isinstance(body, bytes) else body.encode())
            self._metrics.count("realm.tenant_log.count", tenant=token.tenant, type=path)
            return await answer(realm, token.tenant, ask)
        except (BadRequest, InvalidAcks) as error:
            return _answer(400, {"message": str(error)})
        except RealmError as error:
            return self._unavailable(error)

    async def _authenticate(self) -> tuple[RealmId, ValidToken] | str:
        """Return realm and token, or what to tell a caller who has no right one."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return "a bearer token is required"
        realm = await self._realms.find(claimed_audience(token))
        if realm is None:
            self._log.info("token refused", reason="audience is no realm of this service")
            return "the token is not accepted"
        result = self._tokens.validate(token, realm=realm, now_s=self._now_s(), keys=self._keys, scope=Scope.AUDIT)
        if isinstance(result, TokenRejection):
            self._log.info("token refused", reason=result.reason.value, tenant=result.tenant, version=result.version)
            return "the token is not accepted" + (f": {result.reason.value}" if result.reason in _SHOWN else "")
        return realm, result

    async def _ack(self, realm: RealmId, tenant: str, ask: Ask) -> Response:
        await self._bus.acknowledge(realm, tenant, ask.acks)
        return _answer(200, {})

    async def _pull(self, realm: RealmId, tenant: str, ask: Ask) -> Response:
        await self._bus.acknowledge(realm, tenant, ask.acks)
        events = await self._bus.pull(realm, tenant, ask.page_size, 0)
        if not events and not self._closing.is_set():
            try:
                self._waiting.acquire_nowait()
            except trio.WouldBlock:
                pass  # enough callers wait already; this one asks again
            else:
                try:
                    events = await self._wait(realm, tenant, ask.page_size)
                finally:
                    self._waiting.release()
        return _answer(200, {"events": [encode_event(event) for event in events]})

    async def _wait(self, realm: RealmId, tenant: str, limit: int) -> list[BusEvent]:
        """Wait for events until the time is over or the service stops."""
        events: list[BusEvent] = []
        failure: RealmError | None = None
        async with trio.open_nursery() as nursery:

            async def end_with_service() -> None:
                await self._closing.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_with_service)
            try:
                events = await self._bus.pull(realm, tenant, limit, self._wait_s)
            except RealmError as error:
                failure = error  # raised outside the nursery, which would wrap it in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return events

    def _unavailable(self, error: RealmError) -> Response:
        self._log.warning("event bus trouble", error=str(error) or type(error).__name__)
        return _answer(500, {"message": "the events cannot be read or acknowledged at the moment"})


def _answer(status: int, document: Mapping[str, Any]) -> Response:
    return Response(json.dumps(document, separators=(",", ":")), status=status, content_type="application/json")


async def _http_error(error: HTTPException) -> Response:
    if isinstance(error, RequestEntityTooLarge):
        return _answer(413, {"message": f"the body is larger than {BODY_BYTES_MAX} bytes"})
    return _answer(error.code or 500, {"message": error.name})


async def _open_cors(response: Response) -> Response:
    for name, value in _CORS.items():
        response.headers[name] = value
    return response
