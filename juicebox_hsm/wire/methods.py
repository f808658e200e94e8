"""Methods of the internal RPC: their requests, replies and permitted callers (agent.md 2, manager.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Any, Final, Generic, TypeVar

from juicebox_hsm.wire.rpc import (
    AgentStatus,
    App,
    AppOk,
    ArrivedCall,
    BecomeLeaderCall,
    CapturedReply,
    Done,
    Empty,
    GroupCall,
    GroupCreated,
    GroupJoin,
    GroupNew,
    LeaderLost,
    ManagerStatus,
    OwnsCall,
    PeerRole,
    Prepared,
    RateState,
    RealmCreated,
    RealmJoin,
    RealmJoined,
    Rebalanced,
    Refused,
    Replicate,
    StepdownOrder,
    SteppedDown,
    TenantsReloaded,
    TransferComplete,
    TransferInCall,
    TransferOutCall,
    TransferPrepare,
    TransferredOut,
)

Request = TypeVar("Request")
Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Reply]):
    """One method: its body types and who may call it. `Reply` is a union where there are several replies.

    Callers name the constant, so that the type of the reply follows from it; servers find methods by name, in a table.
    """

    name: str
    request: type[Request]
    reply: type[Reply] | UnionType
    callers: frozenset[PeerRole]


AnyMethod = Method[Any, Any]
"""A method of which nothing is known, as it is found in a table: the decoder checks its bodies as they arrive."""

_ALL: Final = frozenset(PeerRole)
_A: Final = frozenset({PeerRole.AGENT})
_L: Final = frozenset({PeerRole.LOAD_BALANCER})
_M: Final = frozenset({PeerRole.MANAGER})
_O: Final = frozenset({PeerRole.OPERATOR})


def _or_refused(
    name: str, request: type[Request], reply: type[Reply], callers: frozenset[PeerRole]
) -> Method[Request, Reply | Refused]:
    return Method(name, request, reply | Refused, callers)


def _table(*methods: AnyMethod) -> dict[str, AnyMethod]:
    return {method.name: method for method in methods}


AGENT_STATUS: Final = Method("status", Empty, AgentStatus, _ALL)
REALM_NEW: Final = _or_refused("realm/new", Empty, RealmCreated, _O)
REALM_JOIN: Final = _or_refused("realm/join", RealmJoin, RealmJoined, _O)
GROUP_NEW: Final = _or_refused("group/new", GroupNew, GroupCreated, _O)
GROUP_JOIN: Final = _or_refused("group/join", GroupJoin, Done, _O)
GROUP_RETIRE: Final = _or_refused("group/retire", GroupCall, Done, _O)
BECOME_LEADER: Final = _or_refused("become_leader", BecomeLeaderCall, Done, _M)
STEPDOWN: Final = _or_refused("stepdown", GroupCall, SteppedDown, _M | _O)
REPLICATE: Final = _or_refused("replicate", Replicate, CapturedReply, _A)
CAPTURED: Final = _or_refused("captured", GroupCall, CapturedReply, _A)
APP: Final = _or_refused("app", App, AppOk, _L)
TRANSFER_PREPARE: Final = _or_refused("transfer/prepare", TransferPrepare, Prepared, _M)
TRANSFER_CANCEL_PREPARE: Final = _or_refused("transfer/cancel_prepare", TransferPrepare, Done, _M)
TRANSFER_OUT: Final = _or_refused("transfer/out", TransferOutCall, TransferredOut, _M)
TRANSFER_IN: Final = _or_refused("transfer/in", TransferInCall, Done, _M)
TRANSFER_COMPLETE: Final = _or_refused("transfer/complete", TransferComplete, Done, _M)
TRANSFER_OWNS: Final = _or_refused("transfer/owns", OwnsCall, Done, _M)
TRANSFER_ARRIVED: Final = _or_refused("transfer/arrived", ArrivedCall, Done, _M)
RATE_STATE: Final = _or_refused("rate/state", Empty, RateState, _A)
TENANTS_RELOAD: Final = _or_refused("tenants/reload", Empty, TenantsReloaded, _O)

AGENT_METHODS: Final = _table(
    AGENT_STATUS,
    REALM_NEW,
    REALM_JOIN,
    GROUP_NEW,
    GROUP_JOIN,
    GROUP_RETIRE,
    BECOME_LEADER,
    STEPDOWN,
    REPLICATE,
    CAPTURED,
    APP,
    TRANSFER_PREPARE,
    TRANSFER_CANCEL_PREPARE,
    TRANSFER_OUT,
    TRANSFER_IN,
    TRANSFER_COMPLETE,
    TRANSFER_OWNS,
    TRANSFER_ARRIVED,
    RATE_STATE,
    TENANTS_RELOAD,
)

MANAGER_STATUS: Final = Method("status", Empty, ManagerStatus, _ALL)
LEADER_STEPDOWN: Final = _or_refused("leader_stepdown", StepdownOrder, Done, _A | _O)
LEADER_LOST: Final = _or_refused("leader_lost", LeaderLost, Done, _A)
REBALANCE: Final = _or_refused("rebalance", Empty, Rebalanced, _O)
TRANSFER: Final = _or_refused("transfer", TransferPrepare, Done, _O)

MANAGER_METHODS: Final = _table(MANAGER_STATUS, LEADER_STEPDOWN, LEADER_LOST, REBALANCE, TRANSFER)
