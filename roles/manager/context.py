"""What every part of the manager is given: the store, a way to call agents, clocks and a place to report to."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.observation.tracing import Traces
from juicebox_hsm.adapters.tls.certificate_end import no_certificate
from juicebox_hsm.host.cluster.leases import StandingLeases
from juicebox_hsm.host.cluster.progress import TransferProgress
from juicebox_hsm.host.cluster.view import GroupKey
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.ports.rpc import RpcCaller
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import LoopRun, PeerRole
from roles.audit import Recorder


@dataclass(slots=True)
class ManagerState:
    """What this instance remembers; nothing here is durable and nothing here matters for safety.

    `announced` are groups somebody said are leaderless, so that the next pass need not see it twice.
    `urls` are the agents last seen with a group.
    `pending` maps a group and the index of its transfer to the Unix time in ms when the transfer was first seen;
    `transfers` are those that this process runs, ordered or recovered, oldest first.
    """

    announced: set[GroupKey] = field(default_factory=set)
    urls: dict[GroupKey, tuple[str, ...]] = field(default_factory=dict)
    pending: dict[tuple[GroupKey, int], int] = field(default_factory=dict)
    transfers: list[TransferProgress] = field(default_factory=list)
    held_leases: dict[str, int] = field(default_factory=dict)
    standing: StandingLeases = field(default_factory=StandingLeases)
    actions: dict[str, str] = field(default_factory=dict)
    loops: dict[str, LoopRun] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ManagerContext:
    """The manager's surroundings; `now_ms` is wall-clock Unix time in ms, which others only get to see.

    `began_s` is when this process began, on Trio's clock.
    `certificate_end` tells when the cluster certificate in service ends (UTC), None without TLS.
    """

    store: Store
    rpc: RpcCaller
    name: str
    now_ms: Callable[[], int]
    meter: Meter
    log: Log
    traces: Traces | None = None
    faults: FaultSwitch = field(default_factory=FaultSwitch)
    certificate_end: Callable[[], dt.datetime | None] = no_certificate
    state: ManagerState = field(default_factory=ManagerState)
    began_s: float = field(default_factory=trio.current_time)

    @property
    def recorder(self) -> Recorder:
        """Return who writes to the audit trail for this manager."""
        return Recorder(self.store.audit, self.name, self.now_ms, self.log)

    async def note(self, action: str, **arguments: str) -> None:
        """Record what this manager did unasked, after it was done."""
        who = f"{PeerRole.MANAGER.value}/{self.name}"
        await self.recorder.note(who, action, tuple(arguments.items()))
