"""A cluster in memory for the manager: agents that answer its calls, and the shared records of a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
import trio

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.rpc import RpcUnreachable
from juicebox_hsm.host.audit import AuditEntry
from juicebox_hsm.host.services import Lease, ServiceAddress, ServiceKind
from juicebox_hsm.ids import GroupId, OwnedRange, RecordId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire import rpc
from juicebox_hsm.wire.methods import AnyMethod
from roles.manager.context import ManagerContext
from roles.manager.recovery import Recovery
from tests.host.cluster.agents import FakeAgent, FakeGroup, subtract


class FakeRpc:
    """Delivers the manager's calls to fake agents and remembers them."""

    def __init__(self, agents: list[FakeAgent]) -> None:
        self.agents = {agent.url: agent for agent in agents}
        self.calls: list[tuple[str, str]] = []
        self.arrived: set[tuple[bytes, bytes, bytes, int]] = (
            set()
        )  # (realm, source, destination, at) of ranges taken in
        self.on_call: Callable[[str, str], None] = lambda _url, _method: None

    async def call(self, url: str, method: AnyMethod, body: Any, *, timeout_s: float, **_options: object) -> Any:
        self.calls.append((url, method.name))
        self.on_call(url, method.name)
        agent = self.agents[url]
        if agent.down:
            raise RpcUnreachable(f"{url}: down", maybe_delivered=False)
        if method.name in agent.hang:
            await trio.sleep(timeout_s)
            raise RpcUnreachable(f"{url}: no answer", maybe_delivered=True)
        if method.name in agent.refuse:
            answer = agent.refuse[method.name]
            if isinstance(answer, Exception):
                raise answer
            return answer
        return getattr(self, "_" + method.name.replace("/", "_"))(agent, body)

    def methods(self, *names: str) -> list[tuple[str, str]]:
        """Return the calls of these methods, in order."""
        return [call for call in self.calls if call[1] in names]

    def _status(self, agent: FakeAgent, _: rpc.Empty) -> rpc.AgentStatus:
        return agent.status()

    def _become_leader(self, agent: FakeAgent, body: rpc.BecomeLeaderCall) -> Any:
        found = agent.groups.get(GroupId(body.group))
        if found is None:
            return rpc.Refused(rpc.Refusal.INVALID_GROUP)
        before = [other.groups[GroupId(body.group)] for other in self.agents.values() if body.group in other.groups]
        found.starting = max((other.starting or 0) for other in before) + 10
        found.role, found.clock = rpc.GroupRole.LEADER, found.clock + 1
        found.committed = found.captured
        found.owned = next((other.owned for other in before if other.owned is not None), found.owned)
        found.transferring = next((other.transferring for other in before if other.transferring), found.transferring)
        return rpc.Done()

    def _stepdown(self, agent: FakeAgent, body: rpc.GroupCall) -> Any:
        found = agent.groups.get(GroupId(body.group))
        if found is None or found.role is not rpc.GroupRole.LEADER:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        found.role, found.clock = rpc.GroupRole.WITNESS, found.clock + 1
        return rpc.SteppedDown(found.captured or 0)

    # --- transfers: every step commits at once -------------------------------------------------------

    def _leading(self, agent: FakeAgent, wanted: bytes) -> FakeGroup | None:
        """Return a group that the agent can commit in: a deposed leader's appends meet the newer one's entries."""
        found = agent.groups.get(GroupId(wanted))
        if found is None or found.role is not rpc.GroupRole.LEADER:
            return None
        claims = [
            other.groups[GroupId(wanted)].starting or 0
            for other in self.agents.values()
            if other.realm == agent.realm
            and wanted in other.groups
            and other.groups[GroupId(wanted)].role is rpc.GroupRole.LEADER
        ]
        return found if (found.starting or 0) == max(claims) else None

    def _transfer_prepare(self, agent: FakeAgent, body: rpc.TransferPrepare) -> Any:
        found = self._leading(agent, body.destination)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        wanted = OwnedRange(RecordId(body.range.start), RecordId(body.range.end))
        if found.transferring is None:
            if found.owned is not None and found.owned.join(wanted) is None:
                return rpc.Refused(rpc.Refusal.UNACCEPTABLE_RANGE)
            found.captured = (found.captured or 0) + 1
            found.committed = found.captured
            found.transferring = rpc.TransferringInfo(rpc.Direction.IN, body.source, body.range, found.captured)
        elif found.transferring.direction is not rpc.Direction.IN or found.transferring.range != body.range:
            return rpc.Refused(rpc.Refusal.OTHER_TRANSFER_PENDING)
        return rpc.Prepared(b"n" * 16, b"prepared")

    def _transfer_cancel_prepare(self, agent: FakeAgent, body: rpc.TransferPrepare) -> Any:
        found = self._leading(agent, body.destination)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        found.transferring = None
        return rpc.Done()

    def _transfer_out(self, agent: FakeAgent, body: rpc.TransferOutCall) -> Any:
        found = self._leading(agent, body.source)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        wanted = OwnedRange(RecordId(body.range.start), RecordId(body.range.end))
        if found.transferring is None:
            if found.owned is None:
                return rpc.Refused(rpc.Refusal.NOT_OWNER)
            if found.owned != wanted and found.owned.split_at(wanted) is None:
                return rpc.Refused(rpc.Refusal.UNACCEPTABLE_RANGE)
            found.owned = subtract(found.owned, wanted)
            found.captured = (found.captured or 0) + 1
            found.committed = found.captured
            found.transferring = rpc.TransferringInfo(
                rpc.Direction.OUT, body.destination, body.range, found.captured, b"h" * 32
            )
        return rpc.TransferredOut(rpc.PartitionInfo(body.range, b"h" * 32), found.transferring.at, b"out")

    def _transfer_in(self, agent: FakeAgent, body: rpc.TransferInCall) -> Any:
        found = self._leading(agent, body.destination)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        if found.transferring is None:
            return rpc.Refused(rpc.Refusal.NOT_PREPARED)
        taken = OwnedRange(RecordId(body.transferring.range.start), RecordId(body.transferring.range.end))
        found.owned = taken if found.owned is None else found.owned.join(taken)
        found.transferring = None
        self.arrived.add((body.realm, body.source, body.destination, body.at))
        return rpc.Done()

    def _transfer_complete(self, agent: FakeAgent, body: rpc.TransferComplete) -> Any:
        found = self._leading(agent, body.source)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        marker = found.transferring
        if marker is None or marker.direction is not rpc.Direction.OUT or marker.at != body.at:
            return rpc.Refused(rpc.Refusal.NOT_TRANSFERRING)
        found.transferring = None
        return rpc.Done()

    def _transfer_owns(self, agent: FakeAgent, body: rpc.OwnsCall) -> Any:
        found = self._leading(agent, body.group)
        if found is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        if found.transferring is not None:
            return rpc.Refused(rpc.Refusal.TRANSFER_IN_PROGRESS)
        wanted = OwnedRange(RecordId(body.range.start), RecordId(body.range.end))
        owns = found.owned is not None and found.owned.contains_range(wanted)
        return rpc.Done() if owns else rpc.Refused(rpc.Refusal.NOT_OWNED)

    def _transfer_arrived(self, agent: FakeAgent, body: rpc.ArrivedCall) -> Any:
        if self._leading(agent, body.destination) is None:
            return rpc.Refused(rpc.Refusal.NOT_LEADER)
        asked = (body.realm, body.source, body.destination)
        consumed = [at for *key, at in self.arrived if tuple(key) == asked]
        return rpc.Done() if consumed and max(consumed) >= body.at else rpc.Refused(rpc.Refusal.NOT_ARRIVED)


