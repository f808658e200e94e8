"""Forwarding a client's request to the agent that leads its record's group (load-balancer.md 8.3, 9).

A request makes at most two passes over the candidates, with one refresh of the table between them, and may then wait
up to `PATIENCE_S` for a route not yet tried. No sleep between tries: backoff belongs to the client.

The replay rule (9.1): a Noise transport message can be consumed by one HSM once. An agent that may have handed it to
its HSM never gets it again; whether it may have is said by `consumed` in its refusal, or by `maybe_delivered` when
there was none. Handshakes that carry a request are idempotent and may go anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from juicebox_hsm.adapters.rpc import RpcError
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.routing import Route, RouteKey
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.wire.client import ClientOutcome
from juicebox_hsm.wire.rpc import AGENT_METHODS, App, AppOk, PeerRole, Refusal, Refused
from roles.lb.context import Meter, RpcCaller
from roles.lb.poller import Poller

TRY_S: Final = 10.0
"""Longest wait for one agent (load-balancer.md constants)."""

REQUEST_S: Final = 25.0
"""Longest time for one client request (load-balancer.md constants)."""

PATIENCE_S: Final = 1.0
"""How long to wait for a new route after the second pass (decision record 0010)."""

SETTLED_S: Final = 10.0
"""A leadership younger than this may not know sessions that clients rightly believe in (load-balancer.md 9)."""

_APP: Final = AGENT_METHODS["app"]

_VERDICTS: Final = {
    Refusal.SESSION_ERROR: ClientOutcome.SESSION_ERROR,
    Refusal.DECODING_ERROR: ClientOutcome.DECODING_ERROR,
    Refusal.RATE_LIMIT_EXCEEDED: ClientOutcome.RATE_LIMIT_EXCEEDED,
    # The agent has too much uncommitted work: asking it again at once would make that worse.
    Refusal.BUSY: ClientOutcome.UNAVAILABLE,
}
"""Refusals that are the answer, whoever else might be asked."""

_SURELY_UNUSED: Final = frozenset({Refusal.INVALID_REALM, Refusal.INVALID_GROUP, Refusal.INVALID_PROOF})
_SAYS_CONSUMED: Final = frozenset({Refusal.NO_HSM, Refusal.NO_STORE, Refusal.NOT_LEADER})

Answer = bytes | ClientOutcome
"""The CBOR NoiseResponse of an agent, or any other outcome."""


@dataclass(slots=True)
class Forwarding:
    """One client request on its way. `encrypted` is CBOR; `user` the hashed user id; `group` who was asked last.

    `trace` is the W3C trace context agents get, None when this request is not traced.
    """

    realm: RealmId
    record: RecordId
    session_id: int
    handshake_only: bool
    is_transport: bool
    encrypted: bytes = field(repr=False)
    tenant: str
    user: str = field(repr=False)
    group: GroupId | None = None
    trace: str | None = None
    deadline: float = 0.0
    tried: set[RouteKey] = field(default_factory=set)
    consumed: set[str] = field(default_factory=set)


class Forwarder:
    """Sends requests to agents by the poller's table."""

    def __init__(self, rpc: RpcCaller, poller: Poller, metrics: Meter) -> None:
        self._rpc = rpc
        self._poller = poller
        self._metrics = metrics

    async def refresh(self) -> None:
        """Look at discovery and all agents now; concurrent callers share one look."""
        await self._poller.refresh()

    async def forward(self, job: Forwarding) -> Answer:
        """Return the agent's answer, or UNAVAILABLE when nobody could give one in time."""
        job.deadline = trio.current_time() + REQUEST_S
        answer = await self._pass(job, self._candidates(job))
        if answer is not None:
            return answer
        self._metrics.count("load_balancer.retries")
        await self._poller.refresh()
        consumed_before = len(job.consumed)
        answer = await self._pass(job, self._candidates(job))
        if answer is None and (len(job.consumed) == consumed_before or not job.is_transport):
            answer = await self._await_new_route(job)
        return ClientOutcome.UNAVAILABLE if answer is None else answer

    def _candidates(self, job: Forwarding) -> list[Route]:
        return self._poller.table.candidates(job.realm, job.record)

    async def _pass(self, job: Forwarding, candidates: Sequence[Route], *, rivals: bool | None = None) -> Answer | None:
        """Try the candidates in order; None when all were refused or may not be tried."""
        rivals = len(candidates) > 1 if rivals is None else rivals
        for route in candidates:
            if job.is_transport and route.url in job.consumed:
                job.tried.add(route.key)
                continue
            if trio.current_time() >= job.deadline:
                return ClientOutcome.UNAVAILABLE
            answer = await self._try(job, route, rivals=rivals)
            if answer is not None:
                return answer
        return None

    async def _await_new_route(self, job: Forwarding) -> Answer | None:
        """Wait for routes that were not tried yet and try them, until the patience or, trying, the request is over."""
        patience_s = 0.0 if self._poller.is_hopeless(job.realm, job.record) else PATIENCE_S
        patience_ends = min(trio.current_time() + patience_s, job.deadline)
        while True:
            candidates = self._candidates(job)
            fresh = [route for route in candidates if route.key not in job.tried]
            if fresh:
                consumed_before = len(job.consumed)
                answer = await self._pass(job, fresh, rivals=len(candidates) > 1)
                if answer is not None or (job.is_transport and len(job.consumed) > consumed_before):
                    return answer
                continue
            with trio.move_on_at(patience_ends) as patience:
                await self._poller.look_for_change()
            if patience.cancelled_caught:
                return None

    async def _try(self, job: Forwarding, route: Route, *, rivals: bool) -> Answer | None:
        """Ask one agent; None means the next candidate may be asked."""
        job.tried.add(route.key)
        job.group = route.group
        request = App(
            realm=job.realm,
            group=route.group,
            record_id=job.record,
            session_id=job.session_id,
            handshake_only=job.handshake_only,
            encrypted=job.encrypted,
            tenant=job.tenant,
            user=job.user,
        )
        timeout_s = min(TRY_S, job.deadline - trio.current_time())
        try:
            reply = await self._rpc.call(
                route.url, _APP, request, timeout_s=timeout_s, server=PeerRole.AGENT, trace=job.trace
            )
        except RpcError as error:
            if error.maybe_delivered:
                job.consumed.add(route.url)
            return None
        except RealmError:
            # Ours: a request that does not fit a frame; nothing was sent. It cannot be, for bodies are limited.
            return None
        if isinstance(reply, AppOk):
            return reply.noise
        return self._judge(job, route, reply, rivals=rivals)

    def _judge(self, job: Forwarding, route: Route, refused: Refused, *, rivals: bool) -> Answer | None:
        outcome = refused.outcome
        verdict = _VERDICTS.get(outcome)
        if verdict is not None:
            return verdict
        if outcome is Refusal.MISSING_SESSION:
            young = trio.current_time() - route.since_s < SETTLED_S
            return ClientOutcome.UNAVAILABLE if young or rivals else ClientOutcome.MISSING_SESSION
        if refused.consumed or not (outcome in _SURELY_UNUSED or outcome in _SAYS_CONSUMED):
            job.consumed.add(route.url)
        return None
