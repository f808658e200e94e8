"""`POST /req`: a client's request from its body to the answer's bytes (client-protocol.md 5, load-balancer.md 5.1).

The order of checks is fixed: version, size, decoding, token, realm, record id, then the agent. Authentication comes
before anything that costs others work. Clients never learn why a token was refused; logs and counters do.

A request's way through the balancer, each called by the one before or returned to by it: `H1Session` or `H2Session`,
`Routes.answer`, `ClientService.answer`, `decode_client_request`, `TokenCache.validate`, `RealmGuard`, `record_id`,
`Forwarder.forward`, `LeaderSearch.next_step` (which reads the route from the `RoutingTable`), `RpcPool.call`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Request, Response
from juicebox_hsm.adapters.observation.logging import bind_context, unbind_context
from juicebox_hsm.adapters.observation.tracing import Steps, Traces, trace_id
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.forwarding import Answer
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.tenant_keys import event_user_id, record_id
from juicebox_hsm.tokens import KeyLookup, RejectionReason, Scope, TokenCache, TokenRejection, ValidToken
from juicebox_hsm.wire.client import (
    BODY_BYTES_MAX,
    HTTP_STATUS,
    HTTP_STATUS_OK,
    SDK_UPGRADE_TEXT,
    ClientOutcome,
    ClientRequest,
    RequestKind,
    TransportRequest,
    accepts_sdk_version,
    decode_client_request,
    encode_client_response,
    encode_noise_request,
)
from roles.lb.forward import Forwarder, Forwarding
from roles.lb.guard import RealmGuard

VERSION_HEADER: Final = b"x-juicebox-version"
TRACE_HEADER: Final = b"traceparent"
REQUEST_ID_BYTES: Final = 8  # own: names a request in the log of one balancer, nowhere else

CORS_HEADERS: Final = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", b"x-exec-time, retry-after"),
)
_BINARY_HEADERS: Final = (*CORS_HEADERS, (b"content-type", b"application/octet-stream"))
_RETRY_HEADERS: Final = (*_BINARY_HEADERS, (b"retry-after", b"1"))
_TEXT_HEADERS: Final = (*CORS_HEADERS, (b"content-type", b"text/plain; charset=utf-8"))

UPGRADE: Final = Response(426, SDK_UPGRADE_TEXT, _TEXT_HEADERS)

_RETRIED: Final = frozenset({ClientOutcome.UNAVAILABLE, ClientOutcome.RATE_LIMIT_EXCEEDED})

OUTCOME_RESPONSES: Final[Mapping[ClientOutcome, Response]] = {
    outcome: Response(
        HTTP_STATUS[outcome],
        encode_client_response(outcome),
        _RETRY_HEADERS if outcome in _RETRIED else _BINARY_HEADERS,
    )
    for outcome in ClientOutcome
}

OK_PREFIX: Final = b"\xa1\x62Ok"
"""Turns an agent's CBOR NoiseResponse into the CBOR ClientResponse `{"Ok": ...}` without decoding it."""


