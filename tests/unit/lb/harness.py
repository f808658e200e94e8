"""A balancer without sockets: fake agents behind a fake RPC, fake discovery and settings, and real everything else."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from juicebox_hsm.adapters.edge.exchange import BodyTooLarge, Request
from juicebox_hsm.adapters.observation.tracing import Traces
from juicebox_hsm.adapters.rpc import RpcFailed, RpcUnreachable
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.host.services import ServiceAddress, ServiceKind
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret, record_id_key_fingerprint
from juicebox_hsm.tokens import TokenKey, create
from juicebox_hsm.wire.client import (
    ClientRequest,
    HandshakeRequest,
    RequestKind,
    TransportRequest,
    TransportResponse,
    encode_client_request,
    encode_noise_response,
)
from juicebox_hsm.wire.methods import AnyMethod
from juicebox_hsm.wire.rpc import (
    AgentGroupInfo,
    AgentStatus,
    App,
    AppOk,
    GroupInfo,
    GroupRole,
    HsmInfo,
    LeaderInfo,
    PeerRole,
    Range,
    RealmInfo,
    Refusal,
    Refused,
    RoleInfo,
    RpcCode,
)
from roles.lb.forward import Forwarder, Forwarding
from roles.lb.guard import RealmGuard
from roles.lb.poller import Poller
from roles.lb.service import ClientService
from tests.unit.edge.harness import Recorder

REALM = RealmId(b"R" * 16)
GROUP = GroupId(b"G" * 16)
FULL = Range(start=bytes(32), end=b"\xff" * 32)
NOW_S = 1_700_000_000.0
RECORD_KEY = Secret(b"32-bytes-to-randomize-record-IDs")
TENANT_KEY = TenantSecret(Secret(b"an-auth-token-key"), SecretAlgorithm.HMAC_SHA256)
NOISE = encode_noise_response(TransportResponse(b"answer"))

Reply = Any
Script = Callable[[App], Awaitable[Reply] | Reply]


class LbRecorder(Recorder):
    """Also takes timings and debug lines."""

    def timing(self, name: str, ns: int, **tags: str | int | bool | None) -> None:
        self.counts[name] += 1
        for key, value in tags.items():
            self.counts[f"{name}/{key}={value}"] += 1

    def debug(self, event: str, **fields: object) -> None:
        self.lines.append(("debug", event))


def ok(_: App) -> Reply:
    return AppOk(noise=NOISE)


def refuse(outcome: Refusal, *, consumed: bool = False) -> Script:
    return lambda _: Refused(outcome=outcome, consumed=consumed)


def unreachable(*, maybe_delivered: bool) -> Script:
    def script(_: App) -> Reply:
        raise RpcUnreachable("gone", maybe_delivered=maybe_delivered)

    return script


def failed(code: RpcCode) -> Script:
    def script(_: App) -> Reply:
        raise RpcFailed(code)

    return script


@dataclass
class FakeAgent:
    """One agent: what its status says and how it answers `app`; `script` entries are used up but for the last."""

    url: str
    realm: RealmId | None = REALM
    group: GroupId = GROUP
    leads: bool = True
    starting: int = 1
    committed: int = 1
    range: Range | None = FULL
    stalled_s: float | None = None
    script: list[Script] = field(default_factory=lambda: [ok])
    status_error: Exception | None = None
    status_delay_s: float = 0.0
    asked: list[App] = field(default_factory=list)
    polls: int = 0

    def status(self) -> AgentStatus:
        leader = LeaderInfo(self.committed, self.committed, self.range, None) if self.leads else None
        role = RoleInfo(GroupRole.LEADER if self.leads else GroupRole.WITNESS, 1, self.starting if self.leads else None)
        group = GroupInfo(self.group, [b"H" * 16] * 5, None, leader, role)
        realm = None if self.realm is None else RealmInfo(self.realm, b"", [group])
        own = AgentGroupInfo(REALM, self.group, role, self.leads, members_alive=2, stalled_s=self.stalled_s)
        return AgentStatus(1.0, HsmInfo(b"H" * 16, realm, b""), self.url, "", [own])


class FakeRpc:
    """Calls fake agents by URL. `on_poll` runs before each status answer."""

    def __init__(self, agents: Sequence[FakeAgent]) -> None:
        self.agents = {agent.url: agent for agent in agents}
        self.traces: list[str | None] = []

    async def call(
        self,
        url: str,
        method: AnyMethod,
        body: object,
        *,
        timeout_s: float,
        server: PeerRole | None = None,
        trace: str | None = None,
    ) -> Any:
        await trio.lowlevel.checkpoint()
        if method.name == "app":
            self.traces.append(trace)
        assert server is PeerRole.AGENT
        agent = self.agents.get(url)
        if agent is None:
            raise RpcUnreachable("refused", maybe_delivered=False)
        if method.name == "status":
            return await self._status(agent, timeout_s)
        assert method.name == "app"
        assert isinstance(body, App)
        agent.asked.append(body)
        step = agent.script.pop(0) if len(agent.script) > 1 else agent.script[0]
        with trio.move_on_after(timeout_s):
            reply = step(body)
            return await reply if isinstance(reply, Awaitable) else reply
        raise RpcFailed(RpcCode.DEADLINE_EXCEEDED)

    async def _status(self, agent: FakeAgent, timeout_s: float) -> AgentStatus:
        agent.polls += 1
        status = agent.status()
        with trio.move_on_after(timeout_s):
            await trio.sleep(agent.status_delay_s)
            if agent.status_error is not None:
                raise agent.status_error
            return status
        raise RpcFailed(RpcCode.DEADLINE_EXCEEDED)


class FakeDiscovery:
    """Lists URLs; fails while `down`."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.down = False
        self.reads = 0

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        self.urls.append(url)

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        self.urls.remove(url)

    async def forget(self, address: ServiceAddress) -> None:
        self.urls.remove(address.url)

    async def list(self, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        await trio.lowlevel.checkpoint()
        self.reads += 1
        if self.down:
            raise StoreUnavailable("store is down")
        return [ServiceAddress(ServiceKind.AGENT, url, 0) for url in self.urls]


class FakeSettings:
    """Claims in memory; fails while `down`."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.down = False

    async def get(self, name: str) -> bytes | None:
        return self.values.get(name)

    async def claim(self, name: str, value: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.down:
            raise StoreUnavailable("store is down")
        return self.values.setdefault(name, value)

    async def put(self, name: str, value: bytes) -> None:
        self.values[name] = value

    async def remove(self, name: str) -> None:
        self.values.pop(name, None)

    async def list(self, prefix: str) -> dict[str, bytes]:
        return {name: value for name, value in self.values.items() if name.startswith(prefix)}


class FakeRequest(Request):
    """A request with its body at hand; `body_read` tells whether anyone asked for it."""

    __slots__ = ("_content", "body_read")

    def __init__(
        self, method: str = "POST", path: str = "/req", body: bytes = b"", version: str | None = "0.3.7"
    ) -> None:
        headers = [] if version is None else [(b"x-juicebox-version", version.encode())]
        super().__init__(method, path.encode(), headers)
        self._content = body
        self.body_read = False

    async def body(self, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.body_read = True
        if len(self._content) > limit:
            raise BodyTooLarge
        return self._content


class Balancer:
    """The parts of a balancer wired over fakes."""

    def __init__(
        self,
        *agents: FakeAgent,
        keys: dict[tuple[str, int], TokenKey] | None = None,
        traces: Traces | None = None,
        trace_rate: float = 0.0,
    ) -> None:
        self.agents = agents
        self.rpc = FakeRpc(agents)
        self.discovery = FakeDiscovery([agent.url for agent in agents])
        self.settings = FakeSettings()
        self.recorder = LbRecorder()
        self.poller = Poller(
            self.rpc,
            self.discovery,
            rng=random.Random(1),
            metrics=self.recorder,
            log=self.recorder,
        )
        fingerprint = record_id_key_fingerprint(RECORD_KEY)
        self.guard = RealmGuard(fingerprint, self.settings, self.poller, self.recorder)
        self.forwarder = Forwarder(self.rpc, self.poller, self.recorder)
        self.keys = {("test-acme", 1): TokenKey(TENANT_KEY)} if keys is None else keys
        self.service = ClientService(
            keys=lambda tenant, version: self.keys.get((tenant, version)),
            record_key=RECORD_KEY,
            forwarder=self.forwarder,
            guard=self.guard,
            now_s=lambda: NOW_S,
            metrics=self.recorder,
            log=self.recorder,
            traces=traces,
            trace_rate=trace_rate,
        )

    async def start(self, nursery: trio.Nursery, *, settle: bool = True) -> None:
        """Start polling; `settle` lets leaderships become older than 10 s."""
        await nursery.start(self.poller.run)
        await self.guard.look()
        nursery.start_soon(self.guard.run)
        if settle:
            await trio.sleep(11)
            for agent in self.agents:
                agent.asked.clear()


def job(*, transport: bool = True, record: bytes = b"\x55" * 32, realm: RealmId = REALM) -> Forwarding:
    """Return a request on its way."""
    return Forwarding(
        realm=realm,
        record=RecordId(record),
        session_id=7,
        handshake_only=False,
        is_transport=transport,
        encrypted=b"noise",
        tenant="test-acme",
        user="00" * 32,
    )


def token(realm: RealmId = REALM, secret: TenantSecret = TENANT_KEY, **changes: Any) -> str:
    """Mint a token that is valid at NOW_S."""
    arguments: dict[str, Any] = {"tenant": "test-acme", "version": 1, "user": "mario", "realm": realm, "now_s": NOW_S}
    return create(secret, **{**arguments, **changes})


def body(
    auth_token: str | None = None, *, realm: RealmId = REALM, transport: bool = True, size: int | None = None
) -> bytes:
    """Encode a client request, padded to `size` bytes in its ciphertext if asked."""
    noise: HandshakeRequest | TransportRequest
    noise = TransportRequest(b"c" * 100) if transport else HandshakeRequest(b"e" * 32, b"p" * 50)
    text = token(realm) if auth_token is None else auth_token
    encoded = encode_client_request(ClientRequest(realm, text, 7, RequestKind.SECRETS_REQUEST, noise))
    return encoded if size is None else encoded + bytes(size - len(encoded))


def owned(first: int, last: int) -> OwnedRange:
    """Return the range from byte `first` repeated to byte `last` repeated, ends at 00 and ff."""
    return OwnedRange(RecordId(bytes([first]) + bytes(31)), RecordId(bytes([last]) + b"\xff" * 31))