class FakeLeases:
    """Leases with the store's rules; `broken` makes every call fail."""

    def __init__(self) -> None:
        self.rows: dict[str, Lease] = {}
        self.broken = False
        self.grants = 0

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise StoreUnavailable("down")
        held = self.rows.get(name)
        if held is not None and held.expires_ms >= now_ms:
            return None
        self.grants += 1
        self.rows[name] = Lease(name, owner, f"{self.grants:032x}", now_ms + length_ms)
        return self.rows[name]

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise StoreUnavailable("down")
        held = self.rows.get(lease.name)
        if held is None or held.id != lease.id:
            return None
        self.rows[lease.name] = replace(held, expires_ms=now_ms + length_ms)
        return self.rows[lease.name]

    async def terminate(self, lease: Lease) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise StoreUnavailable("down")
        held = self.rows.get(lease.name)
        if held is not None and held.id == lease.id:
            del self.rows[lease.name]

    async def list(self) -> list[Lease]:
        return [self.rows[name] for name in sorted(self.rows)]


class FakeDiscovery:
    """Registrations by kind and URL."""

    def __init__(self) -> None:
        self.rows: dict[tuple[ServiceKind, str], int] = {}

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        self.rows[kind, url] = now_ms

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        self.rows.pop((kind, url), None)

    async def forget(self, address: ServiceAddress) -> None:
        if self.rows.get((address.kind, address.url)) == address.registered_ms:
            del self.rows[address.kind, address.url]

    async def list(self, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        return [
            ServiceAddress(found, url, at)
            for (found, url), at in sorted(self.rows.items(), key=lambda row: (row[0][0].value, row[0][1]))
            if kind in (None, found)
        ]


class FakeSettings:
    """Settings by name."""

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}

    async def get(self, name: str) -> bytes | None:
        return self.rows.get(name)

    async def put(self, name: str, value: bytes) -> None:
        self.rows[name] = value

    async def remove(self, name: str) -> None:
        self.rows.pop(name, None)

    async def list(self, prefix: str) -> dict[str, bytes]:
        return {name: value for name, value in self.rows.items() if name.startswith(prefix)}


class FakeAudit:
    """Entries in the order they were added; `unavailable` refuses more."""

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self.unavailable = False

    async def add(self, entry: AuditEntry) -> None:
        if self.unavailable:
            raise StoreUnavailable("down")
        self.entries.append(entry)


@dataclass
class FakeStore:
    """The shared records the manager uses."""

    leases: FakeLeases = field(default_factory=FakeLeases)
    discovery: FakeDiscovery = field(default_factory=FakeDiscovery)
    settings: FakeSettings = field(default_factory=FakeSettings)
    audit: FakeAudit = field(default_factory=FakeAudit)


def make_context(agents: list[FakeAgent], now_ms: Callable[[], int] = lambda: 1_000_000) -> ManagerContext:
    """Return a manager's surroundings over these agents, all of them registered."""
    store = FakeStore()
    for agent in agents:
        store.discovery.rows[ServiceKind.AGENT, agent.url] = 0
    log = structlog.wrap_logger(None, processors=[_drop], wrapper_class=structlog.stdlib.BoundLogger)
    return ManagerContext(
        store=store,  # type: ignore[arg-type]  # only the records the manager uses
        rpc=FakeRpc(agents),
        name="manager",
        now_ms=now_ms,
        meter=Metrics(),
        log=log,
    )


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


async def recover_transfers(context: ManagerContext) -> None:
    """Run one pass of recovery and wait until it has ended for every realm."""
    async with trio.open_nursery() as nursery:
        await Recovery(context, nursery).run_pass()