class ClientService:
    """Answers `POST /req`."""

    def __init__(
        self,
        *,
        keys: KeyLookup,
        record_key: Secret,
        forwarder: Forwarder,
        guard: RealmGuard,
        now_s: Callable[[], float],
        metrics: Meter,
        log: Log,
        traces: Traces | None = None,
        trace_rate: float = 0.0,
    ) -> None:
        """`now_s` is Unix time in seconds; `trace_rate` the share of requests that `traces` gets to see."""
        self._keys = keys
        self._record_key = record_key
        self._forwarder = forwarder
        self._guard = guard
        self._now_s = now_s
        self._metrics = metrics
        self._log = log
        self._tokens = TokenCache()
        self._traces = traces
        self._trace_rate = trace_rate

    async def answer(self, request: Request) -> Response:
        """Answer one request; every failure is one of the documented statuses."""
        if not accepts_sdk_version(request.header(VERSION_HEADER)):
            return UPGRADE
        began_ns = time.perf_counter_ns()
        tags: dict[str, str] = {}
        span = None
        if self._traces is not None:
            span = self._traces.edge("POST /req", request.header(TRACE_HEADER), self._trace_rate)
        # Not undone when an exception passes: whoever reports it names the request, and the connection ends with it.
        bind_context(request=os.urandom(REQUEST_ID_BYTES).hex() if span is None else trace_id(span.traceparent))
        steps = None if self._traces is None or span is None else self._traces.steps(span.traceparent)
        answer = await self._outcome(request, tags, None if span is None else span.traceparent, steps)
        if steps is not None:
            steps.end()
        if isinstance(answer, ClientOutcome):
            result, response = answer.value, OUTCOME_RESPONSES[answer]
        else:
            result, response = "Ok", Response(HTTP_STATUS_OK, OK_PREFIX + answer, _BINARY_HEADERS)
        self._metrics.timing(
            "load_balancer.request.time.ns",
            time.perf_counter_ns() - began_ns,
            result=result,
            success=str(result == "Ok").lower(),
            **tags,
        )
        if span is not None:
            span.end(failed="" if result == "Ok" else result, status_code=response.status, **tags)
        unbind_context("request", "realm")
        return response

    async def _outcome(self, request: Request, tags: dict[str, str], trace: str | None, steps: Steps | None) -> Answer:
        if steps is not None:
            steps.enter("body")
        try:
            body = await request.body(BODY_BYTES_MAX)
        except BodyTooLarge:
            return ClientOutcome.PAYLOAD_TOO_LARGE
        try:
            message = decode_client_request(body)
        except DecodingError:
            return ClientOutcome.DECODING_ERROR
        if steps is not None:
            steps.enter("token")
        token = self._tokens.validate(
            message.auth_token, realm=message.realm, now_s=self._now_s(), keys=self._keys, scope=Scope.USER
        )
        if isinstance(token, TokenRejection):
            self._note_rejection(token, message.realm)
            return ClientOutcome.INVALID_AUTH
        # Tags come from here on: unauthenticated input must not be able to make series.
        tags["realm"] = message.realm.hex()
        tags["tenant"] = token.tenant
        bind_context(realm=tags["realm"])  # tenants are named at debug only (load-balancer.md 10)
        if token.scope is None:
            tags["missing_scope"] = "true"
        if not await self._is_served(message.realm):
            return ClientOutcome.UNAVAILABLE
        job = self._job(message, token)
        job.trace = trace
        if steps is not None:
            steps.enter("forward")
        answer = await self._forwarder.forward(job)
        if job.group is not None:
            tags["group"] = job.group.hex()
        return answer

    async def _is_served(self, realm: RealmId) -> bool:
        """Tell whether our record-id key is the realm's; a realm not seen yet is looked for once."""
        if realm in self._guard.realms.allowed:
            return True
        if realm not in self._guard.realms.refused:
            await self._forwarder.refresh()
            await self._guard.look()
        return realm in self._guard.realms.allowed

    def _job(self, message: ClientRequest, token: ValidToken) -> Forwarding:
        return Forwarding(
            realm=message.realm,
            record=record_id(self._record_key, token.tenant, token.user),
            session_id=message.session_id,
            handshake_only=message.kind is RequestKind.HANDSHAKE_ONLY,
            is_transport=isinstance(message.encrypted, TransportRequest),
            encrypted=encode_noise_request(message.encrypted),
            tenant=token.tenant,
            user=event_user_id(token.tenant, token.user),
        )

    def _note_rejection(self, rejection: TokenRejection, realm: RealmId) -> None:
        """Count and tell why; the tenant only where the key id could be read, never who asked with what."""
        self._metrics.count("load_balancer.auth.failures", reason=rejection.reason.value)
        if rejection.reason is RejectionReason.BAD_KEY:
            self._log.warning(
                "unusable tenant key", tenant=rejection.tenant, version=rejection.version, realm=realm.hex()
            )
        else:
            named = {} if rejection.tenant is None else {"tenant": rejection.tenant}
            self._log.debug("token refused", reason=rejection.reason.value, realm=realm.hex(), **named)
